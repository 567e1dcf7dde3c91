"""One regular file as the engine sees it: where its blocks are, what users see of it, what is owed to it."""

from __future__ import annotations

from array import array
from collections.abc import Awaitable, Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import trio

from ..backing.ports import BackingFile
from ..media.ports import Intent, Stamp
from ..runs import equal_runs
from .errseq import ErrorSequence

CHUNK_SHIFT = 8
CHUNK_BLOCKS = 1 << CHUNK_SHIFT  # 1 MiB of file at 4 KiB blocks: 1 KiB of table
CHUNK_MASK = CHUNK_BLOCKS - 1
ABSENT = -1
REGION_SHIFT = 12
REGION_CHUNKS = 1 << REGION_SHIFT  # 4 GiB of file: what is put in order at a time
_EMPTY_CHUNK = array("i", [ABSENT]) * CHUNK_BLOCKS + array("i", [0])  # last: how many are present


class Hints(NamedTuple):
    """What helps to create a file again whose creation the backing has lost (see FileRecord)."""

    parent_handle: bytes
    name: bytes
    path: bytes
    mode: int
    uid: int
    gid: int


class BlockTable:
    """Block number → slot, in chunks: 4 bytes per block where the file is cached at all."""

    __slots__ = ("_regions", "cached", "chunks")

    def __init__(self) -> None:
        self.chunks: dict[int, array[int]] = {}
        self.cached = 0
        self._regions: dict[int, set[int]] | None = None
        """The numbers of the chunks by region, once there are more of them than one region has: to put all of a large
        table in order takes too long."""

    def get(self, block: int) -> int:
        """The slot of ``block`` or ABSENT."""
        chunk = self.chunks.get(block >> CHUNK_SHIFT)
        return ABSENT if chunk is None else chunk[block & CHUNK_MASK]

    def put(self, block: int, slot: int) -> int:
        """Note that ``slot`` holds ``block``; return the slot that held it, or ABSENT."""
        chunk = self.chunks.get(block >> CHUNK_SHIFT)
        if chunk is None:
            chunk = self._add(block >> CHUNK_SHIFT)
        index = block & CHUNK_MASK
        old = chunk[index]
        chunk[index] = slot
        if old < 0:
            self.cached += 1
            chunk[CHUNK_BLOCKS] += 1
        return old

    def get_run(self, first: int, count: int) -> array[int]:
        """:meth:`get` for the ``count`` blocks from ``first`` on, of type ``i``."""
        result = array("i")
        for number, at, _ in _parts(first, count):
            result += self.chunks.get(number, _EMPTY_CHUNK)[at]
        return result

    def absent(self, first: int, count: int) -> list[int]:
        """Which of the ``count`` blocks from ``first`` on have no slot."""
        if count == 1:  # as of most misses
            return [first] if self.get(first) < 0 else []
        slots = np.frombuffer(self.get_run(first, count), np.int32)
        return (np.flatnonzero(slots < 0) + first).tolist()

    def put_run(self, first: int, slots: array[int]) -> array[int]:
        """:meth:`put` for the blocks from ``first`` on, as many as there are ``slots``, of type ``i``."""
        result = array("i")
        for number, at, part in _parts(first, len(slots)):
            chunk = self.chunks.get(number)
            if chunk is None:
                chunk = self._add(number)
            old = chunk[at]
            chunk[at] = slots[part]
            added = int(np.count_nonzero(np.frombuffer(old, np.int32) < 0))
            self.cached += added
            chunk[CHUNK_BLOCKS] += added
            result += old
        return result

    def remove(self, block: int) -> None:
        """Forget a cached ``block``."""
        chunk = self.chunks[block >> CHUNK_SHIFT]
        chunk[block & CHUNK_MASK] = ABSENT
        self.cached -= 1
        chunk[CHUNK_BLOCKS] -= 1
        if not chunk[CHUNK_BLOCKS]:
            self._drop(block >> CHUNK_SHIFT)

    def remove_all(self, blocks: npt.NDArray[np.uint64]) -> None:
        """:meth:`remove` for ascending ``blocks``, shape (n,)."""
        numbers = blocks >> np.uint64(CHUNK_SHIFT)
        for first, end in equal_runs(numbers):
            number = int(numbers[first])
            chunk = self.chunks[number]
            if chunk[CHUNK_BLOCKS] == end - first:
                self._drop(number)
                continue
            np.frombuffer(chunk, np.int32)[blocks[first:end] & np.uint64(CHUNK_MASK)] = ABSENT
            chunk[CHUNK_BLOCKS] -= end - first
        self.cached -= len(blocks)

    def put_many(self, blocks: npt.NDArray[np.uint64], slots: npt.NDArray[np.int32]) -> None:
        """Fill an empty table: ``slots[i]`` holds ``blocks[i]``, ascending and distinct, both (n,)."""
        numbers = blocks >> np.uint64(CHUNK_SHIFT)
        begins = np.r_[True, numbers[1:] != numbers[:-1]]
        starts = np.flatnonzero(begins)
        chunks = np.full((len(starts), CHUNK_BLOCKS + 1), ABSENT, np.int32)
        chunks[np.cumsum(begins) - 1, blocks & np.uint64(CHUNK_MASK)] = slots
        chunks[:, CHUNK_BLOCKS] = np.diff(starts, append=len(blocks))
        for number, chunk in zip(numbers[starts].tolist(), chunks, strict=True):
            self.chunks[number] = array("i", chunk.tobytes())
        self.cached = len(blocks)
        self._divide()

    def _add(self, number: int) -> array[int]:
        chunk = self.chunks[number] = _EMPTY_CHUNK[:]
        if self._regions is not None:
            self._regions.setdefault(number >> REGION_SHIFT, set()).add(number)
        elif len(self.chunks) > REGION_CHUNKS:
            self._divide()
        return chunk

    def _drop(self, number: int) -> None:
        del self.chunks[number]
        if self._regions is not None:
            region = self._regions[number >> REGION_SHIFT]
            region.discard(number)
            if not region:
                del self._regions[number >> REGION_SHIFT]

    def _divide(self) -> None:
        if len(self.chunks) > REGION_CHUNKS:
            self._regions = {}
            for number in self.chunks:
                self._regions.setdefault(number >> REGION_SHIFT, set()).add(number)

    def _numbers(self, first: int) -> Iterator[int]:
        """The numbers of the chunks from ``first`` on, in order."""
        if self._regions is None:
            yield from sorted(number for number in self.chunks if number >= first)
            return
        for region in sorted(region for region in self._regions if region >= first >> REGION_SHIFT):
            yield from sorted(number for number in self._regions.get(region, ()) if number >= first)

    def slots(self) -> array[int]:
        """The slots of all cached blocks, in their order, of type ``i``."""
        result = array("i")
        for number in sorted(self.chunks):
            chunk = np.frombuffer(self.chunks[number], np.int32, CHUNK_BLOCKS)
            result.frombytes(chunk[chunk >= 0].tobytes())
        return result

    def walk(self, first: int = 0) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.int32]]]:
        """Cached blocks from ``first`` on, in order, chunk by chunk: (block numbers, slots), each of
        shape (n,), n > 0, copies. The table may change between two steps."""
        for number in self._numbers(first >> CHUNK_SHIFT):
            chunk = self.chunks.get(number)
            if chunk is None:
                continue
            slots = np.frombuffer(chunk, np.int32, CHUNK_BLOCKS)
            present = np.flatnonzero(slots >= 0)
            present = present[present >= first - (number << CHUNK_SHIFT)]
            if len(present):
                yield present + (number << CHUNK_SHIFT), slots[present]


def _parts(first: int, count: int) -> Iterator[tuple[int, slice, slice]]:
    """Of the ``count`` blocks from ``first`` on, chunk by chunk: its number, where they are in it, which they are."""
    end = first + count
    for number in range(first >> CHUNK_SHIFT, ((end - 1) >> CHUNK_SHIFT) + 1):
        start = number << CHUNK_SHIFT
        low, high = max(first, start), min(end, start + CHUNK_BLOCKS)
        yield number, slice(low - start, high - start), slice(low - first, high - first)


class Fetch:
    """Blocks on their way from the backing. It is current for a block as long as the file's ``fetches``
    names it; a write or truncate that comes in between takes the name away, and the result is dropped."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = trio.Event()


class CachedFile:
    """One regular file. All fields belong to the engine; FUSE reads size, times and ``backing``.

    Invariants: ``size >= backing_size`` but for a truncate in progress; uncached blocks from
    ``backing_size`` on are zeros; bytes of a cached block from ``size`` on are zeros;
    ``dirty > 0`` or ``intents`` exactly when the file is in the cache's ``due`` table.
    """

    __slots__ = (
        "allocated_to",
        "announced",
        "attr_seq",
        "backing",
        "backing_size",
        "changing",
        "ctime_ns",
        "dirty",
        "doubtful",
        "due_since",
        "error",
        "errors",
        "failed_ns",
        "failures",
        "fetches",
        "file_id",
        "handle",
        "held",
        "hints",
        "intents",
        "lock",
        "mtime_ns",
        "needs_sync",
        "newest",
        "no_space",
        "open_count",
        "outdated",
        "ready",
        "record_lock",
        "recorded",
        "ref_count",
        "retry_at",
        "settled",
        "size",
        "stamp",
        "sync_lock",
        "sync_names",
        "synced",
        "table",
        "tombstone",
        "touched",
        "touches",
        "truncate_done",
        "unlinked",
        "unnamed_since",
    )

    def __init__(self, handle: bytes, backing: BackingFile) -> None:
        self.handle = handle
        self.backing = backing
        self.hints: Callable[[], Hints] | None = None
        self.sync_names: Callable[[], Awaitable[None]] | None = None
        """Makes the file's names durable in the backing, where its user knows which are not."""
        self.unnamed_since = 0
        """Without a user: how many syncs of the whole backing had begun when its names last changed."""
        self.ref_count = 0
        """inodes of the layer above that refer to it"""
        self.open_count = 0
        """open descriptors of users: the backing file stays open as well"""
        self.settled = True
        """False after recovery until the backing file has been looked at: size and times are unknown."""
        # -- what users see
        self.size = 0
        self.mtime_ns = 0
        self.ctime_ns = 0
        self.unlinked = False
        # -- where the blocks are
        self.table = BlockTable()
        self.backing_size = 0
        self.newest = 0
        """The block that was published last as dirty: most likely it still is."""
        self.allocated_to = 0
        """Writing below this offset is known to take no space in the backing."""
        self.fetches: dict[int, Fetch] = {}
        # -- identity in the catalog
        self.file_id = 0
        self.recorded = False
        self.tombstone = False
        """The record on the media says unlinked."""
        self.ready = False
        """Recorded, and not frozen by a truncate: writes need not wait for anything but slots."""
        self.truncate_done: trio.Event | None = None
        self.record_lock = trio.Lock()
        self.stamp: Stamp | None = None
        self.attr_seq = 0
        # -- whether the backing file is as the stamp says, but for strangers
        self.touched = False
        """Size or mtime of the backing file may have been changed by us since the stamp."""
        self.announced = False
        """The record on the media says so."""
        self.touches = 0
        """Counts those changes, for who looks at the backing file meanwhile."""
        self.changing = 0
        """How many of them are under way for users."""
        self.synced = False
        """The stamp was taken after a sync of the file and of its names: a power cut does not take it back."""
        self.doubtful = False
        """A change of the backing file was broken off in an earlier life. What the page cache shows of it may have
        failed to reach the disk, and no sync tells that again. Writing all of it again ends this."""
        self.outdated = False
        """The record on the media must be written again before a new version comes."""
        self.held: OSError | None = None
        """Why it could not be brought up to date after a start: until then nobody may use it."""
        # -- what is owed to the backing
        self.dirty = 0
        self.due_since = 0.0
        self.intents: list[Intent] = []
        self.lock = trio.Lock()
        """Held by whoever changes the backing file: writeback passes and truncates."""
        self.needs_sync = False
        self.sync_lock = trio.Lock()
        """Held by a sync for a user: the next one must not be back before it."""
        self.error: OSError | None = None
        """Why the last attempt to write it back has failed."""
        self.errors = ErrorSequence()
        """What its open files have yet to be told."""
        self.failed_ns = 0
        """mtime_ns when a failure was last entered there: what was written later has failed on its own account."""
        self.no_space = 0
        """The errno of that, if it says that the backing has no space for the file."""
        self.failures = 0
        self.retry_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether nobody has it open, and no operation that uses the backing file is under way."""
        return not (self.open_count or self.fetches or self.lock.locked() or self.sync_lock.locked())
