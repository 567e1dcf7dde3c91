"""Somebody exchanges directories of the backing for symbolic links, again and again: nothing gets out of the backing.

The links lead out of the backing as seen from there, and nowhere as seen through the mount: whatever changes outside
has been changed by the daemon.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import random
import signal
import struct
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_daemon import Daemon, MakeDaemon, make_daemon
from support_fs import below

from cachefsd.backing import handles, syscalls
from cachefsd.backing.locate import Locator
from cachefsd.backing.ports import LostFile, Place
from cachefsd.backing.treebacking import LOST_AND_FOUND, TreeBacking

__all__ = ["make_daemon"]
ROUNDS = 60
SWAPS = 300
DEADLINE_S = 200
NAMES = ("file", "other", "directory")
EXCHANGE = 2

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="the daemon that is of interest here is root's")


class Ground:
    """A backing with a directory, a link that leads out, and what it leads to."""

    def __init__(self, base: Path) -> None:
        self.backing, self.outside = base / "low" / "backing", base / "low" / "outside"
        for top in (self.backing / "d", self.outside):
            (top / "directory").mkdir(parents=True)
            (top / "file").write_bytes(b"content" * 2000)
            (top / "other").write_bytes(b"more" * 100)
            (top / "directory" / "deep").write_bytes(b"deep")
        os.chmod(self.outside / "file", 0o4755)
        os.setxattr(self.outside / "other", "user.mark", b"outside")
        (self.backing / "link").symlink_to("../outside")
        self.before = self.look()

    def look(self) -> dict[str, Any]:
        """Everything outside, times of change included: they tell what has been put back as well."""
        found = {}
        for path in (self.outside, *sorted(self.outside.rglob("*"))):
            status = os.lstat(path)
            content = path.read_bytes() if path.is_file() else None
            numbers = status.st_ino, status.st_mode, status.st_nlink, status.st_uid, status.st_gid, status.st_size
            names = [(name, os.getxattr(path, name)) for name in os.listxattr(path)]
            found[os.fspath(path)] = (numbers, status.st_mtime_ns, status.st_ctime_ns, names, content)
        return found

    def swap(self) -> None:
        syscalls.renameat2(-1, os.fsencode(self.backing / "d"), -1, os.fsencode(self.backing / "link"), EXCHANGE)

    def check(self) -> None:
        assert self.look() == self.before


@pytest.fixture
def ground(tmp_path: Path) -> Ground:
    return Ground(tmp_path)


@contextlib.contextmanager
def swapping(ground: Ground) -> Iterator[Callable[[], int]]:
    """A process that swaps as fast as it can; how often it has."""
    shared = mmap.mmap(-1, 8)
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                ground.swap()
                count = struct.unpack("<Q", shared)[0] + 1
                shared[:] = struct.pack("<Q", count)
        finally:
            os._exit(1)
    try:
        yield lambda: int(struct.unpack("<Q", shared)[0])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        shared.close()


def write(path: str, flags: int, directory: int | None) -> None:
    fd = os.open(path, flags, 0o666, dir_fd=directory)
    try:
        os.write(fd, b"through the mount" * 300)
        os.fchmod(fd, 0o600)
    finally:
        os.close(fd)


def operations(place: str, directory: int | None) -> list[Callable[[], Any]]:
    """One of each kind in a directory: by its path, or relative to a descriptor of it."""
    file, other, deep, new = (f"{place}{name}" for name in ("file", "other", "directory/deep", "new"))
    at: dict[str, Any] = {"dir_fd": directory}
    pair: dict[str, Any] = {"src_dir_fd": directory, "dst_dir_fd": directory}
    ops: list[Callable[[], Any]] = [
        lambda: write(file, os.O_WRONLY, directory),
        lambda: write(other, os.O_WRONLY | os.O_TRUNC, directory),
        lambda: write(new, os.O_WRONLY | os.O_CREAT, directory),
        lambda: write(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, directory),
        lambda: write(deep, os.O_RDWR | os.O_APPEND, directory),
        lambda: os.mkdir(f"{place}new directory", **at),
        lambda: os.rmdir(f"{place}new directory", **at),
        lambda: os.symlink("target", f"{place}new link", **at),
        lambda: os.mknod(f"{place}fifo", 0o10644, **at),
        lambda: os.link(file, f"{place}hard", **pair),
        lambda: os.rename(file, f"{place}renamed", **pair),
        lambda: os.rename(f"{place}renamed", file, **pair),
        lambda: os.unlink(new, **at),
        lambda: os.unlink(f"{place}hard", **at),
        lambda: os.unlink(f"{place}new link", **at),
        lambda: os.unlink(f"{place}fifo", **at),
        lambda: os.chmod(other, 0o640, **at),
        lambda: os.chown(other, 1000, 1000, **at),
        lambda: os.utime(other, ns=(1, 1), **at),
    ]
    if directory is None:
        ops += [
            lambda: os.truncate(file, 10),
            lambda: os.setxattr(other, "user.mark", b"inside"),
            lambda: os.removexattr(other, "user.mark"),
            lambda: os.listdir(place),
        ]
    return ops


def do_all(daemon: Daemon, rng: random.Random, directory: int | None = None) -> int:
    """All operations in an order of chance; how many were done."""
    done = 0
    places = [""] if directory is not None else [f"{daemon.path}/d/", f"{daemon.path}/link/"]
    ops = [op for place in places for op in operations(place, directory)]
    for op in rng.sample(ops, len(ops)):
        with contextlib.suppress(OSError):
            op()
            done += 1
    return done


def test_while_directories_are_exchanged_for_links(ground: Ground, make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(ground.backing, options=("dirty_age=0.05",))
    assert not (daemon.path / "link").exists(), "through the mount the link leads nowhere"
    rng = random.Random(1)
    deadline = time.monotonic() + DEADLINE_S
    held = os.open(daemon.path / "d", os.O_RDONLY | os.O_DIRECTORY)
    done = rounds = 0
    try:
        with swapping(ground) as count:
            while rounds < ROUNDS or count() < SWAPS or not done:
                assert time.monotonic() < deadline, f"{rounds} rounds, {count()} swaps, {done} operations"
                done += do_all(daemon, rng) + do_all(daemon, rng, held)
                rounds += 1
    finally:
        os.close(held)
    ground.check()
    daemon.flush()
    daemon.unmount()
    ground.check()


def test_through_names_that_the_kernel_remembers(ground: Ground, make_daemon: MakeDaemon) -> None:
    """Looked up before the exchange, used after it: also by descriptors, and by writeback."""
    daemon = make_daemon(ground.backing, options=("dirty_age=3600",))
    held = os.open(daemon.path / "d", os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name in NAMES:
            os.stat(name, dir_fd=held)
        with open(daemon.path / "d" / "file", "r+b") as file:
            file.write(b"before the exchange")
        ground.swap()
        done = do_all(daemon, random.Random(2), held)
        assert done > 10
        do_all(daemon, random.Random(3))
        write("fresh", os.O_WRONLY | os.O_CREAT, held)
        ground.check()
        daemon.flush()
    finally:
        os.close(held)
    ground.check()
    daemon.unmount()
    assert (ground.backing / "link" / "fresh").read_bytes() == b"through the mount" * 300


@pytest.mark.parametrize("leads", ["outside", "within"])
def test_recovery_creates_nothing_through_a_link(ground: Ground, make_daemon: MakeDaemon, leads: str) -> None:
    """A file with dirty data is gone, and where its directory was there is a link now."""
    daemon = make_daemon(ground.backing, options=("dirty_age=3600",))
    (daemon.path / "d" / "new").write_bytes(b"only here" * 1000)
    daemon.kill()
    (ground.backing / "d" / "new").unlink()
    if leads == "within":
        (ground.backing / "link").unlink()
        (ground.backing / "link").symlink_to("d")
    ground.swap()
    daemon.mount()
    ground.check()
    daemon.flush()
    daemon.unmount()
    ground.check()
    # The directory itself was found by its handle, wherever it is now. Somebody has removed the file behind the mount,
    # so the cache's version is a conflict's copy.
    (copy,) = (ground.backing / "link").glob("new*")
    assert copy.name.startswith("new.cachefsd-conflict-")
    assert copy.read_bytes() == b"only here" * 1000


def handle_of(path: Path) -> bytes:
    fd = os.open(path, os.O_PATH)
    try:
        return handles.file_handle(fd)
    finally:
        os.close(fd)


async def note(handle: bytes, place: Place) -> None:
    """Nobody keeps records here."""


@pytest.mark.parametrize("kernel", [True, False], ids=["by handle", "by name"])
async def test_a_directory_that_has_left_the_backing(ground: Ground, kernel: bool) -> None:
    """What was lost in it is created again in the backing, and not where the directory is now."""
    handle = handle_of(ground.backing / "d" / "directory")
    (ground.backing / "d" / "directory").rename(ground.outside / "moved")
    ground.before = ground.look()
    async with below(ground.backing) as lower:
        lower.tree.can_reopen &= kernel
        backing = TreeBacking(lower.tree, lower.aio, lower.data, 4096, Locator(lower.tree, lambda _: b"d/directory"))
        await backing.recreate(LostFile(handle, b"lost", b"file-1", 0o640, 5, 6), note)
    ground.check()
    created = ground.backing / os.fsdecode(LOST_AND_FOUND) / "file-1"
    assert (created.stat().st_mode & 0o7777, created.stat().st_uid) == (0o640, 5)


@pytest.mark.parametrize(
    "name", [b"..", b".", b"../outside/new", b"/etc/new", b"link/new", b"n\0", b"n" * 256, b"file"]
)
async def test_names_that_lead_astray_are_not_used(ground: Ground, name: bytes) -> None:
    async with below(ground.backing) as lower:
        lost = LostFile(handle_of(ground.backing / "d"), name, b"file-1", 0o600, 0, 0)
        await lower.backing.recreate(lost, note)
    ground.check()
    assert os.listdir(ground.backing / os.fsdecode(LOST_AND_FOUND)) == ["file-1"]
    assert sorted(os.listdir(ground.backing / "d")) == sorted(NAMES)


@pytest.mark.parametrize("kernel", [True, False], ids=["by handle", "by name"])
async def test_a_file_is_not_found_through_a_link(ground: Ground, kernel: bool) -> None:
    inside, outside = handle_of(ground.backing / "d" / "file"), handle_of(ground.outside / "file")
    ground.swap()
    async with below(ground.backing) as lower:
        lower.tree.can_reopen &= kernel
        locate = Locator(lower.tree, lambda _: b"d/file")
        fd = locate(inside)
        try:
            assert os.path.samestat(os.fstat(fd), os.stat(ground.backing / "link" / "file"))
        finally:
            os.close(fd)
        if not kernel:
            with pytest.raises(OSError, match="Stale"):
                locate(outside)
