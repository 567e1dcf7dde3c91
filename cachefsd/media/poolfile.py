"""The cache directory and its pool file: creating it, and owning it."""

from __future__ import annotations

import fcntl
import os
import stat
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachefsd.errors import ForeignError, InUseError, UserError
from cachefsd.media.mapping import memory_file_system
from cachefsd.media.superblock import MAX_SLOTS, Geometry, Superblock, SuperblockPair, valid_block_size

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


def pool_path(cache: Path) -> Path:
    """Where the pool of the cache directory ``cache`` is."""
    return cache / "pool"


def create_pool(
    cache: Path, size_bytes: int, block_size: int = 4096, *, volatile: bool, progress: Progress | None = None
) -> PoolInfo:
    """Make the cache directory and format a pool file of exactly ``size_bytes`` in it.

    Every byte is written, so that no store into the map ever has to wait for the file system to allocate.
    A pool file that holds anything but zeros (an interrupted format leaves only those) is not touched.

    :raises UserError: it can't be done; a pool file that this call has begun is gone again.
    """
    geometry = _plan(size_bytes, block_size)
    path = pool_path(cache)
    try:
        cache.mkdir(mode=0o700, parents=True, exist_ok=True)
        cache.chmod(0o700)
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise UserError(f"{path}: can't create the pool: {error.strerror}") from error
    try:
        lock_pool(fd, cache)
        _require_unused(fd, path)
        _require_room(fd, path, size_bytes, volatile)
        try:
            superblock = Superblock(pool_uuid=uuid.uuid4().bytes, geometry=geometry)
            _format(fd, cache, superblock, progress)
        except OSError as error:
            path.unlink()
            raise UserError(f"{path}: can't format the pool: {error.strerror}") from error
    finally:
        os.close(fd)
    return PoolInfo(path, superblock.pool_uuid, size_bytes, block_size, geometry.slots)


def lock_pool(fd: int, cache: Path) -> None:
    """Become the owner of the open pool file, until ``fd`` and every map of it are closed.

    :raises InUseError: somebody else is.
    """
    note = cache / "lock"  # says who the owner is; the lock itself is on the pool file
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        try:
            holder = f" (process {int(note.read_text())})"
        except (OSError, ValueError):
            holder = ""
        raise InUseError(f"{cache}: the cache is in use by another daemon{holder}") from error
    with open(os.open(note, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(f"{os.getpid()}\n")


def sync_directory(path: Path) -> None:
    """Make the names in the directory ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


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
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        raise ForeignError(f"{path}: not a regular file")
    zeros = bytes(_ZEROS_SIZE)
    offset = 0
    while piece := os.pread(fd, _ZEROS_SIZE, offset):
        if piece != zeros[: len(piece)]:
            raise UserError(f"{path}: there is a pool or something else already; remove it first")
        offset += len(piece)


def _require_room(fd: int, path: Path, size: int, volatile: bool) -> None:
    if (memory := memory_file_system(fd)) and not volatile:
        _remove_if_empty(fd, path)
        raise UserError(f"{path}: nothing on {memory} survives a power cut; ask for that (volatile)")
    usage = os.statvfs(fd)
    free = usage.f_bavail * usage.f_frsize + os.fstat(fd).st_blocks * 512
    if free < size:
        _remove_if_empty(fd, path)
        raise UserError(f"{path}: the pool needs {size} bytes, the file system has {free} free")


def _remove_if_empty(fd: int, path: Path) -> None:
    if os.fstat(fd).st_size == 0:
        path.unlink()


def _format(fd: int, cache: Path, superblock: Superblock, progress: Progress | None) -> None:
    size = superblock.geometry.file_size
    os.fchmod(fd, 0o600)
    os.ftruncate(fd, size)
    os.posix_fallocate(fd, 0, size)
    zeros = memoryview(bytes(_ZEROS_SIZE))
    done = 0
    while done < size:
        done += os.pwrite(fd, zeros[: size - done], done)
        if progress:
            progress(done, size)
    os.fsync(fd)
    sync_directory(cache)
    sync_directory(cache.parent)
    SuperblockPair.format(fd, superblock)
