"""What every slot holds, and how slots are taken, given back and reused.

This is the one place that knows when a slot may be reused. A slot is *live* while its header says CLEAN,
DIRTY or QUARANTINED. Retiring it stores FREE in its header; it may hold another block only when that
store is durable, else a crash could join the new block's header fields with the old state (hazard H5), or
bring an old version back as the only one (H15). Where a fence makes stores durable (classes ``pmem`` and
``ram``) the next fence settles that. In class ``disk`` there is one more wait: the old version stays live
until a sync of the pool has made its successor durable.
"""

from __future__ import annotations

import errno
from array import array
from collections.abc import Callable, Iterable, Iterator

import numpy as np
import numpy.typing as npt

from ..media.ports import U8, U64, Durability, Pool, SlotState
from ..runs import SlotIndex, numbers_of, slot_index, stretches
from ..wakeup import Signal
from .policy import ReplacementPolicy

FREE, CLEAN, DIRTY, QUARANTINED = (int(state) for state in SlotState)
NOBODY = 0
"""The owner of a slot whose header is damaged; no file has this id."""
SET_ASIDE = (1 << 64) - 1
"""The owner of a slot whose media are bad: it holds nothing, and is never used again. Its header names file NOBODY."""
PREPARED_BYTES = 256 << 10
"""Free slots are prepared for stores so many bytes at a time, or as many as are wanted: some 60 us."""
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)
FREED_AT_ONCE = 8192
"""Slots that a sync of the pool has covered and that are freed before the loop turns: 2 ms."""
Covered = tuple["array[int]", "array[int]"]
"""What a sync of the pool covers: :attr:`Slots.superseded` and :attr:`Slots.retired`."""
EVICTION_BATCH = 64  # one fence and one numpy sweep are shared by this many evictions


class Slots:
    """The slots of a pool in memory: 20 bytes each (21 in class ``disk``), beside 4 in the block tables.

    ``state[slot]`` is the state last stored in the header; ``owner`` and ``block`` mean something for
    live slots. Invariant: ``free + retired + superseded + taken + live = all``, where *taken* slots are in
    the hands of an operation that has not published them yet.
    """

    vector_min_blocks = 16
    """From so many blocks on a step is one of numpy, not a loop. Writing 16 takes 60 us by loop, 40 us by numpy and
    65 us by numpy if the slots do not lie side by side; 256 take 930 us and 180 us."""

    def __init__(
        self,
        pool: Pool,
        policy: ReplacementPolicy,
        on_evict: Callable[[U64, U64], None],
        on_bad: Callable[[int], None],
    ) -> None:
        """``on_bad`` is called with a free slot that must never be used again."""
        count = pool.slots
        self._pool = pool
        self._on_evict = on_evict
        self._on_bad = on_bad
        self.policy = policy
        self.deferred = pool.durability is Durability.DISK
        self.state = bytearray(count)
        self.verified = bytearray(count)
        """1: the data has matched its checksum since the daemon started"""
        self.pins = bytearray(count)
        """I/O in flight on the slot's data: not to be reused or evicted"""
        self.guarded = bytearray(count)
        """>0: an older version of the block may still come back; never the first to become FREE"""
        self.owner = array("Q", bytes(8 * count))
        self.block = array("Q", bytes(8 * count))
        self.free = array("i")
        """Fenced-free slots, a stack; adjacent slots lie in descending order so that runs pop ascending."""
        self.untouched = array("i")
        """Class ``disk``: free as well, but no page of their data may be in memory yet; a stack."""
        self.touched = bytearray(count if self.deferred else 0)
        """Class ``disk``: 1: the slot has been prepared for stores since the daemon started"""
        self.suspect: set[int] = set()
        """Slots whose data could not be read, or was lost: they are read again before they are reused."""
        self.retired = array("i")
        """FREE is stored, not yet durable."""
        self.superseded = array("i")
        """Class ``disk``: old slots, each followed by its successor, waiting for a sync of the pool."""
        self._limbo: set[int] = set()
        """Durably FREE, but pinned."""
        self.counts = [0, 0, 0, 0]
        """live slots by state; index FREE is unused"""
        self.changed_since_persist = False
        """Class ``disk``: live slots have changed their state since the last sync of the pool began."""
        self.evictions = 0
        self.freed = Signal()
        """Set when slots may have become free or evictable."""
        self.searching = False
        """What :meth:`take` has looked for may be there all the same: the search has ended early, and the next call
        goes on with it."""
        self._unguard_next = array("i")
        self._quarantined: set[int] = set()
        """all quarantined slots, and such as were"""
        self._owner_np = np.frombuffer(self.owner, np.uint64)
        self._block_np = np.frombuffer(self.block, np.uint64)
        self._state_np = np.frombuffer(self.state, np.uint8)
        self._verified_np = np.frombuffer(self.verified, np.uint8)
        self._pins_np = np.frombuffer(self.pins, np.uint8)
        self._guarded_np = np.frombuffer(self.guarded, np.uint8)

    # ---- the start

    def load(self, state: U8, owner: U64, block: U64, retired: list[int]) -> None:
        """Take up what recovery has found: arrays over all slots, and slots whose FREE is just stored."""
        self._state_np[:] = state
        self._owner_np[:] = owner
        self._block_np[:] = block
        self.counts = [0, *(int(np.count_nonzero(state == s)) for s in (CLEAN, DIRTY, QUARANTINED))]
        self._quarantined = set(np.flatnonzero(state == QUARANTINED).tolist())
        self.retired = array("i", retired)
        free = state == FREE
        free[retired] = False
        stack = array("i", np.flatnonzero(free)[::-1].astype(np.int32).tobytes())
        if self.deferred:
            self.untouched = stack
        else:
            self.free = stack
        lost = (state == QUARANTINED) & (owner != np.uint64(NOBODY)) & (owner != np.uint64(SET_ASIDE))
        self.suspect = set(np.flatnonzero(lost).tolist())

    # ---- publishing and states

    def occupy(self, slot: int, state: int, owner: int, block: int) -> None:
        """Note that ``slot`` has been published for a block of a file."""
        self.state[slot] = state
        self.owner[slot] = owner
        self.block[slot] = block
        self.verified[slot] = 1
        self.counts[state] += 1

    def occupy_run(self, places: SlotIndex, state: int, owner: int, first: int, count: int) -> None:
        """:meth:`occupy` for the ``count`` blocks from ``first`` on."""
        self._state_np[places] = state
        self._owner_np[places] = owner
        self._block_np[places] = np.arange(first, first + count, dtype=np.uint64)
        self._verified_np[places] = 1
        self.counts[state] += count

    def change(self, places: SlotIndex, state: SlotState) -> None:
        """Move live slots to another live state, on the media too."""
        if state == QUARANTINED:
            self._quarantined.update(numbers_of(places, np.int32).tolist())
            self._verified_np[places] = 0
        self.counts[state] += sum(self._uncount(places))
        self._state_np[places] = state
        self._pool.set_states(places, state)
        self.changed_since_persist = self.deferred

    def supersede(self, old: int, new: int) -> None:
        """Retire ``old`` because ``new``, published and fenced, holds a newer version of its block."""
        if self.deferred:
            self._forget(old)
            self.superseded.extend((old, new))
            self.guarded[new] += 1
        else:
            self._retire(old)

    def supersede_run(self, old: SlotIndex, new: SlotIndex) -> list[int]:
        """:meth:`supersede` for many; how many of the old ones were in each state."""
        if self.deferred:
            pairs = np.stack((numbers_of(old, np.int32), numbers_of(new, np.int32)), axis=1)
            self.superseded.frombytes(pairs.tobytes())
            self._guarded_np[new] += 1
            return self._forget_all(old)
        return self._retire_all(old)

    def drop(self, slots: array[int]) -> list[int]:
        """Retire live slots that have no successor (eviction, truncate, unlink); how many were in each state.

        What would come back instead of them must be durably gone first (H15), hence the fence.
        """
        if self.retired and not self.deferred:
            self.fence()
        return self._retire_all(slot_index(slots))

    def _retire(self, slot: int) -> None:
        self._forget(slot)
        self._pool.set_state(slot, SlotState.FREE)
        self.retired.append(slot)

    def _forget(self, slot: int) -> None:
        self.counts[self.state[slot]] -= 1
        self.state[slot] = FREE
        self.verified[slot] = 0

    def _retire_all(self, places: SlotIndex) -> list[int]:
        gone = self._forget_all(places)
        self._pool.set_states(places, SlotState.FREE)
        self.retired.frombytes(numbers_of(places, np.int32).tobytes())
        return gone

    def _forget_all(self, places: SlotIndex) -> list[int]:
        gone = self._uncount(places)
        self._state_np[places] = FREE
        self._verified_np[places] = 0
        return gone

    def _uncount(self, places: SlotIndex) -> list[int]:
        """Take live slots out of ``counts``; how many of each state they are."""
        states = self._state_np[places].tobytes()
        gone = [0, states.count(CLEAN), states.count(DIRTY), states.count(QUARANTINED)]
        for state in (CLEAN, DIRTY, QUARANTINED):
            self.counts[state] -= gone[state]
        return gone

    # ---- durability

    def fence(self) -> None:
        """Fence the pool; where that makes stores durable, what was retired before becomes free."""
        self._pool.fence()
        retired = self.retired
        if not retired or self.deferred:
            return
        if len(retired) == 1 and not self.pins[retired[0]] and not self.suspect:
            self.free.append(retired.pop())  # what one overwritten block leaves: the hot path
        else:
            self.retired = array("i")
            self._release(retired)

    def persist_begin(self) -> Covered:
        """Class ``disk``: what the sync that now starts will cover; pass it to :meth:`persist_end`."""
        covered = self.superseded, self.retired
        self.superseded, self.retired, self.changed_since_persist = array("i"), array("i"), False
        return covered

    def persist_end(self, covered: Covered) -> Iterator[None]:
        """The sync was good: free what was retired before it, retire what it has superseded; piece by piece."""
        superseded, retired = covered
        # A successor stays guarded until the FREE of its predecessor is durable: one more sync of the pool.
        self._unguard_next, done = superseded[1::2], self._unguard_next
        if done:
            self._guarded_np[np.frombuffer(done, np.int32)] -= 1
        for first in range(0, len(retired), FREED_AT_ONCE):
            self._release(retired[first : first + FREED_AT_ONCE])
            yield
        old = superseded[0::2]
        for first in range(0, len(old), FREED_AT_ONCE):
            part = old[first : first + FREED_AT_ONCE]
            self._pool.set_states(slot_index(part), SlotState.FREE)
            self.retired.extend(part)
            yield

    def persist_failed(self, covered: Covered) -> None:
        """The sync failed: everything still waits."""
        superseded, retired = covered
        self.superseded[:0] = superseded
        self.retired[:0] = retired
        self.changed_since_persist = True

    @property
    def unpersisted(self) -> bool:
        """Whether some FREE is not yet durable, or not yet stored."""
        return bool(self.superseded or self.retired or self._unguard_next)

    # ---- taking and giving back

    def take(self, count: int) -> array[int] | None:
        """``count`` free slots, adjacent and ascending where possible, or None when there are too few.

        Evicts clean blocks when the free list is short.
        """
        if len(self.free) < count and not self._refill(count):
            return None
        first = len(self.free) - count
        taken = self.free[first:]
        del self.free[first:]
        taken.reverse()
        return taken

    def take_one(self) -> int:
        """A free slot, or -1 when there is none: :meth:`take` for the hot path."""
        free = self.free
        return free.pop() if free or self._refill(1) else -1

    def give_back(self, slots: Iterable[int]) -> None:
        """Return taken slots that were never published (their headers still say FREE)."""
        self._release(array("i", slots))

    def _refill(self, count: int) -> bool:
        if self.retired and not self.deferred:
            self.fence()
        if self.untouched and len(self.free) < count:
            self._prepare(count - len(self.free))
        short = count - len(self.free)
        self.searching = False
        if short > 0 and self.counts[CLEAN]:
            victims = self.policy.victims(max(short, EVICTION_BATCH), self._evictable, self._skip)
            victims.sort()
            if victims:
                self._on_evict(self._owner_np[victims], self._block_np[victims])
                self.drop(array("i", victims))
                self.evictions += len(victims)
                self.fence()
            self.searching = len(victims) < short and self.policy.unfinished
        return len(self.free) >= count

    def _prepare(self, wanted: int) -> None:
        """Class ``disk``: move slots from ``untouched`` to ``free``, ``wanted`` of them and some more if there are.

        They are written first, by a system call: a store could not tell of bad media.
        """
        count = min(len(self.untouched), max(wanted, PREPARED_BYTES // self._pool.block_size))
        batch = array("i", sorted(self.untouched[-count:]))
        del self.untouched[-count:]
        ready = array("i")
        for slot, length in stretches(slot_index(batch)):
            if self._prepared(slot, length):
                ready.extend(range(slot, slot + length))
            else:  # one of them, mostly
                ready.extend(one for one in range(slot, slot + length) if self._prepared(one, 1, last=True))
        for slot in ready:
            self.touched[slot] = 1
        ready.reverse()
        self.free.extend(ready)

    def _prepared(self, slot: int, count: int, *, last: bool = False) -> bool:
        """Prepare adjacent slots; whether that was possible. If it was the ``last`` try, a bad slot is set aside."""
        try:
            self._pool.prepare(slot, count)
        except OSError as error:
            if last and error.errno in NO_SPACE:
                self.untouched.insert(0, slot)
            elif last:
                self._on_bad(slot)
            return False
        return True

    def _without_bad(self, slots: array[int]) -> array[int]:
        """Those of free ``slots`` that may be used again; data of the suspect ones is read for that."""
        good = array("i")
        for slot in slots:
            if slot in self.suspect:
                self.suspect.discard(slot)
                try:
                    self._pool.read(slot)
                except OSError:
                    self._on_bad(slot)
                    continue
            good.append(slot)
        return good

    def _skip(self, start: int, stop: int) -> int:
        found = self.state.find(CLEAN, start, stop)
        return stop if found < 0 else found

    def _evictable(self, start: int, stop: int) -> npt.NDArray[np.bool_]:
        clean = self._state_np[start:stop] == CLEAN
        loose = (self._pins_np[start:stop] == 0) & (self._guarded_np[start:stop] == 0)
        result: npt.NDArray[np.bool_] = clean & loose
        return result

    def _release(self, slots: array[int]) -> None:
        """Put durably FREE slots on the free list, unless I/O still reads or fills them."""
        if self.suspect and not self.suspect.isdisjoint(slots):
            slots = self._without_bad(slots)
        if not slots:
            return
        pins, touched, places = self.pins, self.touched, slot_index(slots)
        if (
            isinstance(places, slice)
            and pins[places].count(0) == len(slots)
            and (not self.deferred or touched[places].count(1) == len(slots))
        ):  # what a large write has overwritten
            slots.reverse()
            self.free.extend(slots)
            return
        if len(slots) >= self.vector_min_blocks:
            numbers = numbers_of(places, np.int32)
            pinned = self._pins_np[places] != 0
            self._limbo.update(numbers[pinned].tolist())
            stack = np.sort(numbers[~pinned])[::-1]
            if self.deferred:
                prepared = np.frombuffer(touched, np.uint8)[stack] != 0
                self.untouched.frombytes(stack[~prepared].tobytes())
                stack = stack[prepared]
            self.free.frombytes(stack.tobytes())
            return
        ready = [slot for slot in slots if not pins[slot]]
        if len(ready) != len(slots):
            self._limbo.update(slot for slot in slots if pins[slot])
        ready.sort(reverse=True)
        if self.deferred:
            self.untouched.extend(slot for slot in ready if not touched[slot])
            ready = [slot for slot in ready if touched[slot]]
        self.free.extend(ready)

    # ---- pins

    def pin(self, slots: array[int] | npt.NDArray[np.int32]) -> None:
        """Keep the data of ``slots``, which are distinct, as it is until :meth:`unpin`."""
        if len(slots) < self.vector_min_blocks:
            for slot in slots:
                self.pins[slot] += 1
        else:
            self._pins_np[_indices(slots)] += 1

    def unpin(self, slots: array[int] | npt.NDArray[np.int32]) -> None:
        """End of :meth:`pin`."""
        if len(slots) < self.vector_min_blocks:
            for slot in slots:
                self.pins[slot] -= 1
        else:
            self._pins_np[_indices(slots)] -= 1
        if self._limbo:
            pins, limbo = self.pins, self._limbo
            freed = [slot for slot in slots.tolist() if not pins[slot] and slot in limbo]
            if freed:
                limbo.difference_update(freed)
                self._release(array("i", freed))

    # ---- numbers

    def all_verified(self, places: SlotIndex) -> bool:
        """Whether the data of all of them has matched its checksum since the start."""
        return 0 not in self._verified_np[places].tobytes()

    def in_state(self, slots: npt.NDArray[np.int32], state: int) -> npt.NDArray[np.bool_]:
        """Which of ``slots`` are in this state."""
        result: npt.NDArray[np.bool_] = self._state_np[slots] == state
        return result

    def clean_of(self, slots: npt.NDArray[np.int32], owners: U64 | np.uint64) -> npt.NDArray[np.bool_]:
        """Which of ``slots``, of shape (n,), are clean and their owner's; ``owners`` are one for all, or (n,)."""
        result: npt.NDArray[np.bool_] = (self._state_np[slots] == CLEAN) & (self._owner_np[slots] == owners)
        return result

    def blocks_of(self, slots: npt.NDArray[np.int32]) -> U64:
        """The block that each of ``slots`` holds, shape (n,)."""
        return self._block_np[slots]

    def quarantined(self) -> list[int]:
        """Slots whose data is lost, ascending."""
        if not self.counts[QUARANTINED]:
            return []
        self._quarantined = {slot for slot in self._quarantined if self.state[slot] == QUARANTINED}
        return sorted(self._quarantined)

    def note_lost(self, slot: int) -> None:
        """``slot`` has been published as quarantined: its data is not what anybody has written."""
        self._quarantined.add(slot)
        self.verified[slot] = 0

    def note_verified(self, slot: int) -> None:
        """The data of ``slot`` has matched its checksum."""
        self.verified[slot] = 1

    def note_suspect(self, slot: int) -> None:
        """The data of ``slot`` could not be read: it is read again before the slot is reused."""
        self.suspect.add(slot)

    def unverified(self, start: int, stop: int) -> list[int]:
        """Clean and dirty slots of a range whose data nobody has checked since the start."""
        states = self._state_np[start:stop]
        live = (states == CLEAN) | (states == DIRTY)
        return (np.flatnonzero(live & (self._verified_np[start:stop] == 0)) + start).tolist()

    @property
    def reusable(self) -> int:
        """Slots that hold no block: free, or on their way."""
        return len(self.state) - sum(self.counts[1:])


def _indices(slots: array[int] | npt.NDArray[np.int32]) -> SlotIndex:
    return slot_index(slots) if isinstance(slots, array) else slots
