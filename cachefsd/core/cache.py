"""What the parts of the engine share: the media, the backing, and the state of all that is cached."""

from __future__ import annotations

from collections.abc import Callable

from ..backing.ports import Backing
from ..media.ports import Catalog, Pool
from ..wakeup import Signal
from .commit import BlockStore
from .dirtyqueue import DirtyQueue
from .filetable import FileTable
from .health import Health
from .integrity import Integrity
from .offload import RunBlocking
from .options import EngineOptions
from .policy import Clock
from .records import Records
from .room import Room
from .slots import Slots
from .stats import Statistics
from .syncs import Syncs


class Cache:
    """The parts, each with an interface of its own. Nobody assigns a field of a part from outside."""

    def __init__(
        self,
        pool: Pool,
        catalog: Catalog,
        backing: Backing,
        options: EngineOptions,
        run_blocking: RunBlocking,
        now_ns: Callable[[], int],
    ) -> None:
        self.pool = pool
        self.catalog = catalog
        self.backing = backing
        self.options = options
        self._clock = now_ns
        self.now_ns = now_ns
        """What time it is, as the backing can keep it."""
        self._set_clock()
        self.block_size = pool.block_size
        self.shift = pool.block_size.bit_length() - 1
        self.mask = pool.block_size - 1
        self.data = pool.view(0, pool.slots)
        self.stats = Statistics()
        self.health = Health()
        self.syncs = Syncs(backing, self.stats)
        self.slots = Slots(
            pool,
            Clock(pool.slots),
            lambda owners, blocks: self.files.evicted(owners, blocks),
            lambda slot: self.blocks.set_aside(slot),
        )
        self.files = FileTable(catalog, backing, self.slots, self.health)
        self.dirty = DirtyQueue(self.slots, options)
        self.blocks = BlockStore(pool, self.slots, self.dirty, self.health, run_blocking)
        self.integrity = Integrity(pool, self.slots, self.blocks, self.dirty)
        self.records = Records(catalog, self.files, self.slots, self.health, self.blocks.persist, run_blocking)
        self.upkeep = Signal()
        """Set when upkeep should not wait for its next round: slots of unlinked files are wanted."""
        self.room = Room(self.slots, self.dirty, self.blocks.persist, self.upkeep)

    def close(self) -> None:
        """Let go of the map and of all backing files; nothing is changed."""
        self.data.release()
        self.files.close()

    # ---- times

    def kept_time(self, asked_ns: int, kept_ns: int) -> int:
        """What the backing makes of the time ``asked_ns``, where a file of it has ``kept_ns`` after it was set.

        A file system that tells is asked first: somebody else may have set another time in between.
        """
        times = self.backing.times
        known = times.of(asked_ns)
        if known is not None:
            return known
        times.learn(asked_ns, kept_ns)
        self._set_clock()
        return kept_ns

    def _set_clock(self) -> None:
        """See that what is written gets times that the backing can keep."""
        granularity, clock = self.backing.times.granularity, self._clock
        if granularity <= 1:
            return

        def now_ns() -> int:
            now = clock()
            return now - now % granularity

        self.now_ns = now_ns
