"""Writing back many small files with one sync.

A *group* takes the same steps as a pass of one file (``core/passes.py``), each of them for all of its files at once:

1. hold the locks of the files; a file whose lock is taken is left out;
2. pin the dirty slots, make them durable (class ``disk``);
3. verify checksums; one job of a worker opens the files, writes them through the page cache and restores their mtimes;
4. one ``syncfs`` makes data and names durable; groups that wait for it at the same time share it. Then each file is
   asked whether its own data has met an error: ``syncfs`` tells an error once, and does not say which file it concerns.
   If ``syncfs`` itself fails, each file is synced on the descriptors that it was written through;
5. one transaction of the catalog has the records of all;
6. only then the slots become CLEAN that still are the current version of their block.

An error concerns one file where the backing can tell, and leaves its state as it was. A file whose write hangs is
left behind: the others go on without it.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import trio

from ..backing.ports import BackingStat, Piece, Run, SmallWrite
from ..media.ports import SlotState
from .cache import Cache
from .files import CachedFile
from .slots import DIRTY
from .steps import Part, edges_of, lose_damaged, note_synced, sync_names, transact_records, verified

log = logging.getLogger(__name__)
GROUP_FILES_MIN = 3  # fewer gain nothing: their passes share a commit of the backing's journal as well
GROUP_FILES_MAX = 128  # 2 ms of the loop to collect them, with a look at it in between
SHARE = 8  # of the files that may be kept open: several groups at once have theirs open as well
GROUP_BLOCKS = 1024  # 4 MiB at 4 KiB: a truncate or a slot waits no longer than for a pass
FILE_BLOCKS = 16  # more of one file go by direct I/O, in a pass of its own
FILE_CACHED = 64  # so many blocks are looked through for dirty ones
COLLECT_STRIDE = 32  # files between two looks at the loop
PATIENCE_S = 10.0  # with a file that hangs; the others then go on without it
FSYNC_S = 0.05  # of one file among several, until one has been measured
FADE_S = 10.0  # a slow syncfs counts half after that time: others may have written much just then
BIAS = 2.0  # a group saves time elsewhere, too

Alone = Callable[[CachedFile], None]
"""Called for each file that the group leaves out: it needs a pass of its own."""
Ended = Callable[[CachedFile, OSError | None], None]
"""Called for each file of a group that has been dealt with: with the error if it has failed."""

Leave = Callable[["Member", OSError | None], None]
"""Takes a member out of its group, with its error if it has failed."""


@dataclass(slots=True, eq=False)
class Member(Part):
    """A file of a group."""

    lost: npt.NDArray[np.bool_] | None = None
    """Which of its blocks are lost and not to be written, if any are."""


class Groups:
    """Passes over many small files."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._sync_lock = trio.Lock()
        self.most = max(GROUP_FILES_MIN, min(GROUP_FILES_MAX, cache.backing.most_kept_open // SHARE))
        """How many files a group has at most."""
        self._waiting = 0
        """Files whose groups wait for a ``syncfs``."""
        self._sync_s, self._measured_at = 0.0, 0.0
        """What the last ``syncfs`` took for each of its files, in seconds, and when (loop time)."""
        self._fsync_s = FSYNC_S
        """What a sync of one small file among several takes, in seconds."""

    def takes(self, file: CachedFile) -> bool:
        """Whether a file is small enough to be one of many."""
        return file.dirty <= FILE_BLOCKS and file.table.cached <= FILE_CACHED

    def worthwhile(self, files: int) -> bool:
        """Whether one ``syncfs`` is likely to be faster than a sync of each of so many files.

        It writes what others have made dirty on the same file system as well, so the last ones decide.
        """
        if files < GROUP_FILES_MIN or not self._cache.backing.sync_all_tells_files:
            return False
        faded: float = 0.5 ** min(60.0, (trio.current_time() - self._measured_at) / FADE_S)
        return self._sync_s * faded <= BIAS * self._fsync_s

    def note_sync(self, seconds: float) -> None:
        """A pass has synced one small file in this time, divided by how many passes there are at once."""
        self._fsync_s = (self._fsync_s + seconds) / 2

    async def write_back(self, files: Sequence[CachedFile], ended: Ended, alone: Alone) -> None:
        """Write back what is dirty of ``files``. A file that neither of the two is called for has hung."""
        members: list[Member] = []
        try:
            for number, file in enumerate(files):
                if member := self._hold(file):
                    members.append(member)
                else:
                    alone(file)
                if number % COLLECT_STRIDE == COLLECT_STRIDE - 1:
                    await trio.lowlevel.checkpoint()
            await self._write_back(members, ended, alone)
        finally:
            for member in members:
                self._release(member)

    def _hold(self, file: CachedFile) -> Member | None:
        """Take the lock of a file, and pin what is dirty; None if somebody else changes the backing file."""
        slots = self._cache.slots
        try:
            file.lock.acquire_nowait()
        except trio.WouldBlock:
            return None
        found: list[tuple[int, int]] = []
        if self.takes(file):  # still: it was chosen some time ago
            for numbers, places in file.table.walk():
                pairs = zip(numbers.tolist(), places.tolist(), strict=True)
                found += [pair for pair in pairs if slots.state[pair[1]] == DIRTY]
        if not found and not file.intents:
            self._cache.dirty.dequeue_if_clean(file)
            file.lock.release()
            return None
        pinned = np.array([slot for _, slot in found], np.int32)
        slots.pin(pinned)
        return Member(file, np.array([block for block, _ in found], np.int64), pinned, file.backing.sync_failures)

    def _release(self, member: Member) -> None:
        self._cache.slots.unpin(member.slots)
        member.file.lock.release()

    async def _write_back(self, members: list[Member], ended: Ended, alone: Alone) -> None:
        """Steps 2 to 6. A member that has been dealt with, or must not wait for others, leaves the list."""
        cache = self._cache
        if not members:
            return
        if cache.slots.deferred:
            # Else a crash could leave the backing ahead of the pool, whose older version then wins.
            await cache.blocks.persist()
        await self._verify(members)
        # Nothing has been changed in the backing so far. From here on it is.
        await cache.records.announce([member.file for member in members])
        for member in members:
            member.touches = member.file.touches
        by_backing = {member.file.backing: member for member in members}
        waiting = deque(self._write_of(member) for member in members)
        written: list[tuple[SmallWrite, OSError | None]] = []
        over = trio.Event()
        broken: list[OSError] = []

        async def write() -> None:
            try:
                await cache.backing.write_files(cache.data, waiting, written)
            except OSError as error:
                broken.append(error.with_traceback(None))
            finally:
                over.set()

        def leave(member: Member, error: OSError | None) -> None:
            members.remove(member)
            self._release(member)
            if error is not None:
                ended(member.file, error)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            with trio.move_on_after(PATIENCE_S):
                await over.wait()
            not_begun = [by_backing[each.file] for each in waiting]
            waiting.clear()
            for member in not_begun:
                leave(member, None)
                alone(member.file)
            complete: list[Member] = []
            for each, error in list(written):
                member = by_backing[each.file]
                if error is not None:
                    leave(member, error)
                else:
                    self._account(member, each)
                    complete.append(member)
            try:
                done = await self._complete(complete, leave)
            except OSError as error:
                broken, done = [*broken, error], []
            if broken:
                for member in [each for each in members if over.is_set() or each in complete]:
                    leave(member, broken[-1])
            for member in done:
                leave(member, None)
                self._cache.files.close_if_idle(member.file)
                ended(member.file, None)
        # A member that is still there has hung. It needs a pass of its own, which writes it again.

    async def _verify(self, members: Sequence[Member]) -> None:
        """Set aside the blocks that are not as they were written: they are lost, and not to be written (P5)."""
        cache = self._cache
        good = await verified(cache, np.concatenate([member.slots for member in members]))
        if good.all():
            return
        end = 0
        for member in members:
            first, end = end, end + len(member.slots)
            member.lost = ~good[first:end]
            lose_damaged(cache, member.file, member.blocks, member.slots, member.lost)

    def _write_of(self, member: Member) -> SmallWrite:
        """Step 3 for one file: blocks that it fills, and its end."""
        cache, file, size = self._cache, member.file, member.file.size
        member.mtime_ns, member.attr_seq = file.mtime_ns, cache.blocks.next_seq - 1
        blocks, slots = member.blocks, member.slots
        if member.lost is not None:
            blocks, slots = blocks[~member.lost], slots[~member.lost]
        whole = int(blocks.searchsorted(size >> cache.shift))
        runs = [
            Run(int(blocks[first]) << cache.shift, slots[first:end])
            for first, end in pairwise(edges_of(blocks[:whole]) if whole else [])
        ]
        tail: Piece | None = None
        if whole < len(blocks):
            length = size & cache.mask
            tail = Piece(size - length, int(slots[whole]) << cache.shift, length)
        return SmallWrite(file.backing, runs, tail, member.mtime_ns)

    def _account(self, member: Member, write: SmallWrite) -> None:
        """Note what the backing file has got."""
        cache, stats = self._cache, self._cache.stats.writeback
        for offset, places in write.runs:
            length = len(places) << cache.shift
            member.file.backing_size = max(member.file.backing_size, offset + length)
            stats.bytes += length
            stats.bounced_bytes += length
        if write.tail is not None:
            offset, _, length = write.tail
            member.file.backing_size = max(member.file.backing_size, offset + length)
            stats.bytes += length
            stats.bounced_bytes += length
        stats.runs += len(write.runs) + (write.tail is not None)

    async def _complete(self, members: Sequence[Member], leave: Leave) -> list[Member]:
        """Steps 4 to 6; which members are written back. The others have left."""
        cache = self._cache
        if not members:
            return []
        done: list[Member] = []
        for member, result in zip(members, await self._sync(members), strict=True):
            if not isinstance(result, OSError) and member.file.backing.sync_failures != member.failures_before:
                result = OSError(errno.EIO, "a sync of the file failed meanwhile")
            if isinstance(result, OSError):
                leave(member, result)
                continue
            note_synced(cache, member, result)
            done.append(member)
        if any(member.file.intents for member in done):
            await cache.blocks.persist_frees()  # what the intents have killed must be durably FREE before they go
        if done:
            await transact_records(cache, done)
            self._make_clean(done)
        return done

    async def _sync(self, members: Sequence[Member]) -> list[BackingStat | OSError]:
        """Step 4: what each of the files looks like once it is durable, or the error that concerns it."""
        backing, files = self._cache.backing, [member.file for member in members]
        try:
            await self._sync_all(len(files))
            together = True
        except OSError as error:
            together = False
            log.warning("a sync of the backing failed, each file is synced by itself: %s", error.strerror or error)
        results = await backing.finish_files([file.backing for file in files], synced=together)
        if not together:
            for index, file in enumerate(files):
                if not isinstance(results[index], OSError):
                    try:
                        await sync_names(self._cache, file)
                    except OSError as error:
                        results[index] = error
        return results

    async def _sync_all(self, files: int) -> None:
        """A ``syncfs`` that begins after this call, shared by all who wait for one. ``files``: it is for so many.

        :raises OSError: from the backing.
        """
        cache = self._cache
        begun = cache.syncs.begun
        self._waiting += files
        async with self._sync_lock:
            if cache.syncs.done > begun:
                return  # one that began while we waited has covered it
            started, covered, self._waiting = trio.current_time(), max(files, self._waiting), 0
            await cache.syncs.sync_all()
            self._measured_at = trio.current_time()
            self._sync_s = (self._measured_at - started) / covered

    def _make_clean(self, members: Sequence[Member]) -> None:
        """Step 6. A block that was written meanwhile has another slot by now, and stays dirty (H16): the pinned slot
        that it had is not DIRTY any more, and holds nothing else."""
        cache = self._cache
        pinned = np.concatenate([member.slots for member in members])
        dirty = cache.slots.in_state(pinned, DIRTY)
        cache.slots.change(pinned[dirty], SlotState.CLEAN)
        counts = np.add.accumulate(np.concatenate(([0], dirty)))
        end = 0
        for member in members:
            first, end = end, end + len(member.slots)
            member.file.dirty -= int(counts[end] - counts[first])
            cache.dirty.dequeue_if_clean(member.file)
        cache.slots.fence()
        cache.slots.freed.set()
