"""Copying dirty blocks to the backing, and making them clean.

One *pass* writes one file, or a bounded part of it, in the order of these steps (O5, H16-H22):

1. hold the file's lock: no truncate and no other pass comes in between;
2. pin the dirty slots, make them durable (class ``disk``);
3. verify checksums and write runs of adjacent blocks by direct I/O from the map, the end of the file through the page
   cache; while the disk writes one batch of runs, the next is verified;
4. restore the mtime, sync on the descriptor that was written to, and the directories of new names;
5. put into the catalog how the backing file now looks, and that its older intents are done;
6. only then make the slots CLEAN that still are the current version of their block.

An error anywhere leaves every state as it was; the next pass writes everything again (H19).
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import trio

from ..backing.ports import Run
from ..media.ports import SlotState
from .cache import Cache
from .files import CachedFile
from .slots import DIRTY
from .steps import RUN_BLOCKS, Part, edges_of, lose_damaged, note_synced, sync_names, transact_records, verified

# A pass shares a sync, and a truncate or a writer without room waits for one at most: it gets more blocks where the
# disk is fast and the pool large.
PASS_BLOCKS_MIN = 4096  # 16 MiB at 4 KiB
PASS_BLOCKS_MAX = 16384
PASS_SHARE = 16  # of the pool: one pass has no more
PASS_S = 0.1
# Of a pass two batches of runs are in flight: the disk has one while the loop deals with the other. The runs of a
# batch share the costs of a job of a worker and a wake-up, some 100 us. A read of a miss waits behind them all, so
# their number follows from how long the disk takes for them.
BATCHES_IN_FLIGHT = 2
BATCH_RUNS_MIN = 4
BATCH_RUNS_MAX = 32
BATCH_BLOCKS = 4 * RUN_BLOCKS
BATCH_S = 0.05
CLEAN_STRIDE = 512  # blocks between two looks at the loop: 50 us of states
WALK_STRIDE = 8  # chunks of a file's table, likewise


class Passes:
    """Writes files back, each by itself, at the pace of the disk."""

    def __init__(self, cache: Cache, synced: Callable[[CachedFile, float], None]) -> None:
        """``synced`` is told how long the sync of a file has taken, in seconds."""
        self._cache = cache
        self._synced = synced
        self._batch_runs = BATCH_RUNS_MIN
        """How many runs the disk gets at once, as fast as it is."""
        self._pass_blocks = PASS_BLOCKS_MIN
        self._most_pass_blocks = max(PASS_BLOCKS_MIN, min(PASS_BLOCKS_MAX, cache.pool.slots // PASS_SHARE))

    async def write_file(self, file: CachedFile) -> None:
        """Write back everything of ``file`` that is dirty now, pass by pass."""
        cache = self._cache
        position: int | None = 0
        while position is not None:
            async with file.lock:
                began = trio.current_time()
                blocks, position = await self._pass(file, position)
                seconds = trio.current_time() - began
            if seconds > PASS_S:
                self._pass_blocks = max(PASS_BLOCKS_MIN, self._pass_blocks // 2)
            elif blocks >= self._pass_blocks and seconds < PASS_S / 2:
                self._pass_blocks = min(self._most_pass_blocks, self._pass_blocks * 2)
        cache.files.close_if_idle(file)

    async def _collect(self, part: Part, first: int) -> int | None:
        """Pin the next dirty blocks of the file from ``first`` on; where the pass after this one goes on."""
        for number, (blocks, slots) in enumerate(part.file.table.walk(first)):
            dirty = self._cache.slots.in_state(slots, DIRTY)
            if count := np.count_nonzero(dirty):
                if count < len(slots):
                    blocks, slots = blocks[dirty], slots[dirty]
                part.blocks, part.slots = np.concatenate((part.blocks, blocks)), np.concatenate((part.slots, slots))
                self._cache.slots.pin(slots)
            if len(part.blocks) >= self._pass_blocks:
                return int(blocks[-1]) + 1
            if number % WALK_STRIDE == WALK_STRIDE - 1:
                await trio.lowlevel.checkpoint()
        return None

    async def _pass(self, file: CachedFile, first: int) -> tuple[int, int | None]:
        """Steps 2 to 6 for the next blocks of ``file``: how many, and where to go on, or None at the end."""
        cache = self._cache
        part = Part(file)
        try:
            position = await self._collect(part, first)
            if not len(part.blocks) and not file.intents:
                cache.dirty.dequeue_if_clean(file)
                return 0, position
            if not file.backing.writable:
                await file.backing.open(write=True)
            part.failures_before = file.backing.sync_failures
            if cache.slots.deferred:
                # Else a crash could leave the backing ahead of the pool, whose older version then wins.
                await cache.blocks.persist()
            await cache.records.announce([file])
            part.touches = file.touches if position is None else -1
            await self._write_runs(part)
            part.mtime_ns, part.attr_seq = file.mtime_ns, cache.blocks.next_seq - 1
            await file.backing.set_mtime(part.mtime_ns)
            began = trio.current_time()
            await file.backing.sync()
            self._synced(file, trio.current_time() - began)
            await sync_names(cache, file)
            stat = await file.backing.stat()
            if file.backing.sync_failures != part.failures_before:
                raise OSError(errno.EIO, "a sync of the file failed meanwhile")
            if file.intents:
                await cache.blocks.persist_frees()  # what the intents have killed must be durably FREE before they go
            note_synced(cache, part, stat)
            await transact_records(cache, [part])
            await self._make_clean(part)
        finally:
            cache.slots.unpin(part.slots)
        return len(part.blocks), position

    async def _verify(
        self, file: CachedFile, blocks: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        """Which of the blocks are as they were written; the others are lost, and not to be written (P5)."""
        good = await verified(self._cache, slots)
        lose_damaged(self._cache, file, blocks, slots, ~good)
        return good

    async def _write_runs(self, part: Part) -> None:
        """Step 3. All runs are waited for, whatever happens to one: their slots are pinned."""
        file, size = part.file, part.file.size
        whole = int(np.searchsorted(part.blocks, size >> self._cache.shift))
        batches = self._batches(edges_of(part.blocks[:whole]))
        in_flight = trio.Semaphore(BATCHES_IN_FLIGHT)
        errors: list[OSError] = []

        async def write_batches() -> None:
            for edges in batches:
                blocks, slots = part.blocks[edges[0] : edges[-1]], part.slots[edges[0] : edges[-1]]
                edges = [edge - edges[0] for edge in edges]
                try:
                    good = await self._verify(file, blocks, slots)
                    if not good.all():
                        blocks, slots = blocks[good], slots[good]
                        edges = edges_of(blocks)
                    async with in_flight:
                        if errors:
                            break
                        await self._write_batch(file, blocks, slots, edges)
                except OSError as error:
                    errors.append(error.with_traceback(None))  # it would hold views of the map

        async with trio.open_nursery() as nursery:
            for _ in range(BATCHES_IN_FLIGHT + 1):  # one more is verified meanwhile
                nursery.start_soon(write_batches)
        if errors:
            raise errors[0]
        if whole < len(part.blocks):
            (good,) = await self._verify(file, part.blocks[whole:], part.slots[whole:])
            if good:
                await self._write_tail(file, int(part.slots[whole]), size)

    def _batches(self, edges: list[int]) -> Iterator[list[int]]:
        """The runs between ``edges``, as many together as the disk is to have at once."""
        first, end = 0, len(edges) - 1
        while first < end:
            last = min(first + self._batch_runs, bisect_right(edges, edges[first] + BATCH_BLOCKS) - 1, end)
            yield edges[first : last + 1]
            first = last

    async def _write_batch(
        self, file: CachedFile, blocks: npt.NDArray[np.int64], slots: npt.NDArray[np.int32], edges: list[int]
    ) -> None:
        if not len(blocks):
            return
        cache, shift = self._cache, self._cache.shift
        stats = cache.stats.writeback
        offsets = (blocks[edges[:-1]] << shift).tolist()
        runs = [Run(offset, slots[first:end]) for offset, (first, end) in zip(offsets, pairwise(edges), strict=True)]
        began = trio.current_time()
        await file.backing.write_runs(cache.data, runs)
        self._set_pace(len(runs), trio.current_time() - began)
        written = len(slots) << shift
        if file.backing.direct:
            stats.direct_bytes += written
        else:
            stats.bounced_bytes += written
        file.backing_size = max(file.backing_size, (int(blocks[-1]) + 1) << shift)
        stats.bytes += written
        stats.runs += len(runs)

    def _set_pace(self, runs: int, seconds: float) -> None:
        """Learn from a batch how many runs the disk takes in reasonable time."""
        if seconds > BATCH_S:
            self._batch_runs = max(BATCH_RUNS_MIN, self._batch_runs // 2)
        elif runs >= self._batch_runs and seconds < BATCH_S / 2:
            self._batch_runs = min(BATCH_RUNS_MAX, self._batch_runs * 2)

    async def _write_tail(self, file: CachedFile, slot: int, size: int) -> None:
        """Write the last block of a file of ``size`` bytes, which it does not fill."""
        cache, stats = self._cache, self._cache.stats.writeback
        length = size & cache.mask
        start = slot << cache.shift
        await file.backing.write_tail(size - length, cache.data[start : start + length])
        file.backing_size = max(file.backing_size, size)
        stats.bounced_bytes += length
        stats.bytes += length
        stats.runs += 1

    async def _make_clean(self, part: Part) -> None:
        """Step 6. A block that was written meanwhile has another slot by now, and stays dirty (H16): the pinned slot
        that it had is not DIRTY any more, and holds nothing else."""
        cache, slots, file = self._cache, self._cache.slots, part.file
        for at in range(0, len(part.slots), CLEAN_STRIDE):
            if at:
                cache.dirty.dequeue_if_clean(file)
                await trio.lowlevel.checkpoint()
            stride = part.slots[at : at + CLEAN_STRIDE]
            current = stride[slots.in_state(stride, DIRTY)]
            slots.change(current, SlotState.CLEAN)
            file.dirty -= len(current)
        slots.fence()
        cache.dirty.dequeue_if_clean(file)
        cache.slots.freed.set()
