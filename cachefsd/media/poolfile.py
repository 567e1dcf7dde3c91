"""The pool file: creating it, and owning it."""

from __future__ import annotations

import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachefsd.errors import InUseError, UserError
from cachefsd.media.cachedir import PrivateDirectory, lock, sync_directory
from cachefsd.media.mapping import memory_file_system
from cachefsd.media.superblock import MAX_SLOTS, Geometry, Superblock, SuperblockPair, valid_block_size

POOL = "pool"
_ZEROS_SIZE = 8 << 20

Progress = Callable[[int, int], None]
"""``progress(done, total)``, both in bytes."""


@dataclass(frozen=True, slots=True)
class PoolInfo:
    """A pool as it was created; sizes in bytes."""

    path: Path
    uuid: bytes
    size: int
    block_size: int
    slots: int


def create_pool(
    cache: Path, size_bytes: int, block_size: int = 4096, *, volatile: bool, progress: Progress | None = None
) -> PoolInfo:
    """Make the cache directory and format a pool file of exactly ``size_bytes`` in it.

    Every byte is written, so that no store into the map ever has to wait for the file system to allocate.
    A pool file that holds anything but zeros (an interrupted format leaves only those) is not touched.

    :raises UserError: it can't be done; a pool file that this call has begun is gone again.
    """
    geometry = _plan(size_bytes, block_size)
    path = cache / POOL
    try:
        with PrivateDirectory.create(cache) as directory:
            fd = open_locked(directory, os.O_CREAT)
            try:
                _require_unused(fd, path)
                _require_room(fd, directory, size_bytes, volatile)
                superblock = Superblock(pool_uuid=uuid.uuid4().bytes, geometry=geometry)
                _format(fd, directory, superblock, progress)
            finally:
                os.close(fd)
    except OSError as error:
        raise UserError(f"{path}: can't create the pool: {error.strerror}") from error
    return PoolInfo(path, superblock.pool_uuid, size_bytes, block_size, geometry.slots)


def open_locked(directory: PrivateDirectory, flags: int = 0) -> int:
    """Open the pool file and become its owner, until the descriptor and every map of it are closed.

    :raises OSError: it cannot be opened.
    :raises UserError: somebody else owns it, or could have changed it.
    """
    fd = directory.open_file(POOL, os.O_RDWR | flags)
    try:
        lock(fd, directory)
        here = os.stat(POOL, dir_fd=directory.fd, follow_symlinks=False)
        if not os.path.samestat(os.fstat(fd), here):
            # What is served must be what the next one will find.
            raise InUseError(f"{directory.path}: the pool was replaced a moment ago")
        directory.sign()
    except BaseException:
        os.close(fd)
        raise
    return fd


def _plan(size: int, block_size: int) -> Geometry:
    if not valid_block_size(block_size):
        raise UserError(f"block size {block_size}: it must be a power of two from 4 KiB to 1 MiB")
    geometry = Geometry.fit(size, block_size)
    if geometry.slots < 1:
        raise UserError(f"pool size {size}: too small for a single block; give it 64 MiB or more")
    if geometry.slots > MAX_SLOTS:
        raise UserError(f"pool size {size}: too many blocks of {block_size} bytes; choose larger blocks")
    return geometry


def _require_unused(fd: int, path: Path) -> None:
    zeros = bytes(_ZEROS_SIZE)
    offset = 0
    while piece := os.pread(fd, _ZEROS_SIZE, offset):
        if piece != zeros[: len(piece)]:
            raise UserError(f"{path}: there is a pool or something else already; remove it first")
        offset += len(piece)


def _require_room(fd: int, directory: PrivateDirectory, size: int, volatile: bool) -> None:
    path = directory.path / POOL
    if (memory := memory_file_system(fd)) and not volatile:
        _remove_if_empty(fd, directory)
        raise UserError(f"{path}: nothing on {memory} survives a power cut; ask for that (volatile)")
    usage = os.statvfs(fd)
    free = usage.f_bavail * usage.f_frsize + os.fstat(fd).st_blocks * 512
    if free < size:
        _remove_if_empty(fd, directory)
        raise UserError(f"{path}: the pool needs {size} bytes, the file system has {free} free")


def _remove_if_empty(fd: int, directory: PrivateDirectory) -> None:
    if os.fstat(fd).st_size == 0:
        os.unlink(POOL, dir_fd=directory.fd)


def _format(fd: int, directory: PrivateDirectory, superblock: Superblock, progress: Progress | None) -> None:
    try:
        _fill(fd, superblock.geometry.file_size, progress)
        directory.sync()
        sync_directory(directory.path.parent)
        SuperblockPair.format(fd, superblock)
    except OSError as error:
        os.unlink(POOL, dir_fd=directory.fd)
        raise UserError(f"{directory.path / POOL}: can't format the pool: {error.strerror}") from error


def _fill(fd: int, size: int, progress: Progress | None) -> None:
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)
    zeros = memoryview(bytes(_ZEROS_SIZE))
    done = 0
    while done < size:
        done += os.pwrite(fd, zeros[: size - done], done)
        if progress:
            progress(done, size)
    os.fsync(fd)
