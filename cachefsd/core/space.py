"""Room in the backing for what is acknowledged: ENOSPC comes before the acknowledgement, not after it.

A block that is written where the backing has none yet (past its end, in a hole; anywhere if it copies on write) will
take space when it is written back. The account emulates the delayed allocation of file systems: of the space that the
backing says is available, what the dirty blocks may still take is *owed*, and a write may go on while there is room
beyond that and a margin for metadata.

A write asks with one comparison and one subtraction: it takes from a *budget*, which the account makes anew in the
background each second in which something was taken, and at once when it runs out. What is owed is an upper bound:
blocks are not accounted for one by one, and the budget is not given back when blocks become clean. So before a write
is refused, what is owed is made real: everything is written back, and the backing asked again.
"""

from __future__ import annotations

import errno
from contextlib import suppress

import trio

from ..wakeup import Signal
from .cache import Cache
from .files import CachedFile
from .slots import DIRTY
from .writeback import Writeback

AGE_S = 1.0
"""Others fill the backing as well: so old the budget may be."""
PATIENCE_S = 5.0
"""A backing that does not answer for so long can't be asked, and does not stop writers."""
FREED_S = 0.05
"""Between two looks whether space has come back that is being freed; AGE_S at most."""
_MARGIN = 1 << 20  # bytes for metadata, and for what transactions in flight reserve; at most 1 % of the file system
_COPY_MARGIN = 16 << 20  # the same with copy on write: trees from leaf to root until the next commit; at most 1/16
_MAX_UNIT = 64 << 10
_FILES_AT_ONCE = 8192
"""Files that are counted between two looks at the loop: 3 ms."""
_OWED_PER_MARGIN = 64  # blocks, per one for their metadata: a block of an extent tree of ext4 holds 340 extents


class Space:
    """The account of one engine.

    This becomes of a write for which the budget is too small (:meth:`find`). The first line that is true decides:

    | what is so                                                  | what is done                                |
    |-------------------------------------------------------------|---------------------------------------------|
    | all of its blocks are allocated, or owed already            | *granted* to just this write: it goes on    |
    | the budget is large enough once the backing has been asked  | it goes on                                  |
    | the backing has refused what is dirty of this file already  | it fails with the backing's error           |
    | its time is over                                            | ENOSPC                                      |
    | dirty blocks could be made real                             | some are written back, and again from above |
    | what was written back is uncommitted (copy on write)        | the backing is synced, and again from above |
    | the backing is about to free space                          | a moment's pause, and again from above      |
    | none of it                                                  | ENOSPC                                      |

    Each task that asks has an event in ``_asked``. A question to the backing takes all of these events when it begins,
    and sets them when it is answered. A task that asks while a question is under way waits for the next one, as the one
    under way may know too little.
    """

    def __init__(self, cache: Cache, writeback: Writeback) -> None:
        self.budget = 0
        """How many blocks may become dirty before the backing must be asked. Writes take from it themselves."""
        self._cache = cache
        self._writeback = writeback
        self._given = 0
        """All that was ever put into the budget: what was taken is the difference."""
        self._taken_when_asked = 0
        self._granted: tuple[CachedFile, int, int] | None = None
        """The blocks of a write that :meth:`find` has found to take no space: handed over to :meth:`has_room`."""
        self._running = False
        self._asked: list[trio.Event] = []
        """The events of tasks that wait for the answer to the next question."""
        self._wanted = Signal()
        """Somebody asks."""
        self._lock = trio.Lock()
        self._hastened_at = 0.0
        self._freed_at = -AGE_S

    # ---- for writers

    def has_room(self, file: CachedFile, first: int, count: int) -> bool:
        """Take ``count`` blocks from ``first`` on out of the budget; False when :meth:`find` must look for room.

        Whoever knows that the blocks end below ``file.allocated_to`` need not ask.
        """
        if self.budget >= count and not file.no_space:
            self.budget -= count
            return True
        granted, self._granted = self._granted, None
        return granted == (file, first, count)

    async def find(self, file: CachedFile, first: int, count: int, deadline: float) -> None:
        """Wait until :meth:`has_room` is true of these blocks, for a caller that asks it at once.

        :raises OSError: ENOSPC: there is no room for them, and none to be made until ``deadline`` (loop time). Or
            what the backing itself says when this file is written back: EDQUOT, ENOSPC.
        """
        while True:
            if not await self._takes_space(file, first, count):
                self._granted = (file, first, count)
                return
            await self.ask()
            if self.budget >= count and not file.no_space:
                return
            if file.no_space:
                raise OSError(file.no_space, "the backing has no space for what is dirty already")
            now = trio.current_time()
            if now >= deadline:
                raise _no_space()
            if self._can_be_made_real():
                await self._writeback.write_back_some(deadline)
            elif self._uncommitted:
                await self._cache.syncs.sync_all()
            elif self._cache.files.orphans or now < self._freed_at + AGE_S:
                await self._wait_for_what_was_freed()
            else:
                raise _no_space()

    async def _takes_space(self, file: CachedFile, first: int, count: int) -> bool:
        """Whether blocks would take space that is not owed yet. Exact, and slow.

        Most files have no holes: as far as they go, they need not ask again.
        """
        cache = self._cache
        start, allocated = first << cache.shift, 0
        if not cache.backing.overwrites_take_space:
            try:
                if not file.backing.writable:
                    await file.backing.open(write=False)
                known = file.allocated_to
                allocated = await file.backing.allocated_until(known)
                if file.allocated_to == known:  # not cut meanwhile
                    file.allocated_to = min(allocated, file.backing_size)
                if allocated < start:
                    allocated = await file.backing.allocated_until(start)
            except OSError:
                return True
        for block in range(first, first + count):
            slot = file.table.get(block)
            owed = slot >= 0 and cache.slots.state[slot] == DIRTY
            if not owed and (block + 1) << cache.shift > allocated:
                return True
        return False

    def freed(self) -> None:
        """The backing was told to free space: a file of it was cut or unlinked, or closed after that."""
        self._freed_at = trio.current_time()

    async def _wait_for_what_was_freed(self) -> None:
        """Unlinked files are reaped first, and closed then by a thread; with copy on write a commit has to follow."""
        if self._cache.files.orphans:
            self._cache.upkeep.set()
            self.freed()
        await trio.sleep(FREED_S)
        if self._cache.backing.overwrites_take_space:
            with suppress(OSError):
                await self._cache.syncs.sync_all()

    def _can_be_made_real(self) -> bool:
        return any(file.error is None and self._owed_by(file) for file in self._cache.dirty)

    # ---- what is owed

    @property
    def owed(self) -> int:
        """How many bytes the dirty blocks may still take in the backing, at most.

        With many files it is all that is dirty: to count for each of them takes too long for one turn of the loop.
        """
        due = self._cache.dirty
        if len(due) > _FILES_AT_ONCE:
            return self._all_dirty() << self._cache.shift
        return sum(map(self._owed_by, due)) + self._uncommitted << self._cache.shift

    def _all_dirty(self) -> int:
        return self._cache.slots.counts[DIRTY] + self._uncommitted

    async def _owed_blocks(self) -> int:
        """In pieces. What is written meanwhile has been taken from the budget, so its file may be missed."""
        files, owed = list(self._cache.dirty), 0
        for first in range(0, len(files), _FILES_AT_ONCE):
            if first:
                await trio.lowlevel.checkpoint()
            owed += sum(map(self._owed_by, files[first : first + _FILES_AT_ONCE]))
        return owed + self._uncommitted

    @property
    def _uncommitted(self) -> int:
        """With copy on write: blocks written back since the last commit. statvfs of btrfs does not know of them yet."""
        cache = self._cache
        if not cache.backing.overwrites_take_space:
            return 0
        return cache.stats.writeback.bytes - cache.syncs.written + cache.mask >> cache.shift

    def _owed_by(self, file: CachedFile) -> int:
        """In blocks. Dirty blocks of a file that nobody can reach any more are never written."""
        if file.unlinked and not file.ref_count:
            return 0
        beyond = file.size + self._cache.mask - file.allocated_to >> self._cache.shift
        return min(file.dirty, max(0, beyond))

    # ---- asking

    async def run(self) -> None:
        """Keep the budget up to date, until cancelled."""
        self._running = True
        try:
            wanted = self._wanted.next
            while True:
                with trio.move_on_after(AGE_S):
                    await wanted.wait()
                wanted = self._wanted.next
                if self._asked or self._taken != self._taken_when_asked or self._writeback.short_of_space:
                    await self._ask()
        finally:
            self._running = False

    async def ask(self) -> None:
        """Make the budget anew. A backing that fails, or does not answer, leaves it as large as the cache."""
        if not self._running:
            await self._ask()
            return
        answered = trio.Event()
        self._asked.append(answered)
        self._wanted.set()
        with trio.move_on_after(PATIENCE_S):
            await answered.wait()
            return
        self._set_budget(max(self.budget, self._cache.pool.slots))

    async def _ask(self) -> None:
        async with self._lock:
            asked, self._asked = self._asked, []
            try:
                await self._make_budget()
            except BaseException:
                self._asked += asked  # they get the answer to the next question
                raise
            for answered in asked:
                answered.set()
        await self._hasten()

    async def _make_budget(self) -> None:
        """Ask the backing, and make the budget of what it says."""
        # First with a bound that takes no counting; most of the time there is far more space than that.
        for exact in (False, True):
            # Before the question: what is written back meanwhile is counted twice rather than not at all.
            taken = self._taken
            owed = await self._owed_blocks() if exact else self._all_dirty()
            room = await self._room_beyond(owed)
            self._set_budget(room - (self._taken - taken))
            if room >= self._cache.pool.slots:
                break
        self._taken_when_asked = self._taken

    async def _room_beyond(self, owed: int) -> int:
        """How many blocks the backing has room for beside so many that it is owed."""
        cache = self._cache
        try:
            space = await cache.backing.space()
        except OSError:
            return cache.pool.slots
        if not space.total:
            return cache.pool.slots  # some network file systems do not say
        # A block may take that much. Network file systems say how large their requests are instead.
        unit = max(space.unit if space.unit <= _MAX_UNIT else 0, cache.block_size)
        copies = cache.backing.overwrites_take_space
        fixed = min(_COPY_MARGIN, space.total // 16) if copies else min(_MARGIN, space.total // 100)
        return (space.available - fixed) // unit - owed - owed // _OWED_PER_MARGIN

    @property
    def _taken(self) -> int:
        return self._given - self.budget

    def _set_budget(self, blocks: int) -> None:
        self._given += blocks - self.budget
        self.budget = blocks

    async def _hasten(self) -> None:
        """Space has come back: files that failed for want of it are tried again before their time."""
        cache, now = self._cache, trio.current_time()
        if not self._writeback.short_of_space or now < self._hastened_at + AGE_S:
            return
        files, short = list(cache.dirty), list[CachedFile]()
        for first in range(0, len(files), _FILES_AT_ONCE):
            if first:
                await trio.lowlevel.checkpoint()
            short += [file for file in files[first : first + _FILES_AT_ONCE] if file.no_space]
        self._writeback.note_short(bool(short))
        if self.budget > 0 and short:
            self._hastened_at = now
            for file in short:
                self._writeback.retry(file, now)
            cache.dirty.work.set()


def _no_space() -> OSError:
    return OSError(errno.ENOSPC, "no space in the backing")
