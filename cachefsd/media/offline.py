"""A look at a cache that changes nothing: no lock, no mode, no repair. A daemon may use it meanwhile.

What a daemon is changing at that moment may be seen half done: the numbers are then of about now.
"""

from __future__ import annotations

import errno
import mmap
import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cachefsd.errors import UserError
from cachefsd.media.catalog import peek_paths
from cachefsd.media.daxdevice import examine
from cachefsd.media.header import HEADER_SIZE, WORDS_PER_HEADER, HeaderCodec, blank_headers
from cachefsd.media.medium import FileMedium, Medium
from cachefsd.media.poolfile import POOL
from cachefsd.media.poolrecord import RECORD_SIZE, PoolRecord
from cachefsd.media.ports import CatalogError, SlotState
from cachefsd.media.superblock import Superblock, SuperblockPair

_SCAN_SLOTS = 1 << 16
_READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC


@dataclass(slots=True)
class Look:
    """What a cache holds; numbers are of slots where nothing else is said."""

    pool: Path
    """the file, or the device"""
    superblock: Superblock
    free: int = 0
    clean: int = 0
    dirty: int = 0
    quarantined: int = 0
    """of blocks whose data is lost"""
    damaged: int = 0
    """whose headers are unreadable: nobody knows what they hold"""
    complete: bool = True
    """False: the time was over before all slots were counted; there may be more"""
    used_by: int | None = None
    """the process that has locked the pool"""
    dirty_files: dict[int, int] = field(default_factory=dict)
    """dirty slots by file id"""


def look(cache: Path, deadline: float | None = None) -> Look:
    """Look at the cache in the directory ``cache``; not longer than until ``deadline``, of ``time.monotonic``.

    :raises UserError: there is none, or it cannot be read.
    """
    path = cache / POOL
    try:
        with _open(path) as medium:
            superblock = SuperblockPair.load(medium).current
            found = Look(medium.path, superblock, used_by=_locked_by(path))
            _count(medium, found, deadline)
            return found
    except FileNotFoundError:
        raise UserError(f"there is no cache in {cache}") from None
    except OSError as error:
        raise UserError(f"{path}: can't read the pool: {error.strerror}") from error


def paths_of(cache: Path, found: Look) -> dict[int, bytes]:
    """The paths of the files with dirty slots, as the catalog knows them; none of it while a daemon uses it."""
    if found.used_by is not None:
        return {}
    with suppress(CatalogError):
        return peek_paths(cache, found.superblock.pool_uuid, set(found.dirty_files))
    return {}


@contextmanager
def _open(path: Path) -> Iterator[Medium]:
    with closing(FileMedium(os.open(path, _READ_ONLY), path)) as file:
        raw = bytearray(RECORD_SIZE)
        record = PoolRecord.unpack(bytes(raw[: file.read(raw, 0)]), path)
        if record is None:
            yield file
            return
        with closing(_DeviceReader(record.device)) as device:
            yield device


class _DeviceReader:
    """A device of device-dax, mapped for reading."""

    def __init__(self, path: Path) -> None:
        facts = examine(path)
        self.path = path
        self.size = facts.size
        self.bad = facts.bad
        self.fd = os.open(path, _READ_ONLY)
        try:
            self._map = mmap.mmap(self.fd, facts.size, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            os.close(self.fd)
            raise

    def holds(self, size: int) -> bool:
        return size <= self.size

    def read(self, buffer: bytearray | memoryview, offset: int) -> int:
        end = min(offset + len(buffer), self.size)
        if any(part.start < end and offset < part.stop for part in self.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        memoryview(buffer)[: end - offset] = self._map[offset:end]
        return end - offset

    def write(self, data: bytes | memoryview, offset: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)


def _count(medium: Medium, found: Look, deadline: float | None) -> None:
    geometry = found.superblock.geometry
    codec = HeaderCodec(found.superblock.pool_uuid, geometry.block_size)
    buffer = np.empty(min(_SCAN_SLOTS, geometry.slots) * HEADER_SIZE, np.uint8)
    owners: Counter[int] = Counter()
    for first in range(0, geometry.slots, _SCAN_SLOTS):
        if deadline is not None and time.monotonic() > deadline:
            found.complete = False
            break
        count = min(_SCAN_SLOTS, geometry.slots - first)
        headers, part = blank_headers(first, count), buffer[: count * HEADER_SIZE]
        try:
            medium.read(part.data, geometry.header_offset + first * HEADER_SIZE)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            found.damaged += count
            continue
        codec.check(part.view("<u8").reshape(-1, WORDS_PER_HEADER), headers, 0)
        good = ~headers.malformed
        found.damaged += int(np.count_nonzero(headers.malformed))
        dirty = good & (headers.state == SlotState.DIRTY)
        found.dirty += int(np.count_nonzero(dirty))
        found.clean += int(np.count_nonzero(good & (headers.state == SlotState.CLEAN)))
        found.free += int(np.count_nonzero(good & (headers.state == SlotState.FREE)))
        found.quarantined += int(np.count_nonzero(good & (headers.state == SlotState.QUARANTINED)))
        ids, numbers = np.unique(headers.file_id[dirty], return_counts=True)
        owners.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
    found.dirty_files = dict(owners)


def _locked_by(path: Path) -> int | None:
    """The process that has locked the pool. To try the lock would keep a daemon from it that starts right now."""
    status = path.lstat()
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, access, pid, where, *_ = line.replace("->", "").split()
            if (kind, access, where) == ("FLOCK", "WRITE", place):
                return int(pid)
    return None
