"""Whether a directory is the backing that a cache belongs to."""

from __future__ import annotations

import hashlib
import os
import struct
from typing import NamedTuple

from cachefsd.backing import syscalls
from cachefsd.backing.tree import Tree
from cachefsd.filesystems import file_system_type

_FIXED = struct.Struct("<QQ16s")  # file system type, f_fsid, UUID (zeros: not known); then the root's handle
_MASK = (1 << 64) - 1
_HANDLE_MAX = 32
"""What a superblock has room for. The handles of overlayfs and NFS are longer."""
_DIGEST = b"\2"
"""The first byte of what stands for a longer handle. Those of :func:`handles.file_handle` begin with 0 or 1."""


class _Evidence(NamedTuple):
    type: int
    fsid: int
    uuid: bytes
    handle: bytes


def identify(tree: Tree) -> bytes:
    """Evidence of what the tree is, to be compared by :func:`same`."""
    uuid = syscalls.file_system_uuid(tree.lock_fd)
    fsid = os.statvfs(tree.root_fd).f_fsid
    kind = file_system_type(tree.root_fd)
    return _FIXED.pack(kind & _MASK, fsid & _MASK, uuid) + _short(tree.root.handle)


def _short(handle: bytes) -> bytes:
    """A handle, or a digest where it is too long. Both of two equal handles are kept in the same way."""
    if len(handle) <= _HANDLE_MAX:
        return handle
    return _DIGEST + hashlib.blake2b(handle, digest_size=_HANDLE_MAX - len(_DIGEST)).digest()


def same(a: bytes, b: bytes) -> bool:
    """Whether two pieces of evidence are of one tree.

    Its root must be the same inode, and on the same file system: by its UUID, which stays, or by its id,
    which may depend on the number of the device, where one of the kernels asked did not tell the UUID.
    """
    if len(a) < _FIXED.size or len(b) < _FIXED.size:
        return False
    one, other = _unpack(a), _unpack(b)
    if one.type != other.type or one.handle != other.handle:
        return False
    if any(one.uuid) and any(other.uuid):
        return one.uuid == other.uuid
    return one.fsid == other.fsid


def _unpack(evidence: bytes) -> _Evidence:
    kind, fsid, uuid = _FIXED.unpack_from(evidence)
    return _Evidence(kind, fsid, uuid, evidence[_FIXED.size :])
