"""Disks to put backings on: the machine's own, and ext4 on a loop device, which can be made slow."""

from __future__ import annotations

import contextlib
import mmap
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MEMORY = Path("/dev/shm")
THROTTLE = Path("/sys/fs/cgroup/blkio")
PROBE_S = 0.4  # four slices of the throttle, which lets a slice's worth of requests pass at once
BLOCK = 4096


class Absent(Exception):
    """Something that a benchmark needs is not there; the text says what."""


@dataclass(frozen=True)
class Disk:
    """An empty directory, and the block device beneath it."""

    directory: Path
    device: str
    """major:minor"""

    @contextlib.contextmanager
    def slow(self, iops: int) -> Iterator[None]:
        """So many requests a second, reads and writes each, until the end of the block.

        :raises Absent: the machine has no blkio cgroup of version 1, or it does not hold us back.
        """
        files = [THROTTLE / f"blkio.throttle.{kind}_iops_device" for kind in ("read", "write")]
        if not all(file.exists() for file in files):
            raise Absent("no blkio cgroup of version 1 to slow a disk down with")
        self.sync()
        try:
            for file in files:
                file.write_text(f"{self.device} {iops}")
            self._require_slow(iops)
            yield
        finally:
            for file in files:
                file.write_text(f"{self.device} 0")

    def _require_slow(self, iops: int) -> None:
        count = max(1, round(PROBE_S * iops))
        path = self.directory.parent / "probe"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_DIRECT | os.O_DSYNC, 0o600)
        try:
            with mmap.mmap(-1, BLOCK) as page:
                os.pwrite(fd, page, 0)
                began = time.monotonic()
                for _ in range(count):
                    os.pwrite(fd, page, 0)
                took = time.monotonic() - began
        finally:
            os.close(fd)
        if took < count / iops / 2:
            raise Absent("the blkio throttle does not hold these processes back")

    def sync(self) -> None:
        """Everything of its file system to the device."""
        subprocess.run(["sync", "--file-system", self.directory], check=True)

    def bytes_written(self) -> int:
        """What the device has got since it was made."""
        return self._statistics()[6] * 512

    def requests(self) -> int:
        """Writes that the device has completed since it was made; some that were adjacent count as one."""
        return self._statistics()[4]

    def _statistics(self) -> list[int]:
        return [int(field) for field in Path(f"/sys/dev/block/{self.device}/stat").read_text().split()]


@contextlib.contextmanager
def machine_disk(base: Path) -> Iterator[Disk]:
    """A directory on the disk that ``base`` is on."""
    with tempfile.TemporaryDirectory(prefix="bench-disk-", dir=base) as name:
        device = os.stat(name).st_dev
        yield Disk(Path(name), f"{os.major(device)}:{os.minor(device)}")


@contextlib.contextmanager
def loop_disk(base: Path, size_mib: int) -> Iterator[Disk]:
    """A fresh ext4 on a loop device over a preallocated file; nothing of it is left afterwards.

    :raises Absent: we may not.
    """
    if os.geteuid() != 0:
        raise Absent("loop devices need root")
    with contextlib.ExitStack() as undo:
        place = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="bench-loop-", dir=base)))
        place.chmod(0o755)  # servers run as their own users
        image, mountpoint = place / "image", place / "mnt"
        mountpoint.mkdir()
        with image.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, size_mib << 20)
        _run("mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
        loop = _run("losetup", "--find", "--show", "--direct-io=on", image)
        undo.callback(_run, "losetup", "--detach", loop)
        _run("mount", loop, mountpoint)
        undo.callback(_run, "umount", "--lazy", mountpoint)
        directory = mountpoint / "disk"
        directory.mkdir()
        number = os.stat(loop).st_rdev
        yield Disk(directory, f"{os.major(number)}:{os.minor(number)}")


@contextlib.contextmanager
def memory(base: Path) -> Iterator[Path]:
    """An empty directory of a tmpfs, as root of one of its own with pages of 2 MiB: persistent memory is mapped by
    such pages, too. By pages of 4 KiB a write to a pool of 256 MiB took a fifth longer."""
    if os.geteuid() != 0:
        with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=MEMORY) as name:
            yield Path(name)
        return
    with tempfile.TemporaryDirectory(prefix="bench-memory-", dir=base) as name:
        _run("mount", "-t", "tmpfs", "-o", "huge=within_size", "tmpfs", name)
        try:
            yield Path(name)
        finally:
            _run("umount", "--lazy", name)


def drop_caches() -> None:
    """Make the kernel forget clean pages, dentries and inodes."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


def _run(*command: str | Path) -> str:
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.strip()
