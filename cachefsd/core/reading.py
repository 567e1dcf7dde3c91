"""What users read: from the cache at once, or with what is missing brought from the backing first."""

from __future__ import annotations

from ..media.ports import Buffer
from ..runs import slot_index, stretches
from .blocktable import CHUNK_MASK, CHUNK_SHIFT
from .cache import Cache
from .fetch import Fetcher
from .files import CachedFile


class Reader:
    """Reads files. :meth:`read` has no await: it is the hot path, and a hit of one block takes half a microsecond."""

    def __init__(self, cache: Cache, fetcher: Fetcher) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._block_size, self._shift, self._mask = cache.block_size, cache.shift, cache.mask

    def read(self, file: CachedFile, offset: int, size: int) -> Buffer | None:
        """Bytes from ``offset`` on, fewer at the end of the file; None when the backing is needed.

        What is returned may be a view of live slots: use it before the next await.

        :raises OSError: EIO for a block whose data was lost.
        """
        end = min(offset + size, file.size)
        if end <= offset:
            return b""
        shift = self._shift
        block = offset >> shift
        if (end - 1) >> shift != block:
            data = self._assemble(file, offset, end, {}, touch=True)
            self._cache.stats.read_hits += data is not None
            return data
        chunk = file.table.chunks.get(block >> CHUNK_SHIFT)
        slot = -1 if chunk is None else chunk[block & CHUNK_MASK]
        if slot < 0:
            return bytes(end - offset) if block << shift >= file.backing_size else None
        slots = self._cache.slots
        if not slots.verified[slot] and not self._cache.integrity.verify(file, block, slot):
            return None
        slots.policy.touched(slot)
        self._cache.stats.read_hits += 1
        start = (slot << shift) + (offset & self._mask)
        return self._cache.data[start : start + end - offset]

    async def read_slow(self, file: CachedFile, offset: int, size: int) -> Buffer:
        """The same, with what is missing brought from the backing first."""
        self._cache.stats.read_misses += 1
        got: dict[int, memoryview] = {}
        promote = self._cache.health.failed is None
        while True:
            missing = self._missing(file, offset, min(offset + size, file.size), got)
            if missing:
                await self._fetcher.fetch(file, missing, got, promote=promote)
            end = min(offset + size, file.size)
            if end <= offset:
                return b""
            # What it has promoted must not count as used twice: one pass over a large file would displace all.
            data = self._assemble(file, offset, end, got, touch=False)
            if data is not None:
                return data
            # Small caches may evict what was promoted before all of it is there: from the second
            # round on read into memory of our own, which nobody takes away.
            promote = False

    def _missing(self, file: CachedFile, offset: int, end: int, got: dict[int, memoryview]) -> list[int]:
        shift = self._shift
        stop = min(end, file.backing_size)
        first = offset >> shift
        if stop <= first << shift:
            return []
        absent = file.table.absent(first, ((stop - 1) >> shift) + 1 - first)
        return [block for block in absent if block not in got] if got else absent

    def _assemble(
        self, file: CachedFile, offset: int, end: int, got: dict[int, memoryview], *, touch: bool
    ) -> Buffer | None:
        """A read of several blocks; None when one is neither cached nor in ``got`` nor a hole. ``touch``: it counts as
        a use of those that are cached."""
        data = None
        if (end - offset) >> self._shift >= self._cache.slots.vector_min_blocks and not got:
            data = self._read_hits(file, offset, end, touch)
        return self._read_blocks(file, offset, end, got, touch) if data is None else data

    def _read_hits(self, file: CachedFile, offset: int, end: int, touch: bool) -> Buffer | None:
        """:meth:`_read_blocks` for many that are all cached and verified, without a loop over them; else None."""
        cache, shift, first = self._cache, self._shift, offset >> self._shift
        places = slot_index(file.table.get_run(first, ((end - 1) >> shift) + 1 - first))
        if not (isinstance(places, slice) or places.min() >= 0) or not cache.slots.all_verified(places):
            return None
        if touch:
            cache.slots.policy.touched_all(places)
        parts: list[memoryview] = []
        start = first << shift
        for slot, count in stretches(places):
            stop, ahead = start + (count << shift), (slot << shift) - start
            parts.append(cache.data[max(offset, start) + ahead : min(end, stop) + ahead])
            start = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_blocks(
        self, file: CachedFile, offset: int, end: int, got: dict[int, memoryview], touch: bool
    ) -> Buffer | None:
        """:meth:`_assemble` block by block."""
        cache, shift, size = self._cache, self._shift, self._block_size
        slots, data = cache.slots, cache.data
        parts: list[Buffer] = []
        run_start = run_end = 0  # bytes of the map that lie in one piece
        touched: list[int] = []
        for block in range(offset >> shift, ((end - 1) >> shift) + 1):
            low = max(offset, block << shift) & self._mask
            high = min(end - (block << shift), size)
            slot = file.table.get(block)
            if slot >= 0 and (slots.verified[slot] or cache.integrity.verify(file, block, slot)):
                touched.append(slot)
                start = slot << shift
                if run_end != start + low or run_end == run_start:
                    if run_end > run_start:
                        parts.append(data[run_start:run_end])
                    run_start = start + low
                run_end = start + high
                continue
            if run_end > run_start:
                parts.append(data[run_start:run_end])
                run_start = run_end = 0
            if block in got:
                parts.append(got[block][low:high])
            elif block << shift >= file.backing_size:
                parts.append(bytes(high - low))
            else:
                return None
        if touch:
            for slot in touched:
                slots.policy.touched(slot)
        if run_end > run_start:
            parts.append(data[run_start:run_end])
        return parts[0] if len(parts) == 1 else b"".join(parts)
