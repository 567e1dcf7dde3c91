"""The mount as a block server: an ext4 file system in a file, loop-mounted, in which small files are synced."""

from __future__ import annotations

import contextlib
import os
import random
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from lab import guest
from lab.workloads import InOrder

_MIB = 48
KEPT = 50
"""files"""


# The number of the last file that was synced: those before it are there too, as many as are kept.
Oracle = InOrder


def set_up(root: Path) -> None:
    image = root / "image"
    with image.open("wb") as file:
        file.truncate(_MIB << 20)
        os.fsync(file.fileno())
    guest.run("mkfs.ext4", "-q", "-F", "-b", "4096", "-J", "size=4", "-E", "lazy_itable_init=0", image)


def load(root: Path, told: int, say: Callable[..., None]) -> None:
    with _mounted(root) as files:
        number = told
        while True:
            number += 1
            with (files / str(number)).open("wb") as file:
                file.write(content(number))
                file.flush()
                os.fsync(file.fileno())
            # Not only "the file": ext4 makes the name durable with it, but nobody has promised that.
            guest.sync(files)
            say(number)
            (files / str(number - KEPT)).unlink(missing_ok=True)


def content(number: int) -> bytes:
    rng = random.Random(f"image {number}")
    return rng.randbytes(rng.randrange(1, 16 << 10))


def check(root: Path, told: int) -> None:
    """The file system is one, and what was synced is in it."""
    image = root / "image"
    # Replays the journal; 1: has corrected what a crash leaves in order, such as orphans. Then everything must be well.
    replayed = subprocess.run(["e2fsck", "-p", image], stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert replayed.returncode in (0, 1), f"e2fsck -p: {replayed.returncode}: {replayed.stdout} {replayed.stderr}"
    guest.run("e2fsck", "-f", "-n", image)
    with _mounted(root) as files:
        for number in range(max(1, told - KEPT + 1), told + 1):
            assert (files / str(number)).read_bytes() == content(number), f"file {number} of {told}"


@contextlib.contextmanager
def _mounted(root: Path) -> Iterator[Path]:
    files = Path("/run/image")
    guest.mount(root / "image", files, "loop")
    try:
        yield files
    finally:
        guest.run("umount", files)
