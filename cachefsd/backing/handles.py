"""What finds an inode again: handles of the kernel, or what stands for them."""

from __future__ import annotations

import errno
import os
import struct

from cachefsd.backing import syscalls
from cachefsd.filesystems import BTRFS, EXT, file_system_type

_HANDLE = struct.Struct("<QQ")
_INO32_GEN, _BTRFS_WITHOUT_PARENT = 1, 0x4D  # types of handles
_NUMBER_AND_GENERATION, _BTRFS_NUMBER = struct.Struct("=II"), struct.Struct("=Q")
_ROOTS = {(EXT, 2), (BTRFS, 256)}


def file_handle(fd: int) -> bytes:
    """What finds the inode of a descriptor again: 1 and its kernel handle.

    Where the file system has none: 0, its number and its time of birth, which tell inodes apart but do not
    open them.
    """
    try:
        return b"\1" + syscalls.name_to_handle_at(fd)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EOVERFLOW):  # none, or longer than Linux takes back
            raise
        return b"\0" + _HANDLE.pack(os.fstat(fd).st_ino, syscalls.birth_ns(fd))


def handle_of_number(root: bytes, number: int) -> bytes:
    """A :func:`file_handle` that opens the inode of a number, of whatever generation; empty where there is none.

    ``root`` is that of a directory of the same file system. ext4 and btrfs have such handles.
    """
    kind, data = int.from_bytes(root[1:5], "little", signed=True), root[5:]
    if not can_open(root):
        return b""
    if kind == _INO32_GEN and len(data) == _NUMBER_AND_GENERATION.size and number < 1 << 32:
        return root[:5] + _NUMBER_AND_GENERATION.pack(number, 0)
    if kind == _BTRFS_WITHOUT_PARENT and len(data) == 20:  # number, subvolume, generation
        return root[:5] + _BTRFS_NUMBER.pack(number) + data[8:16] + bytes(4)
    return b""


def is_whole(fd: int) -> bool:
    """Whether a directory is known to be the root of its file system, or of its subvolume."""
    return (file_system_type(fd), os.fstat(fd).st_ino) in _ROOTS


def can_open(handle: bytes) -> bool:
    """Whether a :func:`file_handle` is one of the kernel's."""
    return handle[:1] == b"\1" and 5 < len(handle) <= 5 + syscalls.MAX_HANDLE_SIZE
