"""Which clean block to drop when a slot is needed: the replacement policy, behind a small port.

A policy decides about speed, never about correctness: it proposes, and only slots that the engine says
are evictable (clean, not pinned) are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..runs import SlotIndex

PIECE = 1 << 20
"""Slots whose state is dumped at a time: 2 ms."""
Evictable = Callable[[int, int], npt.NDArray[np.bool_]]
"""(start, stop) -> which slots of that range may be dropped, as a fresh array."""
Skip = Callable[[int, int], int]
"""(start, stop) -> a slot of that range before which none may be dropped, or ``stop``. It is much faster."""


def settings_of(slots: int) -> list[str]:
    """The settings of the catalog that hold the state of the policy over so many slots, piece by piece."""
    return [f"policy {piece}" for piece in range(-(-slots // PIECE))]


def skip_nothing(start: int, stop: int) -> int:
    """For a caller that has no fast way to tell."""
    return start


class ReplacementPolicy(Protocol):
    """Sees admissions and hits, proposes victims. Slots are numbers from 0 on."""

    def admitted(self, slot: int) -> None:
        """A block has come into ``slot``."""

    def touched(self, slot: int) -> None:
        """The block in ``slot`` was read or is about to be superseded by a newer version. Hot path."""

    def admitted_all(self, places: SlotIndex) -> None:
        """:meth:`admitted` for many slots."""

    def touched_all(self, places: SlotIndex) -> None:
        """:meth:`touched` for many slots."""

    unfinished: bool
    """The last search has ended before its time, so as not to take too long: the next one goes on from there."""

    def victims(self, count: int, evictable: Evictable, skip: Skip = skip_nothing) -> list[int]:
        """Up to ``count`` evictable slots to drop, no slot twice; fewer only if there are fewer, or ``unfinished``."""

    def dump(self, piece: int) -> bytes:
        """State worth keeping over a restart, of the slots of this piece of :data:`PIECE` slots."""

    def load(self, piece: int, state: bytes) -> None:
        """Take up a dumped state; one of other shape is ignored."""


class Clock:
    """CLOCK with a small counter per slot (generalised CLOCK, Smith 1978).

    The hand passes over the slots; a slot with a positive counter loses one and stays, one at zero is
    a victim. A hit sets the counter to at most ``CEILING``, an admission to zero, so that a block must
    earn its place by a second use: a scan passes through without displacing what is used.
    One byte per slot, and the sweep is vectorised.
    """

    CEILING = 3
    _STRIDE = 4096  # slots looked at per step of the hand: numpy's overhead of ~10 us is spread over it
    _STEPS = 128  # such steps of one search, 2 ms
    _SKIPPED = 1 << 23  # slots that one search skips, 1 ms

    def __init__(self, slots: int) -> None:
        self._counters = bytearray(slots)
        self._counters_np = np.frombuffer(self._counters, np.uint8)
        self._touched = np.minimum(np.arange(1, 257), self.CEILING).astype(np.uint8)
        """What a hit makes of each counter."""
        self._hand = 0
        self._slots = slots
        self._passed = 0
        """how many slots the hand has passed since it found a victim"""
        self.unfinished = False

    def admitted(self, slot: int) -> None:
        self._counters[slot] = 0

    def touched(self, slot: int) -> None:
        counters = self._counters
        if counters[slot] < self.CEILING:
            counters[slot] += 1

    def admitted_all(self, places: SlotIndex) -> None:
        self._counters_np[places] = 0

    def touched_all(self, places: SlotIndex) -> None:
        counters = self._counters_np
        counters[places] = self._touched.take(counters[places])

    def victims(self, count: int, evictable: Evictable, skip: Skip = skip_nothing) -> list[int]:
        counters = self._counters_np
        found: list[int] = []
        # CEILING rounds bring every counter to zero, two more visit every slot from any position.
        enough = (self.CEILING + 2) * self._slots
        steps, skipped = self._STEPS, self._SKIPPED
        while len(found) < count and self._passed < enough and steps and skipped > 0:
            end = min(self._hand + skipped, self._slots)
            start = skip(self._hand, end)
            skipped -= start - self._hand
            self._pass_to(start)
            if start == end:
                continue
            steps -= 1
            stop = min(start + self._STRIDE, self._slots)
            allowed = evictable(start, stop)
            allowed[[slot - start for slot in found if start <= slot < stop]] = False
            window = counters[start:stop]
            hits = np.flatnonzero(allowed & (window == 0))[: count - len(found)]
            # The hand stops behind the last victim it needed, and ages only what it has passed.
            passed = int(hits[-1]) + 1 if len(found) + len(hits) == count else stop - start
            aged = window[:passed]
            np.subtract(aged, 1, out=aged, where=allowed[:passed] & (aged > 0))
            found.extend((hits + start).tolist())
            self._pass_to(start + passed)
            if len(hits):
                self._passed = 0
        self.unfinished = len(found) < count and self._passed < enough
        if not self.unfinished:
            self._passed = 0
        return found

    def _pass_to(self, slot: int) -> None:
        self._passed += slot - self._hand
        self._hand = slot if slot < self._slots else 0

    def dump(self, piece: int) -> bytes:
        counters = self._counters_np[piece * PIECE : (piece + 1) * PIECE]
        padded = np.zeros(-(-len(counters) // 4) * 4, np.uint8)
        padded[: len(counters)] = counters
        return (padded[0::4] | padded[1::4] << 2 | padded[2::4] << 4 | padded[3::4] << 6).tobytes()

    def load(self, piece: int, state: bytes) -> None:
        counters = self._counters_np[piece * PIECE : (piece + 1) * PIECE]
        if len(state) == -(-len(counters) // 4):
            packed = np.frombuffer(state, np.uint8)
            unpacked = np.stack([packed >> shift & self.CEILING for shift in (0, 2, 4, 6)], axis=1)
            counters[:] = unpacked.reshape(-1)[: len(counters)]
