"""What passes over one file and over many have in common: runs of adjacent blocks, and checksums."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from .cache import Cache

RUN_BLOCKS = 256  # 1 MiB per request: enough for any disk, and several requests of a pass overlap
VERIFY_STRIDE = 128  # blocks between two looks at the loop: 40 to 120 us of checksums


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
