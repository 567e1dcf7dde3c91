"""A daemon with hardly any memory gets on, and one that the kernel kills for lack of it loses nothing.

The cache is of class disk: its pages can be dropped and written, while those of a tmpfs count as the daemon's own.
"""

from __future__ import annotations

import contextlib
import functools
import os
import random
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from storm_writers import BLOCK, Content, Write, write_whole
from support_cgroup import MemoryCgroup, memory_cgroup
from support_daemon import Daemon, MakeDaemon, make_daemon, wait_until

__all__ = ["make_daemon"]
MARGIN = 3
"""times what an idle daemon has: below it faults of the pool's map, each of which reads ahead, push one another out"""
PIECE = 64 * BLOCK
PATIENCE_S = 600


@pytest.fixture
def cgroup() -> Iterator[MemoryCgroup]:
    if os.geteuid() != 0:
        pytest.skip("cgroups need root")
    with memory_cgroup() as cgroup:
        yield cgroup


@pytest.fixture
def limited(cgroup: MemoryCgroup, make_daemon: MakeDaemon) -> tuple[Daemon, subprocess.Popen[bytes], int]:
    """A daemon in a cgroup with a limit of so many bytes."""
    daemon = make_daemon(disk=True, size="256M", options=("dirty_age=0.5,full_timeout=600",), mount=False)
    child = daemon.start(before=cgroup.entering)
    wait_until(lambda: daemon.is_served_by(child), "a daemon that serves")
    limit = MARGIN * cgroup.anonymous
    cgroup.limit(limit)
    print(f"limit {limit >> 20} MiB")
    return daemon, child, limit


def write_randomly(fd: int, content: Content, rng: random.Random, pieces: int, places: int) -> None:
    """Write pieces to places of a file."""
    for _ in range(pieces):
        offset = rng.randrange(places) * PIECE
        data = content.image(offset, PIECE)
        content.attempt(Write(offset, data), functools.partial(write_whole, fd, data, offset))


@pytest.mark.timeout(2 * PATIENCE_S)
def test_several_times_as_much_as_fits_goes_through(
    limited: tuple[Daemon, subprocess.Popen[bytes], int], cgroup: MemoryCgroup, rng: random.Random
) -> None:
    daemon, child, limit = limited
    content, path = Content(1), daemon.path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        write_randomly(fd, content, rng, 3 * limit // PIECE, limit // PIECE)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert child.poll() is None
    assert cgroup.oom_kills == 0
    daemon.ask("flush")
    assert daemon.ask("status")["dirty_bytes"] == 0
    content.settle(path.read_bytes(), "file")
    content.settle((daemon.backing / "file").read_bytes(), "file, beneath")
    daemon.kill()
    daemon.start_and_wait()
    content.settle(path.read_bytes(), "file, after a kill")


@pytest.mark.timeout(2 * PATIENCE_S)
def test_killed_by_the_kernel_for_lack_of_memory(
    limited: tuple[Daemon, subprocess.Popen[bytes], int], cgroup: MemoryCgroup, rng: random.Random
) -> None:
    daemon, child, limit = limited
    content, path = Content(1), daemon.path / "file"
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        with tempfile.TemporaryDirectory(dir="/dev/shm") as memory, open(Path(memory) / "ballast", "wb") as ballast:
            # What the daemon does not fit beside outlives the one that writes it: the kernel looks for a next one to
            # kill as soon as it has given up waiting for the memory of the first, which may still be ending.
            size = f"{limit * 3 // 4}"
            with subprocess.Popen([*cgroup.entering, "head", "--bytes", size, "/dev/zero"], stdout=ballast) as writer:
                with contextlib.suppress(OSError):
                    while child.poll() is None:
                        assert writer.poll() in (None, 0, -9), "there is no ballast"
                        write_randomly(fd, content, rng, 1, limit // PIECE)
                child.wait(PATIENCE_S)
    finally:
        with contextlib.suppress(OSError):
            os.close(fd)
    assert child.returncode == -9
    assert cgroup.oom_kills > 0
    daemon.start_and_wait()
    content.settle(path.read_bytes(), "file")
    daemon.ask("flush")
    daemon.unmount()
    content.settle((daemon.backing / "file").read_bytes(), "file, beneath")
