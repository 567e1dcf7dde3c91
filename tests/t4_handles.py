"""Handles of the mount (open_by_handle_at, and so NFS): they open what the kernel has long forgotten."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, daemons, make_daemon
from support_fs import drop_caches, loop_mounted
from support_posix import attempt

from cachefsd.backing import syscalls

__all__ = ["make_daemon"]


def handle_of(path: Path) -> bytes:
    return syscalls.name_to_handle_at(-100, os.fsencode(path))


def opened(daemon: Daemon, handle: bytes, flags: int = os.O_RDONLY) -> int:
    root = os.open(daemon.path, os.O_RDONLY)
    try:
        return syscalls.open_by_handle_at(root, handle, flags)
    finally:
        os.close(root)


def is_stale(daemon: Daemon, handle: bytes) -> bool:
    result = attempt(opened, daemon, handle)
    if isinstance(result, int):
        os.close(result)
    assert isinstance(result, int) or result == "ESTALE"
    return result == "ESTALE"


def fill(daemon: Daemon) -> dict[str, bytes]:
    """Make a tree; the handles of what is in it."""
    (daemon.path / "d" / "e").mkdir(parents=True)
    (daemon.path / "d" / "e" / "file").write_bytes(b"content")
    (daemon.path / "gone").write_bytes(b"gone")
    handles = {name: handle_of(daemon.path / name) for name in ("d", "d/e", "d/e/file", "gone")}
    (daemon.path / "gone").unlink()
    drop_caches()
    return handles


def check(daemon: Daemon, handles: dict[str, bytes]) -> None:
    file = opened(daemon, handles["d/e/file"], os.O_RDWR)
    try:
        assert os.read(file, 100) == b"content"
        os.pwrite(file, b"C", 0)
        os.fsync(file)
        os.pwrite(file, b"c", 0)
    finally:
        os.close(file)
    drop_caches()
    directory = opened(daemon, handles["d/e"])
    try:
        assert os.listdir(directory) == ["file"]
        assert os.stat("..", dir_fd=directory).st_ino == (daemon.path / "d").stat().st_ino
    finally:
        os.close(directory)
    assert is_stale(daemon, handles["gone"])


def test_what_the_kernel_has_forgotten(make_daemon: MakeDaemon) -> None:
    """The backing is a directory of some file system."""
    daemon = make_daemon()
    handles = fill(daemon)
    for _ in range(2):
        check(daemon, handles)
        drop_caches()
    os.rename(daemon.path / "d" / "e" / "file", daemon.path / "moved")
    drop_caches()
    file = opened(daemon, handles["d/e/file"])
    assert os.read(file, 100) == b"content"
    os.close(file)
    drop_caches()
    (daemon.path / "moved").unlink()
    drop_caches()
    assert is_stale(daemon, handles["d/e/file"])


@pytest.fixture(params=["ext4", "btrfs"])
def whole(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Daemon]:
    """A mount over all of a file system."""
    (tmp_path / "daemons").mkdir()
    with loop_mounted(request.param, tmp_path) as backing, daemons(tmp_path / "daemons") as make:
        yield make(backing)


def test_a_daemon_that_has_never_seen_them(whole: Daemon) -> None:
    handles = fill(whole)
    for again in (whole.remount, whole.kill_and_mount):
        again()
        check(whole, handles)
    # A number that is used again is another inode.
    inodes = {}
    for number in range(200):
        path = whole.path / f"{number}"
        path.touch()
        inodes[path.stat().st_ino] = (path, handle_of(path))
    for path, _ in inodes.values():
        path.unlink()
    whole.remount()
    for number in range(200):
        path = whole.path / f"new-{number}"
        path.touch()
        old = inodes.get(path.stat().st_ino)
        drop_caches()
        assert old is None or is_stale(whole, old[1])
        if number > 5:
            break


def test_nothing_outside_of_the_tree_is_found(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with loop_mounted("ext4", tmp_path) as file_system:
        (file_system / "inside").mkdir()
        (file_system / "outside").mkdir()
        (file_system / "outside" / "secret").write_bytes(b"secret")
        daemon = make_daemon(file_system / "inside")
        (daemon.path / "file").write_bytes(b"")
        (daemon.path / "directory").mkdir()
        handles = {name: handle_of(daemon.path / name) for name in ("file", "directory")}
        numbers = {name: (file_system / name).stat().st_ino for name in ("outside", "outside/secret")}
        daemon.remount()
        drop_caches()
        for number in numbers.values():
            for handle in handles.values():
                # The kernel's handles of FUSE begin with the node id: its upper half, its lower half.
                forged = handle[:4] + (number >> 32).to_bytes(4, "little") + number.to_bytes(4, "little") + handle[12:]
                assert is_stale(daemon, forged)
        assert not is_stale(daemon, handles["directory"])
        daemon.unmount()
