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
    found: list[int] = []
    for at in range(0, len(slots), VERIFY_STRIDE):
        await trio.lowlevel.checkpoint()
        starts = (slots[at : at + VERIFY_STRIDE].astype(np.int64) * size).tolist()
        found += [xxh3_64_intdigest(data[start : start + size]) for start in starts]
    good: npt.NDArray[np.bool_] = expected == np.array(found, np.uint64)
    return good
