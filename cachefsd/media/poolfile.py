"""The pool file, or what stands for it when the pool is on a device: creating it, and owning it."""

from __future__ import annotations

import contextlib
import errno
import os
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cachefsd.errors import InUseError, UserError
from cachefsd.media.cachedir import READ_ONLY, PrivateDirectory, lock, sync_directory
from cachefsd.media.daxdevice import examine
from cachefsd.media.extents import allocate_in_place, require_allocated
from cachefsd.media.mapping import memory_file_system
from cachefsd.media.medium import DeviceMedium, FileMedium, Medium
from cachefsd.media.poolrecord import RECORD_MAGIC, PoolRecord
from cachefsd.media.superblock import (
    DATA_ALIGNMENT,
    HEADER_OFFSET,
    MAGIC,
    MAX_SLOTS,
    SUPERBLOCK_SIZE,
    Geometry,
    Superblock,
    SuperblockPair,
    require_byte_order,
    valid_block_size,
)

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
    cache: Path,
    size_bytes: int | None,
    block_size: int = 4096,
    *,
    device: Path | None = None,
    volatile: bool,
    progress: Progress | None = None,
) -> PoolInfo:
    """Make the cache directory and format a pool of exactly ``size_bytes``: a file in it, or on a device.

    ``device`` is one of device-dax, all of which is used unless a size is given. Every byte is written, so that no
    store into the map ever has to wait for the file system to allocate. A pool file that holds anything but zeros
    (an interrupted format leaves only those) is not touched, nor is a device that begins with something else.

    :raises UserError: it can't be done; a pool file that this call has begun is gone again.
    """
    geometry = plan_pool(size_bytes, block_size, device)
    path = cache / POOL
    try:
        with contextlib.ExitStack() as undo:
            target = undo.enter_context(contextlib.closing(DeviceMedium(device))) if device is not None else None
            directory = undo.enter_context(PrivateDirectory.create(cache))
            file = undo.enter_context(contextlib.closing(FileMedium(open_locked(directory, os.O_CREAT), path)))
            _require_unused(file, file.size)
            superblock = Superblock(pool_uuid=uuid.uuid4().bytes, geometry=geometry)
            try:
                require_durable(file.fd, path, volatile=volatile)
                if target is None:
                    allocate_in_place(file.fd, path)
                    _require_room(file, geometry.file_size)
                else:
                    _require_unused(target, DATA_ALIGNMENT)
            except UserError:
                if file.size == 0:
                    os.unlink(POOL, dir_fd=directory.fd)
                raise
            _format(file, target, directory, superblock, progress)
    except OSError as error:
        raise UserError(f"{path}: can't create the pool: {error.strerror}") from error
    return PoolInfo(
        target.path if target else path, superblock.pool_uuid, geometry.file_size, block_size, geometry.slots
    )


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


def require_durable(fd: int, path: Path, *, volatile: bool) -> str | None:
    """See that the file ``fd`` does not live in memory only, unless ``volatile`` admits that: then in which kind.

    :raises UserError: it does.
    """
    memory = memory_file_system(fd)
    if memory and not volatile:
        raise UserError(f"{path}: nothing on {memory} survives a power cut; ask for that (volatile)")
    return memory


def erase(device: Medium) -> None:
    """Make a pool on a device none any more, durably.

    :raises OSError: from the media.
    """
    # The superblocks first: never a pool that is valid and has lost what it held.
    for start, end in ((0, HEADER_OFFSET), (HEADER_OFFSET, DATA_ALIGNMENT)):
        device.write(bytes(end - start), start)
        device.sync()


def is_unused(medium: Medium, size: int) -> bool:
    """Whether the first ``size`` bytes are zeros.

    :raises OSError: from the media.
    """
    for offset in range(0, size, _ZEROS_SIZE):
        piece = bytearray(min(_ZEROS_SIZE, size - offset))
        medium.read(piece, offset)
        if piece.strip(b"\0"):
            return False
    return True


def may_be_pool(path: Path) -> bool:
    """Whether the file ``path`` begins as a pool does, be it damaged or unfinished, or cannot be read. Changes nothing.

    To open a file as a pool takes the rights of others away, which must not happen to somebody's file.
    """
    try:
        fd = os.open(path, READ_ONLY)
        try:
            start = os.pread(fd, HEADER_OFFSET, 0)
        finally:
            os.close(fd)
    except OSError as error:
        return error.errno in (errno.EIO, errno.EACCES, errno.EPERM)
    magics = (start[:8], start[SUPERBLOCK_SIZE:][:8])
    return not start.strip(b"\0") or bool({MAGIC, RECORD_MAGIC} & set(magics))


def plan_pool(size: int | None, block_size: int, device: Path | None) -> Geometry:
    """The layout of a pool that is to be created; nothing is opened.

    :raises UserError: there can't be such a pool.
    """
    require_byte_order(device or "pool")
    if not valid_block_size(block_size):
        raise UserError(f"block size {block_size}: it must be a power of two from 4 KiB to 1 MiB")
    if device is not None:
        facts = examine(device)
        size = facts.size if size is None else size
        if size > facts.size:
            raise UserError(f"{device}: the pool needs {size} bytes, the device has {facts.size}")
        if size % facts.alignment:
            raise UserError(f"pool size {size}: on {device} it must be a multiple of {facts.alignment} bytes")
    assert size is not None
    geometry = Geometry.fit(size, block_size)
    if geometry.slots < 1:
        smallest = Geometry.smallest(block_size) >> 10
        raise UserError(f"pool size {size}: too small for a single block; the smallest pool has {smallest}K")
    if geometry.slots > MAX_SLOTS:
        raise UserError(f"pool size {size}: too many blocks of {block_size} bytes; choose larger blocks")
    return geometry


def _require_unused(medium: Medium, size: int) -> None:
    if not is_unused(medium, size):
        raise UserError(f"{medium.path}: there is a pool or something else already; remove it first")


def _require_room(file: FileMedium, size: int) -> None:
    usage = os.statvfs(file.fd)
    free = usage.f_bavail * usage.f_frsize + os.fstat(file.fd).st_blocks * 512
    if free < size:
        raise UserError(f"{file.path}: the pool needs {size} bytes, the file system has {free} free")


def _format(
    file: FileMedium,
    device: DeviceMedium | None,
    directory: PrivateDirectory,
    superblock: Superblock,
    progress: Progress | None,
) -> None:
    size = superblock.geometry.file_size
    try:
        if device is None:
            os.ftruncate(file.fd, size)
            os.posix_fallocate(file.fd, 0, size)
            _fill(file, size, progress)
            require_allocated(file.fd, size)
        else:
            _fill(device, size, progress)
            _note_device(file, PoolRecord(device.path, superblock.pool_uuid))
        directory.sync()
        sync_directory(directory.path.parent)
        SuperblockPair.format(device or file, superblock)
    except OSError as error:
        os.unlink(POOL, dir_fd=directory.fd)
        raise UserError(f"{directory.path / POOL}: can't format the pool: {error.strerror}") from error


def _fill(medium: Medium, size: int, progress: Progress | None) -> None:
    zeros = memoryview(bytes(_ZEROS_SIZE))
    for offset in range(0, size, _ZEROS_SIZE):
        medium.write(zeros[: size - offset], offset)
        if progress:
            progress(min(offset + _ZEROS_SIZE, size), size)
    medium.sync()


def _note_device(file: FileMedium, record: PoolRecord) -> None:
    os.ftruncate(file.fd, 0)
    file.write(record.pack(), 0)
    file.sync()
