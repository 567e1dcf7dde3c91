"""Checking once, in the background, the data that a start has found."""

from __future__ import annotations

import trio

from .cache import Cache
from .slots import CLEAN, DIRTY

STRIDE = 64  # slots between two looks at the loop: about 50 us of checksums
SEARCH_STRIDE = 1 << 16  # slots searched at a time for such as nobody has checked: 0.1 ms
PAUSE_S = 0.002  # a few percent of one core


class Scrub:
    """Goes through the pool from its first slot to the last."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def run(self) -> None:
        """Check once, slowly, the data that was recovered; what is read meanwhile is checked first."""
        cache = self._cache
        slots = cache.slots
        for start in range(0, cache.pool.slots, SEARCH_STRIDE):
            unverified = slots.unverified(start, start + SEARCH_STRIDE)
            for first in range(0, len(unverified), STRIDE):
                for slot in unverified[first : first + STRIDE]:
                    # Somebody may have used it while we slept.
                    if not (slots.verified[slot] or slots.pins[slot]) and slots.state[slot] in (CLEAN, DIRTY):
                        try:
                            self._check(slot)
                        except OSError:
                            pass  # a loss has been logged and counted
                        except Exception as error:
                            cache.stats.faults.note("the check of recovered data", error)
                await trio.sleep(PAUSE_S)
            await trio.lowlevel.checkpoint()

    def _check(self, slot: int) -> None:
        cache = self._cache
        owner = cache.slots.owner[slot]
        file = cache.files.by_id.get(owner)
        if file is None and not cache.integrity.matches(slot):
            file = cache.files.find_id(owner)
        if file is not None:
            cache.integrity.verify(file, cache.slots.block[slot], slot)
