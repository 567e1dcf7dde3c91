"""fio writes a few files in turn, each with a pattern of its own, and verifies the finished ones."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

from lab.workloads import InOrder

FILES = 4


# The number of the last finished file: the one after it is being written, in place of the oldest.
Oracle = InOrder


def set_up(root: Path) -> None:
    pass


def load(root: Path, told: int, say: Callable[..., None]) -> None:
    number = told
    while True:
        number += 1
        _fio(root, number, "--do_verify=0", "--end_fsync=1")
        say(number)


def check(root: Path, told: int) -> None:
    for number in range(max(1, told - FILES + 2), told + 1):
        _fio(root, number, "--verify_only")


def _fio(root: Path, number: int, *more: str) -> None:
    """Write or verify a file; its number is the seed of everything in it."""
    words = ["fio", "--name=file", f"--filename={root / str(number % FILES)}", f"--randseed={number}", "--rw=randwrite"]
    words += ["--bs=4k", "--size=256k", "--direct=1", "--ioengine=libaio", "--iodepth=4"]
    # A pattern, as fio's own headers do not tell one generation of a file from the next.
    words += ["--verify=pattern", f"--verify_pattern=0x{number:016x}%o", "--verify_fatal=1", "--thread", *more]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, cwd=os.sep, check=False)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stdout[-2000:]} {done.stderr[-2000:]}"
