"""Which clean block to drop when a slot is needed: the replacement policy, behind a small port.

A policy decides about speed, never about correctness: it proposes, and only slots that the engine says
are evictable (clean, not pinned) are dropped.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from ..runs import Places

Evictable = Callable[[int, int], npt.NDArray[np.bool_]]
"""(start, stop) -> which slots of that range may be dropped, as a fresh array."""


class ReplacementPolicy(Protocol):
    """Sees admissions and hits, proposes victims. Slots are numbers from 0 on."""

    def admitted(self, slot: int) -> None:
        """A block has come into ``slot``."""

    def touched(self, slot: int) -> None:
        """The block in ``slot`` was read or is about to be superseded by a newer version. Hot path."""

    def admitted_all(self, places: Places) -> None:
        """:meth:`admitted` for many slots."""

    def touched_all(self, places: Places) -> None:
        """:meth:`touched` for many slots."""

    def victims(self, count: int, evictable: Evictable) -> list[int]:
        """Up to ``count`` evictable slots to drop, no slot twice; fewer only if there are fewer."""

    def dump(self) -> bytes:
        """State worth keeping over a restart."""

    def load(self, state: bytes) -> None:
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

    def __init__(self, slots: int) -> None:
        self._counters = bytearray(slots)
        self._counters_np = np.frombuffer(self._counters, np.uint8)
        self._touched = np.minimum(np.arange(1, 257), self.CEILING).astype(np.uint8)
        """What a hit makes of each counter."""
        self._hand = 0
        self._slots = slots

    def admitted(self, slot: int) -> None:
        self._counters[slot] = 0

    def touched(self, slot: int) -> None:
        counters = self._counters
        if counters[slot] < self.CEILING:
            counters[slot] += 1

    def admitted_all(self, places: Places) -> None:
        self._counters_np[places] = 0

    def touched_all(self, places: Places) -> None:
        counters = self._counters_np
        counters[places] = self._touched.take(counters[places])

    def victims(self, count: int, evictable: Evictable) -> list[int]:
        counters = self._counters_np
        found: list[int] = []
        # CEILING rounds bring every counter to zero, two more visit every slot from any position.
        windows_left = (self.CEILING + 2) * (self._slots // self._STRIDE + 1)
        while len(found) < count and windows_left:
            windows_left -= 1
            start, stop = self._hand, min(self._hand + self._STRIDE, self._slots)
            allowed = evictable(start, stop)
            allowed[[slot - start for slot in found if start <= slot < stop]] = False
            window = counters[start:stop]
            hits = np.flatnonzero(allowed & (window == 0))[: count - len(found)]
            # The hand stops behind the last victim it needed, and ages only what it has passed.
            enough = len(found) + len(hits) == count
            passed = int(hits[-1]) + 1 if enough else stop - start
            aged = window[:passed]
            np.subtract(aged, 1, out=aged, where=allowed[:passed] & (aged > 0))
            found.extend((hits + start).tolist())
            self._hand = start + passed if start + passed < self._slots else 0
        return found

    def dump(self) -> bytes:
        return bytes(self._counters)

    def load(self, state: bytes) -> None:
        if len(state) == self._slots:
            self._counters[:] = state
