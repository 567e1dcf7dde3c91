"""Copying dirty blocks to the backing, and making them clean.

One *pass* writes one file, or a bounded part of it, in the order of these steps (O5, H16-H22):

1. hold the file's lock: no truncate and no other pass comes in between;
2. pin the dirty slots, make them durable (class ``disk``);
3. verify checksums and write runs of adjacent blocks by direct I/O from the map, the end of the file through the page
   cache; while the disk writes one batch of runs, the next is verified;
4. restore the mtime, sync on the descriptor that was written to, and the directories of new names;
5. commit to the catalog what the backing file now looks like, and that its older intents are done;
6. only then make the slots CLEAN that still are the current version of their block.

An error anywhere leaves every state as it was; the next pass writes everything again (H19).
"""

from __future__ import annotations

import errno
import logging
from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..backing.ports import BackingStat, Run
from ..media.ports import Changes, SlotState
from .cache import Cache
from .files import CachedFile
from .slots import DIRTY

log = logging.getLogger(__name__)
# A pass shares a sync, and a truncate or a writer without room waits for one at most: it gets more blocks where the
# disk is fast and the pool large.
PASS_BLOCKS_MIN = 4096  # 16 MiB at 4 KiB
PASS_BLOCKS_MAX = 16384
PASS_SHARE = 16  # of the pool: one pass has no more
PASS_S = 0.1
RUN_BLOCKS = 256  # 1 MiB per request: enough for any disk, and several requests of a pass overlap
# Of a pass two batches of runs are in flight: the disk has one while the loop deals with the other. The runs of a
# batch share the costs of a job of a worker and a wake-up, some 100 us. A read of a miss waits behind them all, so
# their number follows from how long the disk takes for them.
BATCHES_IN_FLIGHT = 2
BATCH_RUNS_MIN = 4
BATCH_RUNS_MAX = 32
BATCH_BLOCKS = 4 * RUN_BLOCKS
BATCH_S = 0.05
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
VERIFY_STRIDE = 128  # blocks between two looks at the loop: 40 to 120 us of checksums
CLEAN_STRIDE = 512  # likewise: 50 us of states
WALK_STRIDE = 8  # chunks of a file's table, likewise
# While requests come in, files are written back one at a time, with pauses that leave nine tenths of the loop to them,
# until half of the slots above the high watermark are dirty, too, or somebody waits for one; a flush does not wait.
# 20,000 files were unpacked at 260 a second while others were synced meanwhile, and at 690 with this. A file that waits
# takes 3 KiB of memory.
REST = 9
REST_MAX_S = 0.05
PATIENCE_S = 10  # with one that hangs; then another one begins
BUSY_S = 0.1  # since the last request: a client that lists directories sends one in several milliseconds
RESTING_FILES_MAX = 50_000


@dataclass(slots=True)
class Pass:
    """Dirty blocks of one file that are written and synced together, pinned; parallel, in block order."""

    blocks: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    slots: npt.NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))

    def add(self, blocks: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]) -> None:
        """More blocks, behind those that are there."""
        self.blocks, self.slots = np.concatenate((self.blocks, blocks)), np.concatenate((self.slots, slots))


def edges_of(blocks: npt.NDArray[np.int64]) -> list[int]:
    """Where, among ascending ``blocks``, runs of adjacent ones begin, and their number."""
    index = np.arange(len(blocks))
    starts = np.ones(len(blocks), np.bool_)
    np.not_equal(blocks[1:] - blocks[:-1], 1, out=starts[1:])
    behind = index - np.maximum.accumulate(np.where(starts, index, 0))
    return [*np.flatnonzero(behind % RUN_BLOCKS == 0).tolist(), len(blocks)]


class Writeback:
    """Decides when a file is due, and runs its passes."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._active: set[CachedFile] = set()
        self.requests: Callable[[], int] = lambda: 0
        """How many requests of users there have been: what is only old gives way to them."""
        self._requests_seen = 0
        self._busy_until = 0.0
        self._rest_until = 0.0
        self._started = 0.0
        """when the last job began"""
        self._flushes = 0
        self._flush_until = -1.0
        """everything due since before this loop time is wanted now"""
        self.short_of_space = False
        """Some file has failed because the backing has no space for it."""
        self._crowded_mark = (cache.high_mark + cache.pool.slots) // 2
        self._progress = trio.Event()
        """a pass has ended, well or not; replaced at once"""
        self._batch_runs = BATCH_RUNS_MIN
        """How many runs the disk gets at once, as fast as it is."""
        self._pass_blocks = PASS_BLOCKS_MIN
        self._most_pass_blocks = max(PASS_BLOCKS_MIN, min(PASS_BLOCKS_MAX, cache.pool.slots // PASS_SHARE))

    # ---- when

    async def run(self) -> None:
        """Start passes as files become due, until cancelled."""
        async with trio.open_nursery() as nursery:
            while True:
                work = self._cache.work = trio.Event()
                self._cache.next_look = self._start_due(nursery)
                with trio.move_on_at(self._cache.next_look):
                    await work.wait()

    def _start_due(self, nursery: trio.Nursery) -> float:
        """Start what is due as far as jobs are free; return when to look again at the latest."""
        cache, options = self._cache, self._cache.options
        now = trio.current_time()
        dirty = cache.slots.counts[DIRTY]
        cache.pressure = dirty >= cache.high_mark or (cache.pressure and dirty > cache.low_mark)
        requests = self.requests()
        if requests != self._requests_seen:
            self._requests_seen, self._busy_until = requests, now + BUSY_S
        crowded = dirty >= self._crowded_mark or cache.waiting or len(cache.due) > RESTING_FILES_MAX
        busy = now < self._busy_until and not crowded and not self._flushes
        wake = float("inf")
        for file in self._candidates():
            if len(self._active) >= options.writeback_jobs:
                return float("inf")  # the end of a pass wakes us
            if file in self._active:
                continue
            hurried = file.due_since <= self._flush_until
            when = max(file.retry_at, now if hurried or cache.pressure else file.due_since + options.dirty_age_s)
            if when > now:
                wake = min(wake, when)
                if file.retry_at <= now:
                    break  # the rest is younger
                continue
            if busy and not hurried:
                until = self._started + PATIENCE_S if self._active else self._rest_until
                if now < until:  # meanwhile it may become crowded
                    return min(until, now + REST_MAX_S) if cache.pressure else until
            self._started = now
            self._active.add(file)
            nursery.start_soon(self._job, file)
        return wake

    def _candidates(self) -> Iterator[CachedFile]:
        """Due files, oldest first; open ones without a name only when slots are needed, dead ones never."""
        pressure, until = self._cache.pressure, self._flush_until
        for file in self._cache.due:
            if file.held is None and (not file.nlink_gone or (file.users and (pressure or file.due_since <= until))):
                yield file

    async def _job(self, file: CachedFile) -> None:
        cache = self._cache
        began = trio.current_time()
        try:
            await self._write_file(file)
            self._note_success(file)
        except OSError as error:
            self._note_failure(file, error)
            cache.rest(file)  # failing files may be many, too
        finally:
            self._active.discard(file)
            now = trio.current_time()
            self._rest_until = now + min(REST_MAX_S, REST * (now - began))
            self._progress.set()
            self._progress = trio.Event()
            cache.work.set()
            cache.made_room()

    def _note_success(self, file: CachedFile) -> None:
        if file.error is not None:
            log.info("writeback goes on: %s", self._cache.name_of(file))
            file.error, file.no_space = None, 0
            file.errors.healed()
        file.failures, file.retry_at = 0, 0.0

    def _note_failure(self, file: CachedFile, error: OSError) -> None:
        cache, options = self._cache, self._cache.options
        pause = min(options.retry_max_s, options.retry_min_s * 2.0 ** min(file.failures, 30))
        file.failures += 1
        file.retry_at = trio.current_time() + pause
        text = f"{cache.name_of(file)}: {error.strerror or error}"
        if file.error is None or file.error.errno != error.errno:
            log.warning("writeback failed, the data stays in the cache: %s", text)
        # Another attempt at the same data is no news; one at data written since is.
        if file.error is None or file.error.errno != error.errno or file.failed_ns != file.mtime_ns:
            file.errors.record(error.errno or errno.EIO)
            file.failed_ns = file.mtime_ns
        # A new one: the traceback of the old one holds views of the map.
        file.error = OSError(error.errno, error.strerror or str(error))
        file.no_space = error.errno if error.errno in NO_SPACE else 0
        self.short_of_space |= bool(file.no_space)
        cache.stats.writeback.errors += 1
        cache.stats.writeback.last_error = text

    # ---- what

    async def _write_file(self, file: CachedFile) -> None:
        """Write back everything of ``file`` that is dirty now, pass by pass."""
        cache = self._cache
        started = trio.current_time()
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
        if file.dirty or file.intents:
            # What is dirty now became so after the start: the file goes to the end of the queue.
            cache.due.pop(file, None)
            cache.due[file] = None
            file.due_since = started
        cache.rest(file)

    async def _collect(self, file: CachedFile, part: Pass, first: int) -> int | None:
        """Pin the next dirty blocks from ``first`` on; where the pass after this one goes on."""
        for number, (blocks, slots) in enumerate(file.table.walk(first)):
            dirty = self._cache.slots.in_state(slots, DIRTY)
            if count := np.count_nonzero(dirty):
                if count < len(slots):
                    blocks, slots = blocks[dirty], slots[dirty]
                part.add(blocks, slots)
                self._cache.slots.pin(slots)
            if len(part.blocks) >= self._pass_blocks:
                return int(blocks[-1]) + 1
            if number % WALK_STRIDE == WALK_STRIDE - 1:
                await trio.lowlevel.checkpoint()
        return None

    async def _pass(self, file: CachedFile, first: int) -> tuple[int, int | None]:
        """Steps 2 to 6 for the next blocks of ``file``: how many, and where to go on, or None at the end."""
        cache = self._cache
        part = Pass()
        try:
            position = await self._collect(file, part, first)
            if not len(part.blocks) and not file.intents:
                cache.not_due(file)
                return 0, position
            if not file.backing.writable:
                await file.backing.open(write=True)
            failures_before = file.backing.sync_failures
            if cache.slots.deferred:
                # Else a crash could leave the backing ahead of the pool, whose older version then wins.
                await cache.commit()
            await cache.announce([file])
            touches = file.touches
            await self._write_runs(file, part)
            mtime_ns, attr_seq = file.mtime_ns, cache.next_seq - 1
            if len(part.blocks) or file.intents:
                await file.backing.set_mtime(mtime_ns)
            intents = list(file.intents)
            await file.backing.sync()
            await self._sync_names(file)
            stat = await file.backing.stat()
            if file.backing.sync_failures != failures_before:
                raise OSError(errno.EIO, "a sync of the file failed meanwhile")
            if intents:
                await cache.settle()  # what the intents have killed must be durably FREE before they go
            await self._commit(file, stat, touches if position is None else -1, mtime_ns, attr_seq)
            await self._make_clean(file, part)
        finally:
            cache.slots.unpin(part.slots)
        return len(part.blocks), position

    async def _verify(
        self, file: CachedFile, blocks: npt.NDArray[np.int64], slots: npt.NDArray[np.int32]
    ) -> npt.NDArray[np.bool_]:
        """Which of the blocks are as they were written; the others are lost, and not to be written (P5)."""
        cache, data, size = self._cache, self._cache.data, self._cache.block_size
        expected = cache.pool.checksums_of(slots)
        found: list[int] = []
        for at in range(0, len(slots), VERIFY_STRIDE):
            await trio.lowlevel.checkpoint()
            starts = (slots[at : at + VERIFY_STRIDE].astype(np.int64) * size).tolist()
            found += [xxh3_64_intdigest(data[start : start + size]) for start in starts]
        good: npt.NDArray[np.bool_] = expected == np.array(found, np.uint64)
        for index in np.flatnonzero(~good).tolist():
            block, slot = int(blocks[index]), int(slots[index])
            if file.table.get(block) == slot:
                cache.lose(file, block, slot)
        return good

    async def _write_runs(self, file: CachedFile, part: Pass) -> None:
        """Step 3. All runs are waited for, whatever happens to one: their slots are pinned."""
        size = file.size
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

    async def _sync_names(self, file: CachedFile) -> None:
        """Part of step 4: POSIX lets a crash take a synced file whose name was not, and its clean blocks were the
        last that anybody had of it."""
        if file.nlink_gone:
            return
        if file.sync_names is not None:
            await file.sync_names()
        elif file.unnamed_since >= self._cache.syncs_done:
            await self._cache.sync_all()

    async def _commit(self, file: CachedFile, stat: BackingStat, touches: int, mtime_ns: int, attr_seq: int) -> None:
        """Step 5. ``touches``: those of the file before its sync; -1 if there will be more passes at once."""
        cache = self._cache
        cache.note_stamp(file, stat, touches=touches, synced=not file.nlink_gone)
        file.backing_size = stat.size
        file.attr_seq = attr_seq
        drop = [(file.file_id, file.intents[-1].seq)] if file.intents else []

        def changes() -> Changes:
            record = cache.record_of(file)
            record.mtime_ns = mtime_ns
            return Changes(put=[record], drop_intents=drop)

        await cache.commit_catalog(changes)
        file.intents.clear()

    async def _make_clean(self, file: CachedFile, part: Pass) -> None:
        """Step 6. A block that was written meanwhile has another slot by now, and stays dirty (H16): the pinned slot
        that it had is not DIRTY any more, and holds nothing else."""
        cache, slots = self._cache, self._cache.slots
        for at in range(0, len(part.slots), CLEAN_STRIDE):
            if at:
                cache.not_due(file)
                await trio.lowlevel.checkpoint()
            stride = part.slots[at : at + CLEAN_STRIDE]
            current = stride[slots.in_state(stride, DIRTY)]
            slots.change_all(current, SlotState.CLEAN)
            file.dirty -= len(current)
        slots.fence()
        cache.not_due(file)
        cache.made_room()

    # ---- on request

    async def write_out(self, file: CachedFile) -> None:
        """Write back what is dirty of one file.

        :raises OSError: of the backing; nothing is lost.
        """
        if file.dirty or file.intents:
            await self._write_file(file)

    async def hurry(self, deadline: float) -> None:
        """Write back what is dirty now; returns when one file more has been, or at ``deadline`` (loop time)."""
        self._flush_until = max(self._flush_until, trio.current_time())
        self._cache.work.set()
        with trio.move_on_at(deadline):
            await self._progress.wait()

    async def flush(self, tries: int, progress: Callable[[int], None] | None) -> None:
        """Write back everything that is dirty now.

        :raises OSError: of a file whose writeback has failed ``tries`` times in a row since the call.
        """
        cache = self._cache
        until = trio.current_time()
        failures = {file: file.failures for file in cache.due}
        self._flush_until = max(self._flush_until, until)
        self._flushes += 1
        try:
            while pending := [file for file in self._candidates() if file.due_since <= until]:
                for file in pending:
                    if file.failures - failures.get(file, 0) >= tries and file.error is not None:
                        raise OSError(file.error.errno, f"{cache.name_of(file)}: {file.error.strerror}")
                    file.retry_at = min(file.retry_at, trio.current_time() + cache.options.retry_min_s)
                cache.work.set()
                if progress is not None:
                    progress(cache.slots.counts[DIRTY])
                with trio.move_on_after(0.5):
                    await self._progress.wait()
        finally:
            self._flushes -= 1
        for file in cache.held:
            assert file.held is not None
            raise OSError(file.held.errno, f"{cache.name_of(file)}: {file.held.strerror}")
        if progress is not None:
            progress(cache.slots.counts[DIRTY])
