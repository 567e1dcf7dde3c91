"""The backing breaks in mid-writeback: it fills up, becomes read-only, is shut down, or its device is cut off.

Each time: what was acknowledged, before the fault and in it, is there; fsync and status tell; the daemon is killed in
the fault and started in the fault; once the backing is whole again, everything arrives, with nothing done by hand.
``make storm FAULTS=20`` repeats each fault so often.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import os
import random
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from storm_writers import Content, Write, write_whole
from support_daemon import Daemon, MakeDaemon, make_daemon, wait_until
from support_fs import drop_caches, loop_mounted, run

__all__ = ["make_daemon"]
ROUNDS = int(os.environ.get("CACHEFSD_FAULTS", "") or 1)
BLOCK = 4096
BLOCKS = 2048
OPTIONS = ("dirty_age=0.05,retry_min=0.1,retry_max=0.2",)

SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN and XFS_IOC_GOINGDOWN"""
WITHOUT_LOG_FLUSH = 2
LOOP_GET_STATUS64, LOOP_SET_STATUS64 = 0x4C05, 0x4C04
LOOP_INFO64_SIZE, SIZE_LIMIT_AT = 232, 32


class Disk:
    """A file system on a loop device, which can be broken and repaired."""

    errors: tuple[int, ...] = (errno.EIO, errno.EROFS)
    kind = "ext4"
    size_mib: int | None = None
    tells_attributes = True
    """Even a broken one still answers stat(2), which the kernel wants before a read of the mount."""

    def __init__(self, mountpoint: Path) -> None:
        self.path = mountpoint
        self._image = mountpoint.parent / f"{self.kind}.img"

    def strike(self) -> None:
        raise NotImplementedError

    def heal(self) -> None:
        """Mount it again, as an administrator does. Nobody may use it."""
        run("umount", self.path)
        # A mount namespace that somebody else has made meanwhile keeps it, and what is broken stays so.
        wait_until(lambda: not run("losetup", "--associated", self._image), "the end of the broken file system")
        if self.kind == "ext4":
            checked = subprocess.run(["e2fsck", "-p", self._image], capture_output=True, check=False)
            assert checked.returncode in (0, 1), checked.stdout
        run("mount", "-o", "loop", self._image, self.path)


class Aborted(Disk):
    """Read-only from one moment to the next, as after an error in its metadata."""

    errors = (errno.EROFS, errno.EIO)

    def strike(self) -> None:
        run("mount", "-o", "remount,abort", self.path)


class ShutDown(Disk):
    """What was not synced is lost, as in a power cut."""

    def strike(self) -> None:
        fd = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(fd, SHUTDOWN, struct.pack("I", WITHOUT_LOG_FLUSH))
        finally:
            os.close(fd)


class XfsShutDown(ShutDown):
    kind = "xfs"
    tells_attributes = False


class CutOff(Disk):
    """Reads and writes beyond the first MiB of the device fail."""

    def strike(self) -> None:
        self._device = run("findmnt", "-no", "SOURCE", "--mountpoint", self.path).strip()
        self._limit(1 << 20)

    def heal(self) -> None:
        self._limit(0)
        super().heal()

    def _limit(self, size: int) -> None:
        with open(self._device, "rb") as device:
            info = bytearray(LOOP_INFO64_SIZE)
            fcntl.ioctl(device, LOOP_GET_STATUS64, info)
            struct.pack_into("<Q", info, SIZE_LIMIT_AT, size)
            fcntl.ioctl(device, LOOP_SET_STATUS64, bytes(info))


class XfsCutOff(CutOff):
    kind = "xfs"
    tells_attributes = False


class Full(Disk):
    """Something else has taken the space."""

    errors = (errno.ENOSPC,)
    size_mib = 32

    def strike(self) -> None:
        with (self.path / "filler").open("wb", buffering=0) as file, contextlib.suppress(OSError):
            while True:
                file.write(bytes(BLOCK))

    def heal(self) -> None:
        (self.path / "filler").unlink()


DISKS = [Full, Aborted, ShutDown, XfsShutDown, CutOff, XfsCutOff]


class Held:
    """A file that is open all the time, and what was acknowledged of it."""

    def __init__(self, path: Path, rng: random.Random) -> None:
        self.path = path
        self.content = Content(1)
        self.refused = False
        """A write has failed, and there have been no others since."""
        self._rng = rng
        self._written: set[int] = set()
        self._fds: list[int] = []

    def open(self) -> None:
        self._fds = [os.open(self.path, os.O_RDWR | flags, 0o600) for flags in (os.O_CREAT, os.O_DIRECT)]

    def close(self) -> None:
        while self._fds:
            with contextlib.suppress(OSError):
                os.close(self._fds.pop())

    def write(self, count: int, allowed: tuple[int, ...] = ()) -> None:
        """Write whole blocks in ``count`` places; with one of the ``allowed`` errors that may be refused."""
        for _ in range(0 if self.refused else count):
            offset = self._rng.randrange(BLOCKS) * BLOCK
            data = self.content.image(offset, self._rng.choice([1, 1, 4, 16]) * BLOCK)
            try:
                self.content.attempt(Write(offset, data), functools.partial(write_whole, self._fds[0], data, offset))
            except OSError as error:
                if error.errno not in allowed:
                    raise
                self.refused = True
                return
            self._written.update(range(offset // BLOCK, (offset + len(data)) // BLOCK))

    def check_written(self) -> None:
        """What was written is there, and comes from the daemon rather than from the kernel's pages. What was not
        written are holes, which only the backing knows."""
        for block in self._written if not self.refused else ():
            found = bytearray(BLOCK)
            assert os.preadv(self._fds[1], [found], block * BLOCK) == BLOCK
            self.content.verify(found, block * BLOCK, BLOCK, self.path.name)

    def check(self, path: Path) -> None:
        """Everything is as it must be; of a write that was refused, each block may be there."""
        self.content.settle(path.read_bytes(), self.path.name)
        self.refused = False

    def fsync_error(self) -> int | None:
        try:
            os.fsync(self._fds[0])
        except OSError as error:
            return error.errno
        return None


@pytest.fixture(params=DISKS, ids=lambda disk: disk.__name__)
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    kind: type[Disk] = request.param
    with loop_mounted(kind.kind, tmp_path, size_mib=kind.size_mib) as mountpoint:
        yield kind(mountpoint)


def failing(daemon: Daemon) -> bool:
    return bool(daemon.ask("status")["writeback"]["errors"])


def clean(daemon: Daemon) -> bool:
    return bool(daemon.ask("status")["dirty_bytes"] == 0)


@pytest.mark.timeout(600 + 100 * ROUNDS)
def test_a_fault_in_mid_writeback(disk: Disk, make_daemon: MakeDaemon, rng: random.Random) -> None:
    print(f"make storm KILLS=0 RACES=0 FAULTS={ROUNDS} SEED={os.environ.get('CACHEFSD_SEED', '')}")
    daemon = make_daemon(disk.path, options=OPTIONS, mount=False)
    held = Held(daemon.path / "file", rng)
    for number in range(ROUNDS):
        print(f"round {number}")
        daemon.start_and_wait()
        held.open()
        try:
            strike_and_kill(disk, daemon, held, rng)
        finally:
            daemon.abort()
            held.close()
        start_in_the_fault(daemon, rng)
        disk.heal()
        arrives(disk, daemon, held)


def strike_and_kill(disk: Disk, daemon: Daemon, held: Held, rng: random.Random) -> None:
    held.write(200)
    if rng.random() < 0.5:
        daemon.ask("flush")
        held.write(200)
    done = daemon.ask("status")["writeback"]["bytes"]
    wait_until(lambda: daemon.ask("status")["writeback"]["bytes"] > done or clean(daemon), "writeback")
    held.write(rng.randrange(50))
    disk.strike()
    while not failing(daemon) and not held.refused:
        held.write(10, disk.errors)
    if not held.refused:
        wait_until(lambda: held.fsync_error() in disk.errors, "an fsync that tells")
        back = daemon.ask("status")["writeback"]
        assert back["errors"] > 0
        assert held.path.name in back["last_error"]
        assert any(os.strerror(code) in back["last_error"] for code in disk.errors)
        assert not clean(daemon)
    held.write(50, disk.errors)
    if disk.tells_attributes:
        held.check_written()
    daemon.kill()


def start_in_the_fault(daemon: Daemon, rng: random.Random) -> None:
    """It serves, or it says in one line why it can't; and is killed again."""
    child = daemon.start()
    wait_until(lambda: child.poll() is not None or daemon.is_served_by(child), "a start in the fault")
    if child.poll() is None and rng.random() < 0.7:
        wait_until(lambda: failing(daemon) or clean(daemon), "a try of writeback after the restart")
    daemon.abort()
    child.kill()
    child.wait()
    assert "Traceback" not in daemon.stderr.read_text()


def arrives(disk: Disk, daemon: Daemon, held: Held) -> None:
    daemon.start_and_wait()
    held.open()
    held.check(held.path)
    wait_until(lambda: clean(daemon), "the data's arrival")
    assert held.fsync_error() in (None, *disk.errors)  # of a try before everything was well
    assert held.fsync_error() is None
    held.close()
    daemon.unmount()
    drop_caches()
    held.check(disk.path / held.path.name)
