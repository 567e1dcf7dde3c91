"""Option writeback_cache: what is written stays in the kernel until it is synced, and then counts as any other write.

What programs see is in t4_posix.py, which runs with and without it.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, is_gone, make_daemon, wait_until

from cachefsd.fuse import mounts

__all__ = ["make_daemon"]
SIZE = 1 << 20


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    return make_daemon(options=("writeback_cache,dirty_age=3600",))


def terminate(daemon: Daemon) -> None:
    os.kill(daemon.pid, signal.SIGTERM)
    wait_until(lambda: is_gone(daemon.pid), "the daemon's end")
    daemon.pid = 0


def requests(daemon: Daemon) -> int:
    """How many writes the daemon has been asked for."""
    counts = daemon.ask("status")["requests"]
    return int(counts["write_hits"] + counts["write_misses"])


def test_the_kernel_may_gather_more_than_its_1_percent(daemon: Daemon) -> None:
    entry = mounts.find_mount(daemon.path)
    assert entry is not None
    assert int(Path("/sys/class/bdi", entry.device, "max_ratio").read_text()) == mounts.DIRTY_PERCENT


def test_a_write_is_the_caches_when_it_is_synced(daemon: Daemon) -> None:
    data = os.urandom(SIZE)
    assert daemon.status()["acknowledged"] == "at fsync"
    with (daemon.path / "file").open("wb") as file:
        file.write(data)
        file.flush()
        # Whatever the kernel has handed over of its own accord: it keeps what it may for seconds.
        before = (daemon.backing / "file").stat()
        os.fsync(file.fileno())
        mtime = os.fstat(file.fileno()).st_mtime_ns
    assert daemon.ask("status")["dirty_bytes"] == SIZE
    beneath = (daemon.backing / "file").stat()
    assert (beneath.st_size, beneath.st_mtime_ns) == (0, before.st_mtime_ns)  # the time is in the cache as well
    daemon.kill_and_mount()
    assert (daemon.path / "file").read_bytes() == data
    found = (daemon.path / "file").stat().st_mtime_ns
    assert found >= mtime  # Linux 6.1 may hand the time over before the data
    daemon.flush()
    assert (daemon.backing / "file").read_bytes() == data
    assert (daemon.backing / "file").stat().st_mtime_ns == found


def test_small_writes_are_gathered(daemon: Daemon) -> None:
    fd = os.open(daemon.path / "file", os.O_WRONLY | os.O_CREAT)
    try:
        before = requests(daemon)
        for number in range(4096):
            os.pwrite(fd, b"%016d" % number, 16 * number)
        os.fsync(fd)
    finally:
        os.close(fd)
    assert requests(daemon) - before <= 16
    assert (daemon.path / "file").read_bytes() == b"".join(b"%016d" % number for number in range(4096))


@pytest.mark.parametrize("end", [terminate, Daemon.unmount], ids=["SIGTERM", "unmount"])
def test_an_orderly_end_keeps_what_was_not_synced(daemon: Daemon, end: Callable[[Daemon], None]) -> None:
    data = os.urandom(SIZE)
    (daemon.path / "file").write_bytes(data)
    os.truncate(daemon.path / "file", SIZE - 5)
    end(daemon)
    daemon.mount()
    assert (daemon.path / "file").read_bytes() == data[:-5]


@pytest.mark.parametrize("options", ["writeback_cache", "dirty_age=3600"])
def test_an_orderly_end_keeps_what_came_through_a_map(make_daemon: MakeDaemon, options: str) -> None:
    daemon = make_daemon(options=(options,))
    path = daemon.path / "file"
    path.write_bytes(bytes(SIZE))
    fd = os.open(path, os.O_RDWR)
    memory = mmap.mmap(fd, SIZE)
    try:
        memory[:] = b"x" * SIZE
        terminate(daemon)
    finally:
        memory.close()
        with contextlib.suppress(OSError):  # its file system is gone
            os.close(fd)
    daemon.mount()
    assert path.read_bytes() == b"x" * SIZE


def test_a_flush_takes_what_was_not_synced(daemon: Daemon) -> None:
    data = os.urandom(SIZE)
    (daemon.path / "file").write_bytes(data)
    daemon.flush()
    assert (daemon.backing / "file").read_bytes() == data


def test_what_was_synced_survives_kills(daemon: Daemon, rng: random.Random) -> None:
    content = bytearray(SIZE)
    path = daemon.path / "file"
    path.write_bytes(content)
    os.sync()
    for _ in range(4):
        fd = os.open(path, os.O_RDWR)
        try:
            for _ in range(50):
                offset, size = rng.randrange(SIZE - 10_000), rng.randrange(1, 10_000)
                data = rng.randbytes(size)
                os.pwrite(fd, data, offset)
                content[offset : offset + size] = data
            os.fsync(fd)
        finally:
            os.close(fd)
        daemon.kill_and_mount()
        assert path.read_bytes() == content
    daemon.flush()
    assert (daemon.backing / "file").read_bytes() == content


def test_others_setuid_goes_with_a_write(daemon: Daemon) -> None:
    path: Path = daemon.path / "program"
    path.write_bytes(b"x" * 5000)
    path.chmod(0o4777)
    fd = os.open(path, os.O_WRONLY)
    child = os.fork()
    if not child:
        try:
            os.setuid(1001)
            os.pwrite(fd, b"y", 0)
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.fsync(fd)
    os.close(fd)
    assert path.stat().st_mode & 0o7777 == 0o777
    daemon.kill_and_mount()
    assert path.stat().st_mode & 0o7777 == 0o777
    assert path.read_bytes() == b"y" + b"x" * 4999


def test_what_cannot_be_written_is_told_by_fsync(daemon: Daemon) -> None:
    path = daemon.path / "file"
    path.write_bytes(b"kept")
    fd = os.open(path, os.O_RDWR)
    try:
        assert os.pwrite(fd, b"x", 1 << 60) == 1  # beyond what a file of the backing can have
        with pytest.raises(OSError, match=r"File too large|Input/output error"):
            os.fsync(fd)
        os.ftruncate(fd, 4)
        os.pwrite(fd, b"K", 0)
        os.fsync(fd)
    finally:
        os.close(fd)
    daemon.kill_and_mount()
    assert path.read_bytes() == b"Kept"
