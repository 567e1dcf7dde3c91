"""Which kind of file system something is on."""

from __future__ import annotations

import os
from typing import Any, Final

import cffi

# linux/magic.h, and the sources of those that are not part of Linux
BCACHEFS: Final = 0xCA451A4E
BTRFS: Final = 0x9123683E
EXT: Final = 0xEF53  # ext2 to ext4
F2FS: Final = 0xF2F52010
FUSE: Final = 0x65735546
NILFS: Final = 0x3434
OVERLAY: Final = 0x794C7630
RAMFS: Final = 0x858458F6
TMPFS: Final = 0x01021994
XFS: Final = 0x58465342
ZFS: Final = 0x2FC12FC1

_ffi = cffi.FFI()
_ffi.cdef("struct statfs { long f_type; char rest[248]; }; int fstatfs(int, struct statfs *);")
_libc: Any = _ffi.dlopen(None)


def file_system_type(fd: int) -> int:
    """The magic number of the file system of ``fd``, which may be O_PATH.

    :raises OSError: from the kernel.
    """
    buffer: Any = _ffi.new("struct statfs *")
    if _libc.fstatfs(fd, buffer) < 0:
        raise OSError(_ffi.errno, os.strerror(_ffi.errno))
    return int(buffer.f_type)
