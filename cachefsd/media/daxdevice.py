"""Devices of device-dax: persistent memory as a character device that can be mapped, and nothing else."""

from __future__ import annotations

import fcntl
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cachefsd.errors import InUseError, UserError
from cachefsd.media.cachedir import make_private

_SYS_CHAR = Path("/sys/dev/char")
_DEV = Path("/dev")
_FLUSHED_BY_HOST = "virtio-pmem"
_SECTOR = 512  # of the kernel's lists of bad blocks, whatever the device has


@dataclass(frozen=True, slots=True)
class DeviceFacts:
    """What the kernel says of a device; in bytes."""

    size: int
    alignment: int
    """of what can be mapped"""
    bad: tuple[range, ...]
    """known media errors, by offset in the device"""


@dataclass(frozen=True, slots=True)
class DaxDevice(DeviceFacts):
    """A device that is open, and locked until ``fd`` and every map of it are closed."""

    fd: int


def open_device(path: Path) -> DaxDevice:
    """Open the device ``path`` and become its owner.

    :raises UserError: it is no persistent memory of device-dax, others can change it, or somebody uses it.
    """
    with _found(path) as (facts, found):
        fd = os.open(f"/proc/self/fd/{found}", os.O_RDWR | os.O_CLOEXEC)
    try:
        make_private(fd, path)
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(fd)
        raise InUseError(f"{path}: the device is in use by another cache") from error
    except BaseException:
        os.close(fd)
        raise
    return DaxDevice(facts.size, facts.alignment, facts.bad, fd)


def examine(path: Path) -> DeviceFacts:
    """What the kernel says of the device ``path``, which others may use.

    :raises UserError: it is no persistent memory of device-dax.
    """
    with _found(path) as (facts, _):
        return facts


@contextmanager
def _found(path: Path) -> Iterator[tuple[DeviceFacts, int]]:
    """A device and its O_PATH descriptor: for some devices to be opened has consequences."""
    try:
        fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            yield describe(os.fstat(fd), path), fd
        finally:
            os.close(fd)
    except OSError as error:
        raise UserError(f"{path}: can't open the device: {error.strerror}") from error


def describe(status: os.stat_result, path: Path) -> DeviceFacts:
    """What sysfs says of the device ``path``, whose status is ``status``.

    :raises OSError: from sysfs.
    :raises UserError: it can't hold a pool.
    """
    if not stat.S_ISCHR(status.st_mode):
        raise UserError(f"{path}: not a device of device-dax (as /dev/dax0.0 is)")
    link = _SYS_CHAR / f"{os.major(status.st_rdev)}:{os.minor(status.st_rdev)}"
    if _name_of(link / "subsystem") != "dax":
        raise UserError(f"{path}: not a device of device-dax (as /dev/dax0.0 is)")
    # ndbus0/region0/dax0.0 (the namespace)/dax0.0. Memory that is set aside but volatile has other parents.
    device = link.resolve(strict=True)
    namespace, region = device.parent, device.parent.parent
    if _name_of(region / "subsystem") != "nd" or _text(region / "devtype") != "nd_pmem":
        raise UserError(f"{path}: not persistent memory")
    if _text(region.parent / "provider") == _FLUSHED_BY_HOST:
        raise UserError(f"{path}: stores into {_FLUSHED_BY_HOST} are not durable before the host has flushed them")
    # Locks belong to nodes: two nodes of one device could be locked by two.
    node = _DEV / device.name
    if not os.path.samestat(os.stat(node, follow_symlinks=False), status):
        raise UserError(f"{path}: another node of {node}; use that one")
    size, alignment = int(_text(device / "size")), int(_text(device / "align"))
    return DeviceFacts(size, alignment, _bad_ranges(region, namespace, size))


def _bad_ranges(region: Path, namespace: Path, size: int) -> tuple[range, ...]:
    """The part of the region's list that concerns the namespace, whose data begins at its ``resource``."""
    lines = _text(region / "badblocks").splitlines()
    if not lines:
        return ()
    start = int(_text(namespace / "resource"), 0) - int(_text(region / "resource"), 0)
    found = []
    for line in lines:
        first, count = (int(word) * _SECTOR for word in line.split())
        begin, end = max(0, first - start), min(size, first + count - start)
        if begin < end:
            found.append(range(begin, end))
    return tuple(found)


def _name_of(link: Path) -> str:
    return os.path.basename(os.readlink(link))


def _text(path: Path) -> str:
    return path.read_text().strip()
