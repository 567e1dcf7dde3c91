"""Whether a store into the map of a pool file can fail for want of space: it must not, it would end the process.

So the file gets all of its space when it is made. That is void where the file system copies on write: then each store
takes new space.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from contextlib import suppress
from pathlib import Path

from cachefsd.errors import UserError
from cachefsd.filesystems import BCACHEFS, BTRFS, NILFS, ZFS, file_system_type

_COPY_ON_WRITE = {BTRFS: "btrfs", BCACHEFS: "bcachefs", ZFS: "zfs", NILFS: "nilfs"}
_FS_IOC_GETFLAGS, _FS_IOC_SETFLAGS = 0x80086601, 0x40086602  # linux/fs.h
_FS_NOCOW_FL = 0x00800000
_FLAGS = struct.Struct("=l")

_FS_IOC_FIEMAP = 0xC020660B  # linux/fiemap.h
_FIEMAP = struct.Struct("=QQIIII")  # start, length, flags, mapped, count, -
_EXTENT = struct.Struct("=QQQQQIIII")  # logical, physical, length, two reserved, flags, three reserved
_EXTENTS = 512  # of one call
_LAST, _SHARED = 0x1, 0x2000


def allocate_in_place(fd: int, path: Path) -> None:
    """Empty a pool file that is to be made, and see that its space will be its own for good.

    :raises UserError: its file system copies on write.
    """
    os.ftruncate(fd, 0)
    with suppress(OSError):  # btrfs takes the flag for empty files only
        if file_system_type(fd) == BTRFS:
            fcntl.ioctl(fd, _FS_IOC_SETFLAGS, _FLAGS.pack(_flags(fd) | _FS_NOCOW_FL))
    kind = _copies(fd)
    if kind:
        raise UserError(
            f"{path}: {kind} copies on write here, so a full disk could end the daemon; choose another file system"
        )


def require_allocated(fd: int, size: int) -> None:
    """See that a pool file of ``size`` bytes, all written and synced, has its space.

    :raises OSError: ENOSPC: the file system has left some of it out, for it was zeros.
    """
    if os.lseek(fd, 0, os.SEEK_HOLE) < size:
        raise OSError(errno.ENOSPC, "its file system does not keep space for zeros (compression?)")


def notes(fd: int, path: Path) -> list[str]:
    """What makes stores into an existing pool file need space: lines for people."""
    kind = _copies(fd)
    if kind:
        return [f"the pool {path} is on {kind}, which copies it on write: a full disk could end the daemon"]
    if _is_shared(fd):
        return [
            f"the pool {path} shares space with a copy or a snapshot: a full disk could end the daemon;"
            " a copy by cp --reflink=never in its place has space of its own"
        ]
    return []


def _copies(fd: int) -> str | None:
    """The kind of the file system of ``fd`` if it copies the file on write."""
    kind = file_system_type(fd)
    with suppress(OSError):
        if kind == BTRFS and _flags(fd) & _FS_NOCOW_FL:
            return None
    return _COPY_ON_WRITE.get(kind)


def _flags(fd: int) -> int:
    raw: bytes = fcntl.ioctl(fd, _FS_IOC_GETFLAGS, bytes(_FLAGS.size))
    flags: int = _FLAGS.unpack(raw)[0]
    return flags


def _is_shared(fd: int) -> bool:
    """Whether some of a file's space is that of another file as well, as far as the file system tells."""
    start, size = 0, os.fstat(fd).st_size
    while start < size:
        request = bytearray(_FIEMAP.pack(start, size - start, 0, 0, _EXTENTS, 0)) + bytes(_EXTENTS * _EXTENT.size)
        try:
            fcntl.ioctl(fd, _FS_IOC_FIEMAP, request)
        except OSError:
            return False
        mapped = _FIEMAP.unpack_from(request)[3]
        if not mapped:
            return False
        for logical, _, length, _, _, flags, *_ in _EXTENT.iter_unpack(
            request[_FIEMAP.size : _FIEMAP.size + mapped * _EXTENT.size]
        ):
            if flags & _SHARED:
                return True
            if flags & _LAST:
                return False
            start = logical + length
    return False
