"""Reading blocks from the backing: promotion into slots, or past them.

A fetch is entered in ``file.fetches`` for each of its blocks before it awaits. A write or a truncate in the
meantime takes the entry away; then what was read is not put into the cache (H26), but it may still answer
the read that asked for it: that read overlapped the write.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

import trio

from ..media.ports import SlotState
from ..runs import runs_of, slot_index, stretches
from .cache import Cache
from .files import CUT, CachedFile, Fetch


class Fetcher:
    """Brings blocks from the backing."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def fetch(
        self, file: CachedFile, blocks: Sequence[int], got: dict[int, memoryview], *, promote: bool
    ) -> None:
        """Bring ascending, uncached ``blocks`` (all below ``backing_size``).

        With ``promote`` they are in the cache afterwards, unless slots are short or something came in
        between; what is not promoted is in ``got``, as memory that nobody else uses. Blocks that are
        already on their way are waited for, and may be in neither.

        :raises OSError: from the backing.
        """
        wanted = blocks
        if promote and file.fetches:
            under_way = {file.fetches[b] for b in blocks if b in file.fetches}
            wanted = [b for b in blocks if b not in file.fetches]
            for other in under_way:
                await other.done.wait()
        if not wanted:
            return
        if promote and not file.recorded:
            await self._cache.records.record(file)
        if not file.backing.writable:
            await file.backing.open(write=False)
        errors: list[OSError] = []
        runs = runs_of(wanted)
        if len(runs) == 1:
            await self._fetch_run(file, wanted, got, promote, errors)
        else:
            async with trio.open_nursery() as nursery:
                for start, count in runs:
                    nursery.start_soon(self._fetch_run, file, wanted[start : start + count], got, promote, errors)
        if errors:
            raise errors[0]

    async def _fetch_run(
        self, file: CachedFile, run: Sequence[int], got: dict[int, memoryview], promote: bool, errors: list[OSError]
    ) -> None:
        """Bring adjacent blocks. What the backing answers instead is added to ``errors``."""
        try:
            await self._promote_run(file, run, got, promote)
        except OSError as error:
            errors.append(error.with_traceback(None))  # it would hold views of the map

    async def _promote_run(
        self, file: CachedFile, run: Sequence[int], got: dict[int, memoryview], promote: bool
    ) -> None:
        cache = self._cache
        # What came in while we waited (another fetch, a write) makes promotion of this run pointless.
        none_there = len(file.table.absent(run[0], len(run))) == len(run)
        promote = promote and none_there and (not file.fetches or file.fetches.keys().isdisjoint(run))
        taken = cache.slots.take(len(run)) if promote else None
        if taken is None:
            cache.stats.bypassed += 1
            memory = await self.read_past(file, run[0], len(run))
            for index, block in enumerate(run):
                got[block] = memory[index << cache.shift : (index + 1) << cache.shift]
            return
        fetch = Fetch()
        file.fetches.update(dict.fromkeys(run, fetch))
        cache.slots.pin(taken)
        size = cache.block_size
        views = [cache.data[slot * size : (slot + count) * size] for slot, count in stretches(slot_index(taken))]
        published: Sequence[int] = ()
        try:
            count = await file.backing.read(run[0] << cache.shift, views)
            holders = list(map(file.fetches.get, run))
            current: Sequence[int] = range(len(run))
            if holders.count(fetch) < len(run):
                current = [i for i in current if holders[i] is fetch]
            if file.life is CUT:
                current = ()  # a truncate is under way: nothing may be published
            self._zero_from(views, count)
            self._publish(file, run, taken, current)
            published = current
        finally:
            for block in run:
                if file.fetches.get(block) is fetch:
                    del file.fetches[block]
            cache.slots.unpin(taken)
            if len(published) < len(taken):
                kept = set(published)
                cache.slots.give_back(slot for i, slot in enumerate(taken) if i not in kept)
            fetch.done.set()

    def _publish(self, file: CachedFile, run: Sequence[int], taken: array[int], current: Sequence[int]) -> None:
        """Make the fetched blocks with index in ``current`` clean cached blocks."""
        if not current:
            return
        cache, data, size = self._cache, self._cache.data, self._cache.block_size
        for slot, count in stretches(slot_index(taken)):
            cache.pool.persist(slot, count)
        cache.slots.fence()
        parts = [(run[0], taken)]
        if len(current) < len(run):
            parts = [(run[current[i]], taken[current[i] : current[i] + count]) for i, count in runs_of(current)]
        for block, slots in parts:
            images = [data[slot * size : (slot + count) * size] for slot, count in stretches(slot_index(slots))]
            checksums = cache.blocks.checksums(images)
            end = max(file.backing_size, (block + len(slots) - 1) * size + 1)
            cache.blocks.publish(file, block, slots, SlotState.CLEAN, checksums, file.mtime_ns, end)
        cache.stats.promotions += len(current)

    async def read_past(self, file: CachedFile, block: int, count: int) -> memoryview:
        """Read ``count`` blocks into fresh memory, zeros from the end of the backing file on."""
        memory = self._cache.backing.scratch(count << self._cache.shift)
        done = await file.backing.read(block << self._cache.shift, [memory])
        self._zero_from([memory], done)
        return memory

    @staticmethod
    def _zero_from(views: Iterable[memoryview], offset: int) -> None:
        for view in views:
            if offset < len(view):
                view[max(0, offset) :] = bytes(len(view) - max(0, offset))
            offset -= len(view)
