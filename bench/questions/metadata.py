"""Question 8: trees of many small files."""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.candidates import BINDFS, MERGERFS, NATIVE, Served, own
from bench.disks import MEMORY
from bench.question import OWN, Bar, Figures, Question, Scale

FIGURES = ["unpack [files/s]", "find [files/s]", "git clone [files/s]", "git status [files/s]", "rm -r [files/s]"]
GIT = ("git", "-c", "user.name=bench", "-c", "user.email=bench@localhost", "-c", "gc.auto=0")


def sources() -> Iterator[Path]:
    """Source files that every machine with a compiler and Python has, in a fixed order."""
    for directory, pattern in ((sysconfig.get_path("stdlib"), "*.py"), ("/usr/include", "*.h")):
        yield from sorted(path for path in Path(directory).rglob(pattern) if path.is_file())


@functools.cache
def source_tree(count: int) -> tempfile.TemporaryDirectory[str]:
    """A directory with a source tree of so many files twice: as ``tree.tar``, and as the repository ``tree.git``."""
    place = tempfile.TemporaryDirectory(prefix="bench-tree-", dir=MEMORY)
    tree = Path(place.name) / "tree"
    files = list(sources())
    for number, source in zip(range(count), itertools.cycle(files), strict=False):
        target = tree / f"copy-{number // len(files)}" / source.relative_to("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
    subprocess.run(["tar", "-cf", "tree.tar", "tree"], cwd=place.name, check=True)
    for words in (("init", "--quiet"), ("add", "--all"), ("commit", "--quiet", "--message=all")):
        subprocess.run([*GIT, *words], cwd=tree, check=True)
    subprocess.run([*GIT, "clone", "--quiet", "--bare", tree, f"{place.name}/tree.git"], check=True)
    shutil.rmtree(tree)
    return place


def forget_names() -> None:
    """Make the kernel drop dentries and inodes, so that they are asked for."""
    Path("/proc/sys/vm/drop_caches").write_text("2")


def measure(served: Served, scale: Scale) -> Figures:
    count = scale.pick(20_000, 1000)
    place = source_tree(count).name
    tree, clone = served.directory / "tree", served.directory / "clone"

    def timed(*words: str | Path) -> float:
        began = time.monotonic()
        done = subprocess.run(words, stdout=subprocess.PIPE, check=True)
        took = time.monotonic() - began
        if done.stdout:
            raise RuntimeError(f"{words}: {done.stdout[:200]!r}")
        return count / took

    def unpack() -> float:
        return timed("tar", "-xf", f"{place}/tree.tar", "-C", served.directory)

    def find() -> float:
        forget_names()
        return timed("find", tree, "-type", "f", "-size", "+100M")

    def git_clone() -> float:
        return timed(*GIT, "clone", "--quiet", f"file://{place}/tree.git", clone)

    def git_status() -> float:
        forget_names()
        return timed(*GIT, "-C", clone, "status", "--porcelain")

    def remove() -> float:
        return timed("rm", "-r", tree)

    steps = (unpack, find, git_clone, git_status, remove)
    figures = {figure: step() for figure, step in zip(FIGURES, steps, strict=True)}
    if os.path.exists(tree):
        raise RuntimeError("rm left something")
    return figures


QUESTION = Question(
    number=8,
    title="metadata",
    about="A source tree (Python's library and the C headers of the machine, copied up to 20,000 files): tar -x, find "
    "with a stat of each file, git clone, git status, rm -r of what was unpacked. Names and inodes are dropped from "
    "the kernel's cache before find and git status.",
    candidates=[NATIVE, own(), BINDFS],
    measure=measure,
    bars=[Bar(figure, 1, of=BINDFS.name, candidate=OWN) for figure in FIGURES],
    peers=[MERGERFS],
)
