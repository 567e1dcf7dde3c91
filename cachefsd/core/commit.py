"""The commit protocol: how versions of blocks become durable and current, and how they go.

It has these steps (docs/design.md §6); :meth:`BlockStore.commit` runs them for one request, and
:meth:`BlockStore.commit_block` for a request of one whole block:

1. take slots for the whole request, from the fenced-free list;
2. build each block's image and checksum it;
3. copy the images to the slots and persist them: **fence A**;
4. store the headers and persist them: **fence B**;
5. publish in memory, retire the predecessors; their slots come back after a later fence, which the
   next operation's fence A gives for free;
6. the caller acknowledges.

All of it runs between two awaits, in one thread: that is the critical section (docs/concurrency.md). Few blocks are
published one by one, many as a run by numpy: :meth:`BlockStore.publish` decides that, for new data and for what was
fetched.

In class ``disk`` a fence orders nothing, and :meth:`BlockStore.persist` makes durable what was published before it.
"""

from __future__ import annotations

import logging
from array import array
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..media.ports import Buffer, Pool, SlotState
from ..runs import numbers_of, slot_index, stretches
from .dirtyqueue import DirtyQueue
from .files import CUT, CachedFile
from .health import Health
from .offload import RunBlocking
from .slots import CLEAN, DIRTY, NOBODY, QUARANTINED, SET_ASIDE, Slots

log = logging.getLogger(__name__)
_DIRTY = SlotState.DIRTY  # for the hot path: an attribute of an enumeration costs more than a global name
REMOVED_AT_ONCE = 8  # chunks of a file's table, of 256 blocks each, that are dropped before the loop turns: 1 ms


class BlockStore:
    """The cached blocks of all files."""

    def __init__(self, pool: Pool, slots: Slots, queue: DirtyQueue, health: Health, run_blocking: RunBlocking) -> None:
        self.next_seq = 1
        self.persisted_seq = pool.persisted_seq
        """Class ``disk``: all versions up to this one are durable."""
        self.lock = trio.Lock()
        """Class ``disk``: held while the pool is synced."""
        self._pool = pool
        self._slots = slots
        self._queue = queue
        self._health = health
        self._run_blocking = run_blocking
        self._block_size = pool.block_size
        self._shift = pool.block_size.bit_length() - 1
        self._cuts: list[slice] = []
        """The first, second, ... block of an image, as far as they were needed: to make them costs as much as half of a
        checksum."""

    def begin_at(self, seq: int) -> None:
        """The first seq that no version has, as recovery has found."""
        self.next_seq = seq

    def take_seq(self) -> int:
        """A seq for something else that must be in order with the versions."""
        self.next_seq += 1
        return self.next_seq - 1

    # ---- new data

    def commit_block(self, file: CachedFile, block: int, image: Buffer, slot: int, now: int) -> bool:
        """:meth:`commit` for one block that the file fills; whether it replaces a cached one."""
        checksum = xxh3_64_intdigest(image)
        self._pool.write(slot, image)
        self._slots.fence()  # A
        return self.publish_one(file, block, slot, _DIRTY, checksum, now, self._block_size)

    def commit(
        self, file: CachedFile, first: int, images: Sequence[Buffer], taken: array[int], end: int, now: int
    ) -> None:
        """Make new versions of consecutive blocks durable and current (steps 3 to 5).

        ``images`` are whole blocks, one or more each; ``taken`` are their slots, and ``end`` is the size that the
        file then has.
        """
        pool, size, done = self._pool, self._block_size, 0
        checksums = self.checksums(images)
        for image in images:
            places, at = taken[done : done + len(image) // size], 0
            for slot, count in stretches(slot_index(places)):
                pool.write(slot, image[at : at + count * size])
                at += count * size
            done += len(places)
        self._slots.fence()  # A: data before header (O1); also what was retired before becomes reusable
        self.publish(file, first, taken, _DIRTY, checksums, now, end)

    def checksums(self, images: Iterable[Buffer]) -> list[int]:
        """Of each block of ``images``, which are whole blocks, one or more each."""
        size, cuts = self._block_size, self._cuts
        found: list[int] = []
        for image in images:
            count = len(image) // size
            while len(cuts) < count:
                cuts.append(slice(len(cuts) * size, (len(cuts) + 1) * size))
            found += [xxh3_64_intdigest(image[cut]) for cut in cuts[:count]]
        return found

    # ---- headers

    def publish(
        self,
        file: CachedFile,
        first: int,
        slots: array[int],
        state: SlotState,
        checksums: Sequence[int],
        mtime_ns: int,
        end: int,
    ) -> None:
        """Steps 4 and 5 for consecutive blocks of a file that has ``end`` bytes: their data is in ``slots``, and
        fenced."""
        # Between a truncate's intent and its end a version would have a seq above the intent's and outlive it.
        assert file.life is not CUT, "a version is published within a truncate"
        pool, count, seq = self._pool, len(slots), self.next_seq
        self.next_seq = seq + count
        last = first + count - 1
        length = min(self._block_size, end - (last << self._shift))  # only the last one may be short
        if count < self._slots.vector_min_blocks:
            for index, (slot, checksum) in enumerate(zip(slots, checksums, strict=True)):
                size = self._block_size if first + index < last else length
                pool.publish(slot, state, seq + index, file.file_id, first + index, checksum, mtime_ns, size)
            pool.fence()  # B: headers before acknowledgement (O2) and before the predecessors' FREE (O3)
            for block, slot in enumerate(slots, first):
                self._install(file, block, slot, state)
        else:
            sums = np.array(checksums, np.uint64)
            pool.publish_run(slot_index(slots), state, seq, file.file_id, first, sums, mtime_ns, length)
            pool.fence()  # B
            self._install_run(file, first, slots, state)

    def publish_one(
        self, file: CachedFile, block: int, slot: int, state: SlotState, checksum: int, mtime_ns: int, length: int
    ) -> bool:
        """:meth:`publish` for one block; whether another version was cached."""
        assert file.life is not CUT, "a version is published within a truncate"
        pool, seq = self._pool, self.next_seq
        self.next_seq = seq + 1
        pool.publish(slot, state, seq, file.file_id, block, checksum, mtime_ns, length)
        pool.fence()  # B: header before acknowledgement (O2) and before the predecessor's FREE (O3)
        return self._install(file, block, slot, state)

    def _install(self, file: CachedFile, block: int, slot: int, state: SlotState) -> bool:
        """Step 5 for one block; whether another version was cached."""
        slots = self._slots
        if state is _DIRTY:
            file.newest = block
            self._queue.add_blocks(file, 1)
            if file.fetches:
                file.fetches.pop(block, None)  # what is being read from the backing is old now (H26)
        old = file.table.put(block, slot)
        slots.occupy(slot, state, file.file_id, block)
        if old < 0:
            slots.policy.admitted(slot)
            return False
        if slots.state[old] == DIRTY:
            file.dirty -= 1
        slots.policy.touched(slot)
        slots.supersede(old, slot)
        return True

    def _install_run(self, file: CachedFile, first: int, slots: array[int], state: SlotState) -> None:
        """Step 5 for consecutive blocks, many of them."""
        count, new = len(slots), slot_index(slots)
        if state is _DIRTY:
            file.newest = first
            self._queue.add_blocks(file, count)
            if file.fetches:
                for block in range(first, first + count):
                    file.fetches.pop(block, None)
        old = slot_index(file.table.put_run(first, slots))
        self._slots.occupy_run(new, state, file.file_id, first, count)
        if not isinstance(old, slice):
            places, replaced = numbers_of(new, np.int32), old >= 0
            self._slots.policy.admitted_all(places[~replaced])
            new, old = places[replaced], old[replaced]
            if not len(old):
                return
        self._slots.policy.touched_all(new)
        file.dirty -= self._slots.supersede_run(old, new)[DIRTY]

    def set_aside(self, slot: int) -> None:
        """Never use a free slot again, whose media are bad, not even after a restart: its header says so."""
        log.error("slot %d of the pool is on bad media: it is set aside and not used again", slot)
        self._pool.publish(slot, SlotState.QUARANTINED, self.take_seq(), NOBODY, slot, 0, 0, self._block_size)
        self._slots.occupy(slot, QUARANTINED, SET_ASIDE, slot)
        self._slots.note_lost(slot)

    # ---- dropping blocks without writing them

    def remove(self, file: CachedFile, block: int, slot: int) -> None:
        """Drop a cached block of ``file``."""
        self._remove(file, np.array([block]), np.array([slot], np.int32))

    def remove_all(self, file: CachedFile, first: int = 0, *, only_clean: bool = False) -> None:
        """Drop the cached blocks of ``file`` from ``first`` on, or just the clean ones of them."""
        for _ in self.remove_pieces(file, first, only_clean=only_clean):
            pass

    def remove_pieces(self, file: CachedFile, first: int = 0, *, only_clean: bool = False) -> Iterator[None]:
        """:meth:`remove_all` in pieces, for who lets the loop turn between two of them. In between the accounts are
        right; that nobody minds a part of the blocks is for the caller to see to."""
        blocks: list[npt.NDArray[np.int64]] = []
        places: list[npt.NDArray[np.int32]] = []
        for looked_at, (numbers, slots) in enumerate(file.table.walk(first), 1):
            if only_clean:
                clean = self._slots.in_state(slots, CLEAN)  # neither dirty ones nor those that are lost
                numbers, slots = numbers[clean], slots[clean]
            blocks.append(numbers)
            places.append(slots)
            if looked_at % REMOVED_AT_ONCE == 0:
                self._remove(file, np.concatenate(blocks), np.concatenate(places))
                blocks.clear()
                places.clear()
                yield
        if blocks:
            self._remove(file, np.concatenate(blocks), np.concatenate(places))
            yield

    def _remove(self, file: CachedFile, blocks: npt.NDArray[np.int64], places: npt.NDArray[np.int32]) -> None:
        if not len(blocks):
            return
        file.table.remove(blocks.view(np.uint64))
        file.dirty -= self._slots.drop(array("i", places.tobytes()))[DIRTY]
        self._slots.fence()
        self._queue.dequeue_if_clean(file)
        self._slots.freed.set()

    # ---- class disk

    async def persist(self) -> None:
        """Make everything stored so far durable. Without an await but in class ``disk``."""
        if not self._slots.deferred:
            self._slots.fence()
            return
        wanted = self.next_seq - 1
        async with self.lock:
            # A clean block that a crash makes dirty again would bring the mtime of its last writeback back.
            if self.persisted_seq >= wanted and not (self._slots.unpersisted or self._slots.changed_since_persist):
                return  # the sync that we waited for has covered it
            self._health.check()
            seq, covered = self.next_seq - 1, self._slots.persist_begin()
            try:
                await self._run_blocking(self._pool.sync)
                await self._run_blocking(self._pool.mark_persisted, seq)
            except BaseException as error:  # a cancellation may come between the two
                self._slots.persist_failed(covered)
                if isinstance(error, OSError):
                    self._health.fail(error)
                raise
            with trio.CancelScope(shield=True):  # it is done: what it has covered must not wait for another one
                for _ in self._slots.persist_end(covered):
                    await trio.lowlevel.checkpoint()
            self.persisted_seq = seq
        self._slots.freed.set()

    async def persist_frees(self) -> None:
        """Make every FREE so far durable: before something that remembers the dead is deleted."""
        await self.persist()
        if self._slots.deferred:
            await self.persist()  # the FREEs of versions whose successors the first one has made durable
