"""Which file is written back next, and when.

A file is due when its data is old, when slots or time are short, or when somebody asks for it. It is written back by
itself (``core/passes.py``), or with other small files in a group (``core/groups.py``).
"""

from __future__ import annotations

import errno
import heapq
import logging
from collections import deque
from collections.abc import Callable

import trio

from ..wakeup import Signal
from .cache import Cache
from .files import CachedFile
from .groups import GROUP_BLOCKS, Groups
from .passes import Passes
from .slots import DIRTY

log = logging.getLogger(__name__)
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
# While requests come in, files are written back one at a time, with pauses that leave nine tenths of the loop to them,
# until half of the slots above the high watermark are dirty, too, or somebody waits for one; a flush does not wait.
# 20,000 files were unpacked at 260 a second while others were synced meanwhile, and at 690 with this. A file that waits
# takes 3 KiB of memory.
REST = 9
REST_MAX_S = 0.05
PATIENCE_S = 10  # with one that hangs; then another one begins
BUSY_S = 0.1  # since the last request: a client that lists directories sends one in several milliseconds
RESTING_FILES_MAX = 50_000


class Flush:
    """A request to write back everything that was dirty when it came."""

    def __init__(self, cache: Cache, tries: int) -> None:
        self._cache = cache
        self._tries = tries
        self._until = trio.current_time()
        self._pending = {file: file.failures for file in cache.dirty}
        self._failed: OSError | None = None

    def note_failure(self, file: CachedFile) -> None:
        """Writing back ``file`` has failed once more."""
        if file in self._pending and file.failures - self._pending[file] >= self._tries and file.error is not None:
            self._failed = OSError(file.error.errno, f"{file.label}: {file.error.strerror}")

    def waits(self) -> bool:
        """Whether some file is yet to be written back. Each of them is looked at once when it no longer is.

        :raises OSError: of a file that has failed too often.
        """
        if self._failed is not None:
            raise self._failed
        while self._pending:
            file, _ = self._pending.popitem()
            owed = file in self._cache.dirty and file.due_since <= self._until and file.held is None
            if owed and not (file.unlinked and not file.ref_count):
                self._pending[file] = _
                return True
        return False


class Writeback:
    """Decides when a file is due, and starts its passes."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._groups = Groups(cache)
        self._passes = Passes(cache, self._note_sync)
        self._active: set[CachedFile] = set()
        self._jobs = 0
        """how many passes and groups are under way"""
        self._flying = 0
        """how many blocks of their files were dirty when they began"""
        self._again: deque[CachedFile] = deque()
        """Files that come before the queue: they have waited there before."""
        self._alone: set[CachedFile] = set()
        """Files that a group has left out; they get a pass of their own."""
        self._failing: list[tuple[float, int, CachedFile]] = []
        """A heap of files that have failed, by when they are tried again."""
        self._entries = 0
        self._slots_needed = (False, -1.0)
        """the state of pressure and flushes that files without a name were looked at with"""
        self.requests: Callable[[], int] = lambda: 0
        """How many requests of users there have been: what is only old gives way to them."""
        self._requests_seen = 0
        self._busy_until = 0.0
        self._rest_until = 0.0
        self._started = 0.0
        """when the last job began"""
        self._flushes: list[Flush] = []
        self._flush_until = -1.0
        """everything due since before this loop time is wanted now"""
        self.short_of_space = False
        """Some file has failed because the backing has no space for it."""
        self._crowded_mark = (cache.dirty.high_mark + cache.pool.slots) // 2
        self._progress = Signal()
        """a pass has ended, well or not"""

    # ---- when

    async def run(self) -> None:
        """Start passes as files become due, until cancelled."""
        async with trio.open_nursery() as nursery:
            # Inside the nursery: if the schedule fails, the jobs go on.
            await self._cache.stats.faults.keep("the schedule of writeback", lambda: self._schedule(nursery))

    async def _schedule(self, nursery: trio.Nursery) -> None:
        while True:
            work = self._cache.dirty.work.next
            next_look = self._start_due(nursery)
            self._cache.dirty.will_look(next_look)
            with trio.move_on_at(next_look):
                await work.wait()

    def _start_due(self, nursery: trio.Nursery) -> float:
        """Start what is due as far as jobs are free; return when to look again at the latest."""
        cache, options = self._cache, self._cache.options
        now = trio.current_time()
        dirty = cache.dirty.measure()
        requests = self.requests()
        if requests != self._requests_seen:
            self._requests_seen, self._busy_until = requests, now + BUSY_S
        crowded = dirty >= self._crowded_mark or cache.room.waiting or len(cache.dirty) > RESTING_FILES_MAX
        busy = now < self._busy_until and not crowded and not self._flushes
        self._look_at_unnamed()
        batch: list[CachedFile] = []
        batched = 0
        most = self._groups.most if self._groups.worthwhile(self._groups.most) else 1
        wake = float("inf")
        while self._jobs < options.writeback_jobs and (file := self._next(now)) is not None:
            hurried = file.due_since <= self._flush_until
            flying = self._flying if now < self._started + PATIENCE_S else 0
            pressed = cache.dirty.pressure and (cache.room.waiting or dirty - flying - batched > cache.dirty.low_mark)
            waited = hurried or pressed or file.failures or file in self._alone
            when = now if waited else file.due_since + options.dirty_age_s
            if when > now:
                self._cache.dirty.put_back(file)
                wake = when
                break  # the rest is younger
            if busy and not hurried:
                until = self._started + PATIENCE_S if self._active else self._rest_until
                if now < until:  # meanwhile it may become crowded
                    self._cache.dirty.put_back(file)
                    wake = min(until, now + REST_MAX_S) if cache.dirty.pressure else until
                    break
            self._active.add(file)
            if (busy and not hurried) or not self._groups.takes(file) or self._is_alone(file):
                self._start(nursery, [file])
                continue
            batch.append(file)
            batched += file.dirty
            if len(batch) >= most or batched >= GROUP_BLOCKS:
                self._start_batch(nursery, batch)
                batch, batched = [], 0
        self._start_batch(nursery, batch)
        if self._jobs >= options.writeback_jobs:
            return float("inf")  # the end of a job wakes us
        return min(wake, self._failing[0][0]) if self._failing else wake

    def _next(self, now: float) -> CachedFile | None:
        """Take the next file that may be written back out of the queue."""
        file: CachedFile | None
        cache, until = self._cache, self._flush_until
        while self._failing and self._failing[0][0] <= now:
            when, _, file = heapq.heappop(self._failing)
            if file.retry_at == when:  # else there is a later entry
                self._again.append(file)
        while (file := self._again.popleft() if self._again else cache.dirty.take()) is not None:
            if file in self._active or file.retry_at > now:
                continue  # the end of its job, or its time, brings it back
            if file not in cache.dirty or file.held is not None:
                self._alone.discard(file)
            elif file.unlinked and not (file.ref_count and (cache.dirty.pressure or file.due_since <= until)):
                cache.dirty.keep_unnamed(file)
            else:
                return file
        return None

    def _look_at_unnamed(self) -> None:
        """Files without a name are looked at again when slots are needed, or a flush has come."""
        needed = (self._cache.dirty.pressure, self._flush_until)
        if needed != self._slots_needed:
            self._slots_needed = needed
            self._again.extend(self._cache.dirty.take_unnamed())

    def look_again(self) -> None:
        """Some file without a name has one again."""
        self._slots_needed = (False, -2.0)
        self._cache.dirty.work.set()

    def _is_alone(self, file: CachedFile) -> bool:
        """Whether a file must not hold others up, as it has failed or hung the last time."""
        alone = file in self._alone or bool(file.failures)
        self._alone.discard(file)
        return alone

    def _start_batch(self, nursery: trio.Nursery, batch: list[CachedFile]) -> None:
        """Start a group, or a pass of each of the files if that is likely to be faster, as far as jobs are free."""
        if self._groups.worthwhile(len(batch)):
            self._start(nursery, batch)
            return
        for index, file in enumerate(batch):
            if self._jobs < self._cache.options.writeback_jobs:
                self._start(nursery, [file])
            else:
                for rest in reversed(batch[index:]):
                    self._active.discard(rest)
                    self._cache.dirty.put_back(rest)
                return

    def _start(self, nursery: trio.Nursery, files: list[CachedFile]) -> None:
        self._started = trio.current_time()
        self._jobs += 1
        blocks = sum(file.dirty for file in files)
        self._flying += blocks
        nursery.start_soon(self._job, files, blocks)

    async def _job(self, files: list[CachedFile], blocks: int) -> None:
        cache = self._cache
        began = trio.current_time()
        left = dict.fromkeys(files)

        def ended(file: CachedFile, error: OSError | None) -> None:
            del left[file]
            self._active.discard(file)
            if error is not None:
                self._note_failure(file, error)
                cache.files.close_if_idle(file)  # failing files may be many, too
            else:
                self._note_success(file)
                if file in cache.dirty:
                    cache.dirty.put_last(file, began)

        def alone(file: CachedFile) -> None:
            del left[file]
            self._active.discard(file)
            self._alone.add(file)
            self._again.append(file)
            cache.dirty.work.set()

        try:
            if len(files) > 1:
                await self._groups.write_back(files, ended, alone)
            else:
                await self._passes.write_file(files[0])
                ended(files[0], None)
        except OSError as error:
            for file in list(left):
                ended(file, error)
        except Exception as error:
            # A bug, but the trouble of one file only: of several each gets a pass of its own, and that one fails.
            whose = files[0].label if len(files) == 1 else f"{len(files)} files"
            failure = cache.stats.faults.note(f"writeback of {whose}", error)
            if len(files) == 1 and left:
                ended(files[0], failure)
        finally:
            self._jobs -= 1
            self._flying -= blocks
            self._active.difference_update(left)
            self._alone.update(left)
            self._again.extend(left)
            now = trio.current_time()
            self._rest_until = now + min(REST_MAX_S, REST * (now - began))
            self._progress.set()
            cache.dirty.work.set()
            cache.slots.freed.set()

    def _note_sync(self, file: CachedFile, seconds: float) -> None:
        """A pass has synced ``file`` in this time: what that says of small files decides between groups and passes."""
        if self._groups.takes(file):
            self._groups.note_sync(seconds / max(1, self._jobs))

    def note_short(self, short: bool) -> None:
        """Whether some file is failing for want of space."""
        self.short_of_space = short

    def retry(self, file: CachedFile, when: float) -> None:
        """Try a file that has failed at ``when`` (loop time) rather than later."""
        if when < file.retry_at:
            file.retry_at = when
            self._retry_later(file)

    def _retry_later(self, file: CachedFile) -> None:
        """Look at a file at its ``retry_at``."""
        self._entries += 1
        heapq.heappush(self._failing, (file.retry_at, self._entries, file))

    def _note_success(self, file: CachedFile) -> None:
        if file.error is not None:
            log.info("writeback goes on: %s", file.label)
            file.error, file.no_space = None, 0
            file.errors.healed()
        file.failures, file.retry_at = 0, 0.0

    def _note_failure(self, file: CachedFile, error: OSError) -> None:
        cache, options = self._cache, self._cache.options
        pause = options.retry_pause_s(file.failures)
        if self._flushes:
            pause = min(pause, options.retry_min_s)
        file.failures += 1
        file.retry_at = trio.current_time() + pause
        self._retry_later(file)
        text = f"{file.label}: {error.strerror or error}"
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
        for flush in self._flushes:
            flush.note_failure(file)

    # ---- on request

    async def write_out(self, file: CachedFile) -> None:
        """Write back what is dirty of one file.

        :raises OSError: of the backing; nothing is lost.
        """
        if file.dirty or file.intents:
            await self._passes.write_file(file)

    async def write_back_some(self, deadline: float) -> None:
        """Write back what is dirty now; returns when one file more has been, or at ``deadline`` (loop time)."""
        self._flush_until = max(self._flush_until, trio.current_time())
        self._cache.dirty.work.set()
        with trio.move_on_at(deadline):
            await self._progress.wait()

    async def flush(self, tries: int, progress: Callable[[int], None] | None) -> None:
        """Write back everything that is dirty now.

        :raises OSError: of a file whose writeback has failed ``tries`` times in a row since the call.
        """
        cache = self._cache
        flush = Flush(cache, tries)
        self._flush_until = max(self._flush_until, trio.current_time())
        self._flushes.append(flush)
        try:
            soon = trio.current_time() + cache.options.retry_min_s
            for _, _, file in list(self._failing):
                self.retry(file, soon)
            while flush.waits():
                cache.dirty.work.set()
                if progress is not None:
                    progress(cache.slots.counts[DIRTY])
                with trio.move_on_after(0.5):
                    await self._progress.wait()
        finally:
            self._flushes.remove(flush)
        for file in cache.files.held:
            assert file.held is not None
            raise OSError(file.held.errno, f"{file.label}: {file.held.strerror}")
        if progress is not None:
            progress(cache.slots.counts[DIRTY])
