"""Real file systems on loop devices, and ways to make them slow, to empty caches, and to look into them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import resource
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest
import trio

from cachefsd.backing.aio import Aio
from cachefsd.backing.tree import Tree
from cachefsd.backing.treebacking import TreeBacking
from cachefsd.backing.workers import Workers

FILE_SYSTEMS = {
    "ext4": (128, ["mkfs.ext4", "-q", "-F"]),
    "xfs": (320, ["mkfs.xfs", "-q", "-f"]),
    "btrfs": (128, ["mkfs.btrfs", "-q", "-f"]),
}


LOCK = Path(tempfile.gettempdir()) / "cachefsd-tests.lock"


def run(*command: str | os.PathLike[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{command} ended with {done.returncode}: {done.stderr}"
    return done.stdout


@contextmanager
def alone() -> Iterator[None]:
    """No other test makes, mounts or unmounts a file system meanwhile. mkfs.btrfs, which looks at all mounts and loop
    devices, has failed beside other tests."""
    with open(LOCK, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def unmount(mountpoint: Path) -> None:
    """Take a file system off, and its loop device with it."""
    with alone():
        run("umount", "--lazy", mountpoint)


@contextmanager
def loop_mounted(
    kind: str, directory: Path, *, size_mib: int | None = None, options: tuple[str, ...] = ()
) -> Iterator[Path]:
    """A fresh file system of a kind, mounted in ``directory``; nothing of it is left afterwards.

    ``options`` are for mkfs.
    """
    if os.geteuid() != 0:
        pytest.skip("mounting needs root")
    size, mkfs = FILE_SYSTEMS[kind]
    image, mountpoint = directory / f"{kind}.img", directory / kind
    mountpoint.mkdir()
    with open(image, "wb") as file:
        file.truncate((size_mib or size) << 20)
    with contextlib.ExitStack() as undo:
        undo.callback(image.unlink)
        with alone():
            run(*mkfs, *options, image)
            run("mount", "-o", "loop", image, mountpoint)  # the loop device goes with the mount
        undo.callback(unmount, mountpoint)
        yield mountpoint


@pytest.fixture(scope="module", params=list(FILE_SYSTEMS))
def file_system(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Each kind of file system in turn."""
    with loop_mounted(request.param, tmp_path_factory.mktemp("fs")) as mountpoint:
        yield mountpoint


@pytest.fixture(scope="module")
def ext4(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with loop_mounted("ext4", tmp_path_factory.mktemp("fs")) as mountpoint:
        yield mountpoint


@pytest.fixture
def area(file_system: Path, request: pytest.FixtureRequest) -> Path:
    """A fresh directory on each kind of file system."""
    return fresh(file_system)


@pytest.fixture
def ext4_area(ext4: Path) -> Path:
    """A fresh directory on ext4."""
    return fresh(ext4)


def fresh(mountpoint: Path) -> Path:
    number = len(list(mountpoint.iterdir()))
    path = mountpoint / f"test-{number}"
    path.mkdir()
    return path


DROP = Path("/proc/sys/vm/drop_caches")


def drop_caches() -> None:
    """Make the kernel forget dentries, inodes and clean pages, those of the whole machine."""
    with open(DROP, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        os.sync()
        file.write("3")


@contextmanager
def caches_kept() -> Iterator[None]:
    """No test beside this one drops caches. ``sync`` may wait for a file system that hangs. A name that is not in the
    caches is looked up under the lock of its directory, and a client that waits may hold the lock."""
    with open(DROP, "w") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def pages_of(path: Path) -> int:
    """How many pages of a file are in the page cache."""
    return int(run("fincore", "--noheadings", "--output", "PAGES", path))


@contextmanager
def frozen(mountpoint: Path) -> Iterator[None]:
    """A file system on which every write hangs until the end of the block. Caches cannot be dropped in it."""
    with caches_kept():
        run("fsfreeze", "--freeze", mountpoint)
        try:
            yield
        finally:
            run("fsfreeze", "--unfreeze", mountpoint)


LARGEST = 1 << 30
"""More than any file has that is written beside a test."""


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file becomes longer in this process: a write across that size is short, one beyond it fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


class Below:
    """A whole backing over a directory."""

    def __init__(self, path: Path, metadata: Workers, data: Workers, aio: Aio, block_size: int) -> None:
        self.path = path
        self.data = data
        self.aio = aio
        self.tree = Tree(os.fspath(path), metadata)
        self.backing = TreeBacking(self.tree, aio, data, block_size)


@asynccontextmanager
async def below(path: Path, block_size: int = 4096) -> AsyncIterator[Below]:
    async with Workers(4, "metadata") as metadata, Workers(4, "data") as data, Aio(data) as aio:
        result = Below(path, metadata, data, aio, block_size)
        try:
            yield result
        finally:
            result.tree.close()


async def ticks(count: int) -> None:
    """Return once the loop has gone around ``count`` times."""
    for _ in range(count):
        await trio.sleep(0.001)


THROTTLE = Path("/sys/fs/cgroup/blkio/blkio.throttle.read_iops_device")


@contextmanager
def slow_reads(mountpoint: Path) -> Iterator[None]:
    """A device that serves one read a second until the end of the block. Caches cannot be dropped in it."""
    if not THROTTLE.exists():
        pytest.skip("no blkio cgroup of version 1 to slow a device down with")
    device = os.stat(mountpoint).st_dev
    name = f"{os.major(device)}:{os.minor(device)}"
    with caches_kept():
        THROTTLE.write_text(f"{name} 1")
        try:
            yield
        finally:
            THROTTLE.write_text(f"{name} 0")


@contextmanager
def overlay_mounted(directory: Path) -> Iterator[Path]:
    """An overlay on ext4, whose file handles have more than 32 bytes; ``lower/`` and ``upper/`` are beside it."""
    with loop_mounted("ext4", directory) as base:
        places = {name: base / name for name in ("lower", "upper", "work", "merged")}
        for path in places.values():
            path.mkdir()
        (places["lower"] / "directory").mkdir()
        (places["lower"] / "directory" / "below").write_bytes(b"below" * 2000)
        (places["lower"] / "from below").write_bytes(b"old" * 5000)
        yield from _overlay(places)


def _overlay(places: dict[str, Path]) -> Iterator[Path]:
    words = ",".join(f"{name}dir={places[name]}" for name in ("lower", "upper", "work"))
    command = ["mount", "-t", "overlay", "overlay", "-o", f"{words},nfs_export=on,index=on", places["merged"]]
    done = subprocess.run(command, check=False, capture_output=True)
    if done.returncode:
        pytest.skip("the kernel has no overlayfs with nfs_export")
    try:
        yield places["merged"]
    finally:
        run("umount", "--lazy", places["merged"])
