"""A pool as its medium has it: superblock, headers and blocks, read without a map. Nothing is stored."""

from __future__ import annotations

import errno
import os
import time
from collections import Counter
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

import numpy as np

from cachefsd.errors import ForeignError, UserError
from cachefsd.media.cachedir import READ_ONLY
from cachefsd.media.header import HEADER_SIZE, WORDS_PER_HEADER, HeaderCodec, blank_headers
from cachefsd.media.medium import DeviceReader, FileMedium, Medium
from cachefsd.media.poolfile import POOL
from cachefsd.media.poolrecord import PoolRecord
from cachefsd.media.ports import U8, Buffer, Headers, Holding, SlotState
from cachefsd.media.superblock import Superblock, SuperblockPair

_SCAN_CHUNK = 1 << 20  # 16384 headers and what is computed from them stay in the CPU's cache
_POISON_UNIT = 4096
_COUNTED_AT_ONCE = 1 << 16


@dataclass(slots=True)
class Counts:
    """How many slots of a pool hold what; see :class:`cachefsd.media.ports.Holding`."""

    free: int = 0
    clean: int = 0
    dirty: int = 0
    lost: int = 0
    set_aside: int = 0
    unknown: int = 0
    complete: bool = True
    """False: the time was over before all slots were counted; there may be more"""
    dirty_files: dict[int, int] = field(default_factory=dict)
    """dirty slots by file id"""

    @property
    def out_of_use(self) -> int:
        """Slots that are neither free nor hold anything that can be read."""
        return self.lost + self.set_aside + self.unknown


class PoolReader:
    """What can be known of a pool on an open medium without a change.

    ``uuid`` is that of the format, ``was_clean`` says whether the last owner left nothing to recover.
    """

    def __init__(self, medium: Medium, superblocks: SuperblockPair, resources: ExitStack) -> None:
        """``resources``, the medium and what else was opened, are closed together with the pool."""
        superblock = superblocks.current
        geometry = superblock.geometry
        self._medium = medium
        self._resources = resources
        self._superblocks = superblocks
        self._codec = HeaderCodec(superblock.pool_uuid, geometry.block_size)
        self._header_offset = geometry.header_offset
        self._data_offset = geometry.data_offset

        self.place = os.fspath(medium.path)
        self.size = geometry.file_size
        self.block_size = geometry.block_size
        self.slots = geometry.slots
        self.uuid = superblock.pool_uuid
        self.was_clean = superblock.clean

    @property
    def superblock(self) -> Superblock:
        """The superblock in force."""
        return self._superblocks.current

    @property
    def identity(self) -> bytes:
        """Which backing the pool belongs to; empty until :meth:`bind`."""
        return self._superblocks.current.identity

    @property
    def path_hint(self) -> bytes:
        """Where that backing was, for people."""
        return self._superblocks.current.path_hint

    def read(self, slot: int) -> Buffer:
        block = bytearray(self.block_size)
        if self._medium.read(block, self._data_offset + slot * self.block_size) != len(block):
            raise OSError(errno.EIO, "the pool has become shorter")
        return block

    def scan(self, first_slot: int, count: int) -> Headers:
        out = blank_headers(first_slot, count)
        buffer = np.empty(min(_SCAN_CHUNK, count * HEADER_SIZE), np.uint8)
        for at in range(0, count, _SCAN_CHUNK // HEADER_SIZE):
            part = buffer[: (count - at) * HEADER_SIZE]
            offset = self._header_offset + (first_slot + at) * HEADER_SIZE
            if not self._read(part, offset):
                self._scan_by_pieces(part, offset, out, at)
                continue
            self._codec.check(part.view("<u8").reshape(-1, WORDS_PER_HEADER), out, at)
            out.unreadable[at : at + len(part) // HEADER_SIZE] = False
        for bad in self._medium.bad:
            self._give_up_data(bad, out)
        return out

    def _scan_by_pieces(self, buffer: U8, offset: int, out: Headers, at: int) -> None:
        """Scan what surrounds the unreadable headers of a chunk."""
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _POISON_UNIT - (offset + done) % _POISON_UNIT]
            if self._read(part, offset + done):
                index = at + done // HEADER_SIZE
                self._codec.check(part.view("<u8").reshape(-1, WORDS_PER_HEADER), out, index)
                out.unreadable[index : index + len(part) // HEADER_SIZE] = False
            done += len(part)

    def _read(self, buffer: U8, offset: int) -> bool:
        """Fill ``buffer`` from the media; False if they can't be read."""
        try:
            return self._medium.read(buffer.data, offset) == len(buffer)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False

    def _give_up_data(self, bad: range, out: Headers) -> None:
        """Blocks that can't be read must never be loaded: what only the pool had is lost, other slots are set aside."""
        first = max((bad.start - self._data_offset) // self.block_size - out.first_slot, 0)
        end = -(-(bad.stop - self._data_offset) // self.block_size) - out.first_slot
        if end <= 0:
            return
        state, part = out.state[first:end], slice(first, end)
        owed = (state == SlotState.DIRTY) | (state == SlotState.QUARANTINED)
        out.unreadable[part] |= ~owed
        state[owed] = SlotState.QUARANTINED

    def count(self, deadline: float | None = None) -> Counts:
        """Count what the slots hold, by their headers; not longer than until ``deadline``, of ``time.monotonic``.

        :raises OSError: from the media.
        """
        counts = np.zeros(len(Holding), np.int64)
        owners: Counter[int] = Counter()
        complete = True
        for first in range(0, self.slots, _COUNTED_AT_ONCE):
            if deadline is not None and time.monotonic() > deadline:
                complete = False
                break
            headers = self.scan(first, min(_COUNTED_AT_ONCE, self.slots - first))
            holdings = headers.holdings()
            counts += np.bincount(holdings, minlength=len(Holding))
            ids, numbers = np.unique(headers.file_id[holdings == Holding.DIRTY], return_counts=True)
            owners.update(dict(zip(ids.tolist(), numbers.tolist(), strict=True)))
        free, clean, dirty, lost, set_aside, unknown = counts.tolist()
        return Counts(free, clean, dirty, lost, set_aside, unknown, complete, dict(owners))

    def close(self) -> None:
        """Close what was opened for it."""
        self._resources.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def open_readonly(cache: Path) -> PoolReader:
    """Open the pool of the cache directory ``cache`` to read it. Nothing is changed: no lock, no mode, no repair.

    A daemon may use it meanwhile. What that one is changing at that moment may be seen half done.

    :raises UserError: there is none, or it cannot be read.
    """
    path = cache / POOL
    with ExitStack() as undo:
        try:
            medium: Medium = undo.enter_context(closing(FileMedium(os.open(path, READ_ONLY), path)))
            record = PoolRecord.read(medium)
            if record is not None:
                medium = undo.enter_context(closing(DeviceReader(record.device)))
            return PoolReader(medium, load_superblocks(medium, record), undo.pop_all())
        except FileNotFoundError:
            raise UserError(f"there is no cache in {cache}") from None
        except OSError as error:
            raise UserError(f"{path}: can't read the pool: {error.strerror}") from error


def load_superblocks(medium: Medium, record: PoolRecord | None) -> SuperblockPair:
    """The superblocks of the pool on a medium; ``record`` says which pool it has to be.

    :raises OSError: from the media.
    :raises UserError: there is none, or it is not to be used as it is.
    """
    try:
        superblocks = SuperblockPair.load(medium)
    except ForeignError as error:
        if record is None:
            raise
        # What is in the directory is a record of ours.
        raise UserError(f"{error}: the device was formatted or made anew since") from error
    if record is not None and superblocks.current.pool_uuid != record.pool_uuid:
        raise UserError(f"{medium.path} holds another pool than that of the cache: it was formatted since")
    return superblocks
