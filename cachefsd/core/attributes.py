"""Size and times of files: changed where they are, in headers and intents, and in the backing's inode.

A size is the backing's or the end of the last dirty block; a time is that of the newest header, intent or
record (docs/design.md §6). So a truncate leaves an intent where older versions of blocks might come back, and a time
that comes without data a new version of a dirty block.
"""

from __future__ import annotations

from array import array
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from ..media.ports import Buffer, Changes, Intent
from .blocktable import ABSENT
from .cache import Cache
from .files import CUT, CachedFile
from .slots import CLEAN, DIRTY, QUARANTINED
from .space import Space

SEARCHED_AT_ONCE = 64  # chunks of a file's table between two looks at the loop: 0.5 ms


class Attributes:
    """What users change of a file but its data and names."""

    def __init__(self, cache: Cache, space: Space) -> None:
        self._cache = cache
        self._space = space
        self._shift, self._mask = cache.shift, cache.mask

    async def truncate(self, file: CachedFile, size: int) -> None:
        """Set the size, durably as far as dirty data is concerned; mtime and ctime become now.

        :raises OSError: from the backing; then nothing has changed.
        """
        cache = self._cache
        cache.health.check()
        await file.until_truncate_done()
        if size == file.size and file.dirty:
            # The kernel asks for this when a write that would have made the file longer has failed. The
            # backing may be the reason and not answer: it gets times with the data.
            await self._retime_at_once(file, cache.now_ns())
            return
        # Room for a new version of a block is taken before anything is locked: what frees slots may need
        # the lock.
        spare = await self._spare_slot() if size & self._mask or file.dirty else None
        try:
            async with file.lock:
                with file.cut():
                    await self._truncate_locked(file, size, spare)
        finally:
            if spare:
                cache.slots.give_back(spare)

    @asynccontextmanager
    async def changing(self, file: CachedFile) -> AsyncIterator[None]:
        """Around a change of the mtime of the backing inode that the caller makes."""
        file.changing += 1
        try:
            await self._cache.records.touch(file)
            yield
        finally:
            file.changing -= 1
            file.touches += 1

    async def _spare_slot(self) -> array[int]:
        """One slot, taken; whoever uses it empties the array, and the rest is given back."""
        deadline = trio.current_time() + self._cache.options.full_timeout_s
        while (taken := self._cache.slots.take(1)) is None:
            await self._cache.room.wait(deadline)
        return taken

    async def _truncate_locked(self, file: CachedFile, size: int, spare: array[int] | None) -> None:
        if not file.backing.writable:
            await file.backing.open(write=True)
        # A crash after the intent cuts the file: from there on the truncate is gone through with.
        with trio.CancelScope(shield=True):
            await self._truncate_both(file, size, spare)

    async def _truncate_both(self, file: CachedFile, size: int, spare: array[int] | None) -> None:
        """Set the size in the backing and in the cache."""
        cache = self._cache
        shrinks = size < file.size
        # Even without dirty data: a power cut may lose the backing's truncate and keep a write that comes
        # after it, and what was cut off would be back behind that. Older intents force a new one also
        # where the file grows, else recovery would stop at the size that they name.
        intent: Intent | None = None
        if shrinks or file.intents:
            await cache.records.record(file)
            intent = Intent(file.file_id, cache.blocks.take_seq(), size, cache.now_ns())
            await cache.records.transact(lambda: Changes(add_intents=[intent]))
        else:
            await cache.records.touch(file)
        touches = file.touches
        # With an intent a crash finds the size before it or that of an intent, and knows both for ours.
        try:
            stat = await file.backing.truncate(size)
        except OSError:
            if intent is not None:
                drop = [(intent.file_id, intent.seq)]
                await cache.records.transact(
                    lambda: Changes(drop_intents=drop, add_intents=list(file.intents)), essential=True
                )
            raise
        if intent is None:
            cache.records.note_stamp(file, stat, touches=touches)
        else:
            file.intents.append(intent)
            if file not in cache.dirty:
                cache.dirty.enqueue(file)
        file.backing_size = size
        file.allocated_to = min(file.allocated_to, size)
        self._space.freed()
        # What a crash would find: the intent, a version of a block, or the backing itself says the time.
        now = stat.mtime_ns if intent is None else intent.mtime_ns
        if shrinks:
            with file.published_by_truncate():
                self._cut(file, size, spare, now)
        file.size = size
        file.mtime_ns, file.ctime_ns = now, max(now, stat.ctime_ns)
        file.needs_sync = True
        cache.files.stamp_later(file)
        if shrinks:
            # Nobody sees these blocks any more, and until the last is gone no other may take the place of one.
            for _ in cache.blocks.remove_pieces(file, (size + self._mask) >> self._shift):
                await trio.lowlevel.checkpoint()
        while intent is None and spare and (block := await self._dirty_block(file)) >= 0:
            with file.published_by_truncate():
                if self._retime(file, block, spare, now):
                    break

    def _cut(self, file: CachedFile, size: int, spare: array[int] | None, now: int) -> None:
        """Forget reads of what lies beyond ``size``, and zero the rest of the last block."""
        cache, block_size = self._cache, self._cache.block_size
        for block in [b for b in file.fetches if b >= size >> self._shift]:
            del file.fetches[block]
        block, rest = size >> self._shift, size & self._mask
        slot = file.table.get(block) if rest else -1
        if slot < 0:
            return
        if cache.slots.state[slot] == DIRTY:
            with suppress(OSError):  # lost, and reported
                cache.integrity.verify(file, block, slot)
        if cache.slots.state[slot] == CLEAN:
            cache.blocks.remove(file, block, slot)  # the backing has zeroed the rest
        elif cache.slots.state[slot] == DIRTY and spare:
            image = bytearray(block_size)
            image[:rest] = cache.data[slot * block_size : slot * block_size + rest]
            self._commit_one(file, block, spare, image, size, now)
        elif cache.slots.state[slot] == QUARANTINED and spare:
            cache.integrity.still_lost(file, block, spare.pop(), size, now)

    def _commit_one(self, file: CachedFile, block: int, spare: array[int], image: Buffer, end: int, now: int) -> None:
        taken = spare[:]
        del spare[:]
        self._cache.blocks.commit(file, block, [image], taken, end, now)

    async def set_mtime_of_dirty(self, file: CachedFile, mtime_ns: int) -> bool:
        """Set mtime, durably, of a file with dirty data, with which it goes to the backing; ctime is now.

        False, and nothing has changed, if there is none, or if only the backing can tell what it makes of the time.
        """
        kept_ns = self._cache.backing.times.of(mtime_ns)
        return kept_ns is not None and await self._set_mtime_of_dirty(file, kept_ns)

    async def _set_mtime_of_dirty(self, file: CachedFile, mtime_ns: int) -> bool:
        while file.dirty:
            self._cache.health.check()
            await file.until_truncate_done()
            spare = await self._spare_slot()
            try:
                block = await self._dirty_block(file)
                if file.life is CUT:
                    continue  # a truncate has begun while we waited
                if block >= 0 and self._retime(file, block, spare, mtime_ns):
                    file.mtime_ns, file.ctime_ns = mtime_ns, self._cache.now_ns()
                    return True
            finally:
                self._cache.slots.give_back(spare)
        return False

    async def _retime_at_once(self, file: CachedFile, now: int) -> None:
        """Set the times of a file with dirty data, without waiting for a slot: in memory, and in a header if there is
        one to be had."""
        while (block := await self._dirty_block(file)) >= 0:
            await file.until_truncate_done()
            if not (taken := self._cache.slots.take(1)):
                break
            done = self._retime(file, block, taken, now)
            self._cache.slots.give_back(taken)
            if done:
                break
        file.mtime_ns = file.ctime_ns = now

    async def set_mtime(self, file: CachedFile, mtime_ns: int, kept_ns: int | None = None) -> None:
        """Set the visible mtime; the caller has set it on the backing inode already, within
        :meth:`changing`; the inode then had ``kept_ns``.

        Headers of dirty blocks would bring the time of the last write back after a crash, so one of
        them is published again, with the new time and a newer seq; or an intent, where there are none.
        """
        mtime_ns = self._cache.kept_time(mtime_ns, mtime_ns if kept_ns is None else kept_ns)
        if file.intents:
            self._cache.health.check()
        if not await self._set_mtime_of_dirty(file, mtime_ns) and (file.lock.locked() or file.intents):
            # A writeback pass at its end may just have put the older time back.
            async with file.lock:
                if file.intents:
                    again = file.intents[-1]._replace(mtime_ns=mtime_ns)
                    await self._cache.records.transact(lambda: Changes(add_intents=[again]))
                    # From here on a crash brings this time, and the pass that ends the intent sets it.
                    file.intents[-1] = again
                else:
                    await file.backing.open(write=True)
                    await file.backing.set_mtime(mtime_ns)
        file.mtime_ns = mtime_ns
        self.changed(file)

    async def _dirty_block(self, file: CachedFile) -> int:
        """A dirty block, or ABSENT. The last one that was written most likely is; else the table is searched."""
        slots = self._cache.slots
        slot = file.table.get(file.newest)
        if slot >= 0 and slots.state[slot] == DIRTY:
            return file.newest
        if not file.dirty:
            return ABSENT
        for number, (blocks, places) in enumerate(file.table.walk(), 1):
            dirty = slots.in_state(places, DIRTY)
            if dirty.any():
                return int(blocks[dirty][0])
            if number % SEARCHED_AT_ONCE == 0:
                await trio.lowlevel.checkpoint()
        return ABSENT

    def _retime(self, file: CachedFile, block: int, spare: array[int], mtime_ns: int) -> bool:
        """Publish a block again with another mtime; False if it is not dirty any more, or lost."""
        cache, size = self._cache, self._cache.block_size
        slot = file.table.get(block)
        if slot < 0 or cache.slots.state[slot] != DIRTY:
            return False
        try:
            cache.integrity.verify(file, block, slot)
        except OSError:
            return False  # lost, and reported; another block will do
        image = bytes(cache.data[slot * size : (slot + 1) * size])
        self._commit_one(file, block, spare, image, file.size, mtime_ns)
        return True

    def changed(self, file: CachedFile) -> None:
        """The backing inode was changed for a user: ctime is now, the next fsync must reach the backing."""
        file.ctime_ns = self._cache.now_ns()
        file.needs_sync = True
        if file.recorded:
            self._cache.files.stamp_later(file)
