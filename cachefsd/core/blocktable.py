"""Where the blocks of one file are: block number to slot."""

from __future__ import annotations

from array import array
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..runs import equal_runs

CHUNK_SHIFT = 8
CHUNK_BLOCKS = 1 << CHUNK_SHIFT  # 1 MiB of file at 4 KiB blocks: 1 KiB of table
CHUNK_MASK = CHUNK_BLOCKS - 1
ABSENT = -1
REGION_SHIFT = 12
REGION_CHUNKS = 1 << REGION_SHIFT  # 4 GiB of file: what is put in order at a time
_EMPTY_CHUNK = array("i", [ABSENT]) * CHUNK_BLOCKS + array("i", [0])  # last: how many are present


class BlockTable:
    """Block number → slot, in chunks: 4 bytes per block where the file is cached at all."""

    __slots__ = ("_regions", "cached", "chunks")

    def __init__(self) -> None:
        self.chunks: dict[int, array[int]] = {}
        self.cached = 0
        self._regions: dict[int, set[int]] | None = None
        """The numbers of the chunks by region, once there are more of them than one region has: to put all of a large
        table in order takes too long."""

    def get(self, block: int) -> int:
        """The slot of ``block`` or ABSENT."""
        chunk = self.chunks.get(block >> CHUNK_SHIFT)
        return ABSENT if chunk is None else chunk[block & CHUNK_MASK]

    def put(self, block: int, slot: int) -> int:
        """Note that ``slot`` holds ``block``; return the slot that held it, or ABSENT."""
        chunk = self.chunks.get(block >> CHUNK_SHIFT)
        if chunk is None:
            chunk = self._add(block >> CHUNK_SHIFT)
        index = block & CHUNK_MASK
        old = chunk[index]
        chunk[index] = slot
        if old < 0:
            self.cached += 1
            chunk[CHUNK_BLOCKS] += 1
        return old

    def get_run(self, first: int, count: int) -> array[int]:
        """:meth:`get` for the ``count`` blocks from ``first`` on, of type ``i``."""
        result = array("i")
        for number, at, _ in _parts(first, count):
            result += self.chunks.get(number, _EMPTY_CHUNK)[at]
        return result

    def absent(self, first: int, count: int) -> list[int]:
        """Which of the ``count`` blocks from ``first`` on have no slot."""
        if count == 1:  # as of most misses
            return [first] if self.get(first) < 0 else []
        slots = np.frombuffer(self.get_run(first, count), np.int32)
        return (np.flatnonzero(slots < 0) + first).tolist()

    def put_run(self, first: int, slots: array[int]) -> array[int]:
        """:meth:`put` for the blocks from ``first`` on, as many as there are ``slots``, of type ``i``."""
        result = array("i")
        for number, at, part in _parts(first, len(slots)):
            chunk = self.chunks.get(number)
            if chunk is None:
                chunk = self._add(number)
            old = chunk[at]
            chunk[at] = slots[part]
            added = int(np.count_nonzero(np.frombuffer(old, np.int32) < 0))
            self.cached += added
            chunk[CHUNK_BLOCKS] += added
            result += old
        return result

    def remove(self, blocks: npt.NDArray[np.uint64]) -> None:
        """Forget cached ``blocks``, ascending, shape (n,), n > 0."""
        numbers = blocks >> np.uint64(CHUNK_SHIFT)
        for first, end in equal_runs(numbers):
            number = int(numbers[first])
            chunk = self.chunks[number]
            if chunk[CHUNK_BLOCKS] == end - first:
                self._drop(number)
                continue
            np.frombuffer(chunk, np.int32)[blocks[first:end] & np.uint64(CHUNK_MASK)] = ABSENT
            chunk[CHUNK_BLOCKS] -= end - first
        self.cached -= len(blocks)

    def put_many(self, blocks: npt.NDArray[np.uint64], slots: npt.NDArray[np.int32]) -> None:
        """Fill an empty table: ``slots[i]`` holds ``blocks[i]``, ascending and distinct, both (n,)."""
        numbers = blocks >> np.uint64(CHUNK_SHIFT)
        begins = np.r_[True, numbers[1:] != numbers[:-1]]
        starts = np.flatnonzero(begins)
        chunks = np.full((len(starts), CHUNK_BLOCKS + 1), ABSENT, np.int32)
        chunks[np.cumsum(begins) - 1, blocks & np.uint64(CHUNK_MASK)] = slots
        chunks[:, CHUNK_BLOCKS] = np.diff(starts, append=len(blocks))
        for number, chunk in zip(numbers[starts].tolist(), chunks, strict=True):
            self.chunks[number] = array("i", chunk.tobytes())
        self.cached = len(blocks)
        self._divide()

    def _add(self, number: int) -> array[int]:
        chunk = self.chunks[number] = _EMPTY_CHUNK[:]
        if self._regions is not None:
            self._regions.setdefault(number >> REGION_SHIFT, set()).add(number)
        elif len(self.chunks) > REGION_CHUNKS:
            self._divide()
        return chunk

    def _drop(self, number: int) -> None:
        del self.chunks[number]
        if self._regions is not None:
            region = self._regions[number >> REGION_SHIFT]
            region.discard(number)
            if not region:
                del self._regions[number >> REGION_SHIFT]

    def _divide(self) -> None:
        if len(self.chunks) > REGION_CHUNKS:
            self._regions = {}
            for number in self.chunks:
                self._regions.setdefault(number >> REGION_SHIFT, set()).add(number)

    def _numbers(self, first: int) -> Iterator[int]:
        """The numbers of the chunks from ``first`` on, in order."""
        if self._regions is None:
            yield from sorted(number for number in self.chunks if number >= first)
            return
        for region in sorted(region for region in self._regions if region >= first >> REGION_SHIFT):
            yield from sorted(number for number in self._regions.get(region, ()) if number >= first)

    def slots(self) -> array[int]:
        """The slots of all cached blocks, in their order, of type ``i``."""
        result = array("i")
        for number in sorted(self.chunks):
            chunk = np.frombuffer(self.chunks[number], np.int32, CHUNK_BLOCKS)
            result.frombytes(chunk[chunk >= 0].tobytes())
        return result

    def walk(self, first: int = 0) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
        """Cached blocks from ``first`` on, in order, chunk by chunk: (block numbers, slots), each of
        shape (n,), n > 0, copies. The table may change between two steps."""
        for number in self._numbers(first >> CHUNK_SHIFT):
            chunk = self.chunks.get(number)
            if chunk is None:
                continue
            slots = np.frombuffer(chunk, np.int32, CHUNK_BLOCKS)
            present = np.flatnonzero(slots >= 0)
            present = present[present >= first - (number << CHUNK_SHIFT)]
            if len(present):
                yield present + (number << CHUNK_SHIFT), slots[present]


def _parts(first: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """Of the ``count`` blocks from ``first`` on, chunk by chunk: its number, where they are in it, which they are."""
    end = first + count
    for number in range(first >> CHUNK_SHIFT, ((end - 1) >> CHUNK_SHIFT) + 1):
        start = number << CHUNK_SHIFT
        low, high = max(first, start), min(end, start + CHUNK_BLOCKS)
        yield number, slice(low - start, high - start), slice(low - first, high - first)
