"""Whether a directory is the backing that a cache belongs to."""

from __future__ import annotations

import os
import struct
from typing import NamedTuple

from cachefsd.backing import syscalls
from cachefsd.backing.tree import Tree

_FIXED = struct.Struct("<QQ16s")  # file system type, f_fsid, UUID (zeros: not known); then the root's handle
_MASK = (1 << 64) - 1


class _Evidence(NamedTuple):
    type: int
    fsid: int
    uuid: bytes
    handle: bytes


def identify(tree: Tree) -> bytes:
    """Evidence of what the tree is, to be compared by :func:`same`."""
    uuid = syscalls.file_system_uuid(tree.lock_fd)
    fsid = os.statvfs(tree.root_fd).f_fsid
    kind = syscalls.file_system_type(tree.root_fd)
    return _FIXED.pack(kind & _MASK, fsid & _MASK, uuid) + tree.root.handle


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
