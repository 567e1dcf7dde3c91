"""What a pass over one file and a group of many files have in common, in the order of their steps.

They collect and write blocks in ways of their own, as one is about large files and the other about small ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..backing.ports import BackingStat
from ..media.ports import Changes
from .cache import Cache
from .files import CachedFile

RUN_BLOCKS = 256  # 1 MiB per request: enough for any disk, and several requests of a pass overlap
VERIFY_STRIDE = 128  # blocks between two looks at the loop: 40 to 120 us of checksums


@dataclass(slots=True, eq=False)
class Part:
    """Dirty blocks of one file that are written and synced together: its lock is held, and their slots are pinned."""

    file: CachedFile
    blocks: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """ascending"""
    slots: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    """theirs, parallel"""
    failures_before: int = 0
    """How many syncs of the backing file had failed before."""
    touches: int = 0
    """How often users had changed the backing file before it was written; -1: more of the file follows at once."""
    mtime_ns: int = 0
    """which the backing file gets"""
    attr_seq: int = 0
    """The newest version that is older than that mtime."""


def edges_of(blocks: npt.NDArray[np.int64]) -> list[int]:
    """Where, among ascending ``blocks``, runs of adjacent ones begin, and their number."""
    index = np.arange(len(blocks))
    starts = np.ones(len(blocks), np.bool_)
    np.not_equal(blocks[1:] - blocks[:-1], 1, out=starts[1:])
    behind = index - np.maximum.accumulate(np.where(starts, index, 0))
    return [*np.flatnonzero(behind % RUN_BLOCKS == 0).tolist(), len(blocks)]


async def verified(cache: Cache, slots: npt.NDArray[np.int32]) -> npt.NDArray[np.bool_]:
    """Which of ``slots``, pinned, hold the data that their checksums say. Looks at the loop in between."""
    data, size = cache.data, cache.block_size
    expected = cache.pool.checksums_of(slots)
    seen = cache.slots.verified
    found: list[int] = []
    unread: list[int] = []
    """which of them are damaged, or can't be read: the others are in memory, where a load is safe"""
    for at in range(0, len(slots), VERIFY_STRIDE):
        await trio.lowlevel.checkpoint()
        for slot in slots[at : at + VERIFY_STRIDE].tolist():
            if seen[slot] or cache.integrity.intact(slot):
                found.append(xxh3_64_intdigest(data[slot * size : (slot + 1) * size]))
            else:
                found.append(0)
                unread.append(len(found) - 1)
    good: npt.NDArray[np.bool_] = expected == np.array(found, np.uint64)
    good[unread] = False
    return good


def lose_damaged(
    cache: Cache,
    file: CachedFile,
    blocks: npt.NDArray[np.int64],
    slots: npt.NDArray[np.int32],
    lost: npt.NDArray[np.bool_],
) -> None:
    """Set aside those of ``blocks`` that are ``lost``, as they are not as they were written (P5)."""
    for index in np.flatnonzero(lost).tolist():
        block, slot = int(blocks[index]), int(slots[index])
        if file.table.get(block) == slot:
            cache.integrity.lose(file, block, slot)


async def sync_names(cache: Cache, file: CachedFile) -> None:
    """POSIX lets a crash take a synced file whose name was not, and its clean blocks were the last that anybody had of
    it."""
    if file.unlinked:
        return
    if file.sync_names is not None:
        await file.sync_names()
    elif file.unnamed_since >= cache.syncs.done:
        await cache.syncs.sync_all()


def note_synced(cache: Cache, part: Part, stat: BackingStat) -> None:
    """The backing file looks like ``stat`` now that it is synced."""
    file = part.file
    kept_ns = cache.kept_time(part.mtime_ns, stat.mtime_ns)
    if file.mtime_ns == part.mtime_ns:
        file.mtime_ns = kept_ns
    part.mtime_ns = kept_ns
    cache.records.note_stamp(file, stat, touches=part.touches, synced=not file.unlinked)
    file.backing_size = stat.size
    file.attr_seq = part.attr_seq


async def transact_records(cache: Cache, parts: Sequence[Part]) -> None:
    """One transaction of the catalog: what the files look like, and that their intents are done."""

    def changes() -> Changes:
        result = Changes()
        for part in parts:
            record = cache.records.record_of(part.file)
            record.mtime_ns = part.mtime_ns
            result.put.append(record)
            if part.file.intents:
                result.drop_intents.append((part.file.file_id, part.file.intents[-1].seq))
        return result

    await cache.records.transact(changes)
    for part in parts:
        part.file.intents.clear()
