"""Small file systems filled to the brim through the cache: all that was acknowledged arrives, on each kind of them."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support_daemon import Daemon, MakeDaemon, make_daemon, wait_until
from support_fs import FILE_SYSTEMS, loop_mounted, run

__all__ = ["make_daemon"]
pytestmark = pytest.mark.slow
BLOCK = 4096
CHUNK = 16 * BLOCK
KINDS = list(FILE_SYSTEMS)
SIZE_MIB = {"ext4": 64, "xfs": 320, "btrfs": 512}
FREE = {"ext4": 24 << 20, "xfs": 24 << 20, "btrfs": 72 << 20}
MKFS = {"ext4": ("-m", "0"), "xfs": (), "btrfs": ()}
LAZY = ("dirty_age=3600,high_watermark=1,low_watermark=0.9",)
"""Nothing is written back before somebody wants it: all that is acknowledged is a promise."""


@contextmanager
def nearly_full(kind: str, directory: Path) -> Iterator[Path]:
    """A fresh file system of a kind with FREE bytes of it left or a little less, the rest taken by ``filler``."""
    if shutil.which(FILE_SYSTEMS[kind][1][0]) is None:
        pytest.skip(f"there is no mkfs for {kind}")
    directory.mkdir()
    with loop_mounted(kind, directory, size_mib=SIZE_MIB[kind], options=MKFS[kind]) as mountpoint:
        run("fallocate", "--length", str(available(mountpoint) - FREE[kind]), mountpoint / "filler")
        os.sync()
        yield mountpoint


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor; that closing it reports an error of writeback is nothing to this one."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT)
    try:
        yield fd
    finally:
        with suppress(OSError):
            os.close(fd)


def available(path: Path) -> int:
    status = os.statvfs(path)
    return status.f_bavail * status.f_frsize


def fill(fd: int, at: int, seed: int, limit: int = 1 << 40) -> int:
    """Write until there is no space, or up to ``limit``; where that is."""
    while at < limit:
        data = memoryview(chunk(seed, at))
        try:
            at += os.pwrite(fd, data[at % CHUNK :], at)
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            break
    return at


def chunk(seed: int, at: int) -> bytes:
    """What :func:`fill` writes around an offset."""
    return random.Random(f"{seed} {at // CHUNK}").randbytes(CHUNK)


def check(path: Path, seed: int, size: int) -> None:
    with path.open("rb") as file:
        for at in range(0, size, CHUNK):
            wanted = chunk(seed, at)[: size - at]
            assert file.read(len(wanted)) == wanted, f"{path.name} at {at}"


def refused(fd: int, data: bytes, offset: int) -> bool:
    try:
        os.pwrite(fd, data, offset)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        return True
    return False


def deliver(daemon: Daemon) -> None:
    """Everything reaches the backing, or this fails."""
    daemon.unmount("--flush")


@pytest.mark.parametrize("kind", KINDS)
def test_filled_to_the_brim(make_daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    with nearly_full(kind, tmp_path / "native") as native, opened(native / "file") as fd:
        taken_natively = fill(fd, 0, seed=1)
    with nearly_full(kind, tmp_path / "cached") as backing:
        daemon = make_daemon(backing, options=LAZY, size="96M")
        with opened(daemon.path / "file") as fd:
            size = fill(fd, 0, seed=1)
            end = size + CHUNK
            while not refused(fd, b"x" * BLOCK, end):  # what is left is less than a chunk
                end += BLOCK
            assert end <= size + 2 * CHUNK
            print(f"{kind}: {size} of {taken_natively} bytes, {size / taken_natively:.1%}")
            assert size >= taken_natively * (0.9 if kind == "ext4" else 0.3)
            if kind != "btrfs":  # which has no place for new data but free space
                assert not refused(fd, chunk(1, 0), 0)
            os.fsync(fd)
        daemon.kill_and_mount()
        check(daemon.path / "file", 1, size)
        deliver(daemon)
        check(backing / "file", 1, size)


@pytest.mark.parametrize("kind", ["ext4", "btrfs"])
def test_what_is_cut_off_or_unlinked_gives_its_room_back(make_daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    with nearly_full(kind, tmp_path / "cached") as backing:
        daemon = make_daemon(backing, options=LAZY, size="96M")
        with opened(daemon.path / "other") as other:
            with opened(daemon.path / "one") as one:
                quarter = fill(one, 0, seed=1) // 4 // CHUNK * CHUNK
                os.ftruncate(one, 2 * quarter)
                assert fill(other, 0, seed=2, limit=quarter) == quarter
            (daemon.path / "one").unlink()
            assert fill(other, quarter, seed=2, limit=3 * quarter) == 3 * quarter
        deliver(daemon)
        check(backing / "other", 2, 3 * quarter)
        assert not (backing / "one").exists()


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_holes_take_space_and_what_is_allocated_does_not(make_daemon: MakeDaemon, tmp_path: Path, kind: str) -> None:
    with nearly_full(kind, tmp_path / "cached") as backing:
        length = 1024
        written = {number: bytes([number % 251]) * BLOCK for number in range(0, length, 2)}
        with opened(backing / "sparse") as fd:
            for number, data in written.items():
                os.pwrite(fd, data, number * BLOCK)
            os.ftruncate(fd, length * BLOCK)
            os.fsync(fd)
        daemon = make_daemon(backing, options=LAZY, size="96M")
        with opened(daemon.path / "filling") as filling:
            size = fill(filling, 0, seed=1)
        daemon.flush()
        with opened(daemon.path / "filling") as filling, opened(daemon.path / "sparse") as sparse:
            size = fill(filling, size, seed=1)
            for number in list(written)[:200]:
                written[number] = b"n" * BLOCK
                assert not refused(sparse, written[number], number * BLOCK), number
            holes = 0
            for number in range(1, length, 2):
                data = bytes([number % 13]) * BLOCK
                if not refused(sparse, data, number * BLOCK):
                    written[number] = data
                    holes += 1
            assert holes < length // 2
        deliver(daemon)
        check(backing / "filling", 1, size)
        with (backing / "sparse").open("rb") as file:
            for number in range(length):
                assert file.read(BLOCK) == written.get(number, bytes(BLOCK)), number


def test_what_is_owed_is_not_available(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    with nearly_full("ext4", tmp_path / "cached") as backing:
        daemon = make_daemon(backing, options=LAZY)
        with opened(daemon.path / "file") as fd:
            assert fill(fd, 0, seed=1, limit=4 << 20) == 4 << 20
        assert daemon.status()["space"]["owed_bytes"] == 4 << 20
        wait_until(lambda: available(daemon.path) == available(backing) - (4 << 20), "the same figures")
        deliver(daemon)


def test_others_fill_the_backing_meanwhile(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    """Nothing is lost, it is said, what takes space is refused, reads go on; space comes back and all is delivered."""
    with nearly_full("ext4", tmp_path / "cached") as backing:
        daemon = make_daemon(backing, options=("dirty_age=3600",))
        with opened(daemon.path / "file") as fd:
            size = fill(fd, 0, seed=1, limit=8 << 20)
            assert size == 8 << 20
        with opened(backing / "intruder") as intruder:
            fill(intruder, 0, seed=2)
            os.fsync(intruder)
        daemon.unmount()
        daemon.options = ("dirty_age=0.1,retry_min=0.2,retry_max=600",)
        daemon.mount()
        wait_until(lambda: daemon.status()["writeback"]["failing_files"] == 1, "an error of writeback")
        with opened(daemon.path / "file") as fd, opened(daemon.path / "other") as other:
            assert refused(fd, b"x" * BLOCK, size)
            assert refused(other, b"x" * BLOCK, 0)
            assert not refused(fd, chunk(1, 0), 0)  # owed already
            check(daemon.path / "file", 1, size)
            (backing / "intruder").unlink()
            # Long before the 600 s that the file may otherwise wait for its next try.
            wait_until(lambda: daemon.status()["dirty_bytes"] == 0, "writeback")
            wait_until(lambda: not refused(other, b"x" * BLOCK, 0), "room")
        deliver(daemon)
        check(backing / "file", 1, size)
