"""What the kernel is told: errors and attributes."""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable, Coroutine
from typing import Any, Final, ParamSpec, TypeVar

from pyfuse3 import EntryAttributes, FUSEError, InodeT, ModeT

from cachefsd.core.faults import Faults
from cachefsd.fuse.inode import Inode
from cachefsd.times import clamp

P = ParamSpec("P")
T = TypeVar("T")

CACHE_S: Final = 300.0
"""How long the kernel may use names and attributes without asking: only its own requests change them."""
FAULTS: Final = Faults()
"""Requests that have failed by an exception that nobody expected. A process has one session at a time."""
_SECTOR = 512  # the unit of st_blocks


def reported(handler: Callable[P, Coroutine[Any, Any, T]]) -> Callable[P, Coroutine[Any, Any, T]]:
    """Turn a handler's errors into what pyfuse3 understands: another exception would end the session."""

    @functools.wraps(handler)
    async def wrapper(*args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await handler(*args, **kwargs)
        except FUSEError:
            raise
        except Exception as error:
            raise fuse_error(handler.__name__, error) from None

    return wrapper


def fuse_error(name: str, error: Exception) -> FUSEError:
    """What the caller of the handler ``name`` is told of ``error``; one that nobody expects is counted, and
    the first of its kind logged."""
    if isinstance(error, OSError):
        return FUSEError(error.errno or errno.EIO)
    FAULTS.note(name, error)
    return FUSEError(errno.EIO)


def attributes(inode: Inode, block_size: int) -> EntryAttributes:
    """What ``inode.stat`` says, with what the engine knows better."""
    status, file = inode.stat, inode.file
    entry = EntryAttributes()
    entry.st_ino = InodeT(inode.number)
    entry.generation = inode.generation
    entry.entry_timeout = entry.attr_timeout = CACHE_S
    entry.st_mode = ModeT(status.st_mode)
    entry.st_nlink = status.st_nlink
    entry.st_uid, entry.st_gid = status.st_uid, status.st_gid
    entry.st_rdev = status.st_rdev
    entry.st_blksize = status.st_blksize
    entry.st_atime_ns = max(clamp(status.st_atime_ns), inode.atime_ns)
    if file is None:
        entry.st_size, entry.st_blocks = status.st_size, status.st_blocks
        entry.st_mtime_ns, entry.st_ctime_ns = clamp(status.st_mtime_ns), clamp(status.st_ctime_ns)
    else:
        entry.st_size = file.size
        entry.st_blocks = max(status.st_blocks, file.dirty * (block_size // _SECTOR))
        entry.st_mtime_ns, entry.st_ctime_ns = file.mtime_ns, file.ctime_ns
    return entry


def no_entry() -> EntryAttributes:
    """That a name does not exist, for the kernel to remember."""
    nothing = EntryAttributes()
    nothing.st_ino = InodeT(0)
    nothing.entry_timeout = CACHE_S
    return nothing
