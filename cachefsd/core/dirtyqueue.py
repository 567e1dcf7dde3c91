"""Files that something is owed to: dirty blocks, or intents of truncates. Writeback takes them out, oldest first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import trio

from ..wakeup import Signal
from .files import CachedFile
from .options import EngineOptions
from .slots import DIRTY, Slots


class DirtyQueue:
    """A file is in here exactly when something is owed to it.

    Then it waits its turn, or writeback has taken it: it is being written back, waits for its next try, was left out of
    a group, or has no name.
    """

    def __init__(self, slots: Slots, options: EngineOptions) -> None:
        count = len(slots.state)
        self.high_mark = max(1, int(options.high_watermark * count))
        self.low_mark = min(self.high_mark - 1, int(options.low_watermark * count))
        self.pressure = False
        """The high watermark has been passed and the low one not yet reached."""
        self.work = Signal()
        """Set when writeback should look again."""
        self._slots = slots
        self._age_s = options.dirty_age_s
        self._owed: dict[CachedFile, None] = {}
        self._waiting: OrderedDict[CachedFile, None] = OrderedDict()
        """Those of them that wait their turn, oldest ``due_since`` first."""
        self._unnamed: dict[CachedFile, None] = {}
        """Those that have no name: writeback is only wanted when slots are needed."""
        self._next_look = float("inf")

    def __contains__(self, file: CachedFile) -> bool:
        return file in self._owed

    def __iter__(self) -> Iterator[CachedFile]:
        return iter(self._owed)

    def __len__(self) -> int:
        return len(self._owed)

    # ---- for whoever makes files dirty and clean

    def enqueue(self, file: CachedFile) -> None:
        """Something is owed to a file from now on."""
        file.due_since = trio.current_time()
        self._owed[file] = None
        self._waiting[file] = None
        if self.pressure or file.due_since + self._age_s < self._next_look:
            self.work.set()

    def add_blocks(self, file: CachedFile, count: int) -> None:
        """So many blocks more of a file are about to be dirty."""
        file.dirty += count
        if file not in self._owed:
            self.enqueue(file)
        if not self.pressure and self._slots.counts[DIRTY] + count > self.high_mark:
            self.press()

    def dequeue_if_clean(self, file: CachedFile) -> None:
        """Take a file out once nothing is owed to it."""
        if not file.dirty and not file.intents:
            self._owed.pop(file, None)
            self._waiting.pop(file, None)
            self._unnamed.pop(file, None)

    def press(self) -> None:
        """Slots are needed: writeback goes on until the low watermark is reached."""
        self.pressure = True
        self.work.set()

    def look_at(self, file: CachedFile) -> None:
        """Writeback has passed a file over, and may take it now."""
        if file in self._owed:
            self._waiting[file] = None
            self.work.set()

    # ---- for writeback

    def measure(self) -> int:
        """See whether the watermarks have been passed; how many blocks are dirty."""
        dirty = self._slots.counts[DIRTY]
        self.pressure = dirty >= self.high_mark or (self.pressure and dirty > self.low_mark)
        return dirty

    def will_look(self, when: float) -> None:
        """Writeback looks at the files again at this loop time, unless ``work`` is set before."""
        self._next_look = when

    def take(self) -> CachedFile | None:
        """Take out the file whose turn it is."""
        return self._waiting.popitem(last=False)[0] if self._waiting else None

    def put_back(self, file: CachedFile) -> None:
        """Undo :meth:`take`."""
        self._waiting[file] = None
        self._waiting.move_to_end(file, last=False)

    def put_last(self, file: CachedFile, since: float) -> None:
        """What is owed to a file now is so since that loop time: it waits its turn again."""
        file.due_since = since
        self._waiting[file] = None
        self._waiting.move_to_end(file)

    def keep_unnamed(self, file: CachedFile) -> None:
        """A file that was taken has no name, and is only wanted when slots are needed."""
        self._unnamed[file] = None

    def take_unnamed(self) -> list[CachedFile]:
        """All of those."""
        unnamed, self._unnamed = list(self._unnamed), {}
        return unnamed
