"""Files that are cached and that nobody uses: rows of tables, 32 bytes each beside 4 for a block, and no objects.

A *dormant* file has clean blocks only, and nothing is owed to it. Its record in the catalog says all else that is known
of it. It *wakes* when somebody asks for its handle: it becomes a :class:`CachedFile`, as recovery would make it. Its
slots may be evicted without waking it: a row only counts how many are left.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from ..backing.ports import Backing
from ..media.ports import U64, Bools, Catalog, CatalogError, FileRecord, hash_of_handle
from .files import CUT, CachedFile, Record, file_of
from .slots import CLEAN, Slots

I32 = npt.NDArray[np.int32]
LEAVING = -1
"""Instead of a number of slots: the file has none any more, and keeps its id and handle (:meth:`Dormant.evicted`)."""
MERGE_RATIO = 8  # a table that is not so many times as large as the next one is joined with it


class Rows:
    """Some dormant files. No array changes but ``left``. A file has one row at most whose ``left`` is not 0."""

    def __init__(self, file_ids: U64, hashes: U64, counts: I32, slots: I32, unsynced: Bools) -> None:
        """``file_ids`` ascend, of shape (n,); ``hashes`` are those of the handles; ``slots``, of shape (sum of
        ``counts``,), are those of the first file in the order of its blocks, then those of the next one."""
        self.file_ids = file_ids
        self.unsynced = unsynced
        """whether the backing inode was changed and not synced since"""
        self.left = np.where(counts, counts, LEAVING).astype(np.int32)
        """how many of the slots still hold blocks of the file; LEAVING; or 0: the file is not here any more"""
        self.slots = slots
        self._ends = np.cumsum(counts, dtype=np.int64)
        order = np.argsort(hashes, kind="stable")
        self._by_hash = order.astype(np.int32)
        self._hashes = hashes[order]
        self._ids, self._found = self.file_ids.data, self._hashes.data
        """The same as the arrays: bisect takes half of numpy's time to find one number."""

    def __len__(self) -> int:
        return len(self.file_ids)

    def row_of(self, file_id: int) -> int:
        """The row of a file, or -1."""
        ids = self._ids
        row = bisect_left(ids, file_id)
        return row if row < len(ids) and ids[row] == file_id and self.left[row] else -1

    def find(self, hashed: int) -> int:
        """The row of the file whose handle has this hash, or -1."""
        found = self._found
        at = bisect_left(found, hashed)
        if at < len(found) and found[at] == hashed:
            row = int(self._by_hash[at])
            return row if self.left[row] else -1
        return -1

    def slots_of(self, row: int) -> I32:
        """The slots that a file had when it became dormant."""
        end = int(self._ends[row])
        start = int(self._ends[row - 1]) if row else 0
        return self.slots[start:end]

    def joined(self, other: Rows, slots: Slots) -> Rows:
        """The files of both that are still there, each with the slots that are still its own."""
        parts = [rows._living(slots) for rows in (self, other)]
        ids, hashes, counts, owned, unsynced = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.argsort(ids, kind="stable")
        ends = np.cumsum(counts, dtype=np.int64)
        starts, counts = (ends - counts)[order], counts[order]
        # where each slot comes from: the start of its file, and its place in it
        within = np.arange(len(owned)) - np.repeat(np.cumsum(counts, dtype=np.int64) - counts, counts)
        return Rows(ids[order], hashes[order], counts, owned[np.repeat(starts, counts) + within], unsynced[order])

    def _living(self, slots: Slots) -> tuple[U64, U64, I32, I32, Bools]:
        hashes = np.empty_like(self._hashes)
        hashes[self._by_hash] = self._hashes
        here = self.left != 0
        sizes = np.diff(self._ends, prepend=0)
        owned = slots.clean_of(self.slots, np.repeat(self.file_ids, sizes)) & np.repeat(here, sizes)
        counts = np.maximum(self.left[here], 0)
        return self.file_ids[here], hashes[here], counts, self.slots[owned], self.unsynced[here]


class Dormant:
    """The table of dormant files."""

    def __init__(self, catalog: Catalog, backing: Backing, slots: Slots) -> None:
        self._catalog = catalog
        self._backing = backing
        self._slots = slots
        self._tables: tuple[Rows, ...] = ()
        """the largest first; replaced and not changed, since ``path_of`` looks from other threads"""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __contains__(self, file_id: int) -> bool:
        return any(rows.row_of(file_id) >= 0 for rows in self._tables)

    def files(self) -> Iterator[tuple[int, int, I32]]:
        """Of every dormant file: its id, how many slots are counted, and those that are found."""
        for rows in self._tables:
            for row in np.flatnonzero(rows.left).tolist():
                yield int(rows.file_ids[row]), max(0, int(rows.left[row])), self._owned(rows, row)

    # ---- falling asleep

    def add(self, rows: Rows) -> None:
        """Take up files. No two dormant files may have one hash."""
        if not len(rows):
            return
        self._count += len(rows)
        tables = [*self._tables, rows]
        while len(tables) > 1 and len(tables[-2]) < MERGE_RATIO * len(tables[-1]):
            last = tables.pop()
            tables[-1] = tables[-1].joined(last, self._slots)
        self._tables = tuple(tables)

    def add_files(self, files: list[CachedFile]) -> list[CachedFile]:
        """Take up files with clean blocks only; those that were. Others have a handle of the same hash."""
        taken: dict[int, CachedFile] = {}
        for file in files:
            taken.setdefault(hash_of_handle(file.handle), file)
        pairs = [(file, hashed) for hashed, file in taken.items() if self._find(hashed) is None]
        pairs.sort(key=lambda pair: pair[0].file_id)
        places = [file.table.slots() for file, _ in pairs]
        self.add(
            Rows(
                np.array([file.file_id for file, _ in pairs], np.uint64),
                np.array([hashed for _, hashed in pairs], np.uint64),
                np.array([len(each) for each in places], np.int32),
                np.frombuffer(b"".join(places), np.int32),
                np.array([file.needs_sync for file, _ in pairs], np.bool_),
            )
        )
        return [file for file, _ in pairs]

    # ---- waking

    def wake(self, handle: bytes) -> CachedFile | None:
        """The dormant file with this handle, which it is no more; None if there is none.

        :raises CatalogError: its record cannot be read; it stays dormant.
        """
        place = self._find(hash_of_handle(handle)) if self._count else None
        if place is None:
            return None
        rows, row = place
        record = self._catalog.record(int(rows.file_ids[row]))
        return self._wake(rows, row, record) if record.handle == handle else None

    def wake_id(self, file_id: int) -> CachedFile | None:
        """:meth:`wake` by file id."""
        for rows in self._tables:
            row = rows.row_of(file_id)
            if row >= 0:
                return self._wake(rows, row, self._catalog.record(file_id))
        return None

    def _wake(self, rows: Rows, row: int, record: FileRecord) -> CachedFile:
        file = file_of(record, self._backing.file(record.handle))
        file.needs_sync = bool(rows.unsynced[row])
        slots = self._owned(rows, row)
        blocks = self._slots.blocks_of(slots)
        if len(slots) < self._slots.vector_min_blocks:
            for block, slot in zip(blocks.tolist(), slots.tolist(), strict=True):
                file.table.put(block, slot)
        else:
            file.table.put_many(blocks, slots)
        rows.left[row] = 0
        self._count -= 1
        return file

    def path_of(self, handle: bytes) -> bytes:
        """The path in the record of a dormant file, or an empty one. May be called from any thread."""
        place = self._find(hash_of_handle(handle))
        if place is None:
            return b""
        rows, row = place
        try:
            record = self._catalog.record(int(rows.file_ids[row]))
        except CatalogError:
            return b""
        return record.path if record.handle == handle else b""

    def evicted(self, file_id: int, count: int, *, leaving: bool) -> bool:
        """So many slots of a file have been evicted; whether they were its last, and it is forgotten. ``leaving``: it
        is still found by its handle then, until :meth:`leave`."""
        for rows in self._tables:
            row = rows.row_of(file_id)
            if row >= 0:
                rows.left[row] -= count
                if rows.left[row]:
                    return False
                if leaving:
                    rows.left[row] = LEAVING
                else:
                    self._count -= 1
                return True
        return False

    def leave(self, file_ids: list[int]) -> list[int]:
        """Forget those of these files that still have no slots, and are still dormant; their ids."""
        gone: list[int] = []
        for file_id in file_ids:
            for rows in self._tables:
                row = rows.row_of(file_id)
                if row >= 0 and rows.left[row] == LEAVING:
                    rows.left[row] = 0
                    self._count -= 1
                    gone.append(file_id)
        return gone

    def _find(self, hashed: int) -> tuple[Rows, int] | None:
        for rows in self._tables:
            row = rows.find(hashed)
            if row >= 0:
                return rows, row
        return None

    def _owned(self, rows: Rows, row: int) -> I32:
        """The slots that still are the file's: others have been evicted, and may hold blocks of other files by now."""
        slots = rows.slots_of(row)
        return slots[self._slots.clean_of(slots, rows.file_ids[row])]


def may_be_dormant(file: CachedFile, slots: Slots) -> bool:
    """Whether all that is known of a file is in its record and in the headers of its clean slots."""
    if file.ref_count or not file.idle or file.record_lock.locked() or file.life is CUT:
        return False
    if not file.table.cached:
        return False
    if file.dirty or file.intents or file.unlinked or file.tombstone:
        return False
    if file.record is not Record.CURRENT or file.error is not None or file.errors.untold:
        return False
    if file.changing or file.touched != file.announced:
        return False
    return bool(slots.in_state(np.frombuffer(file.table.slots(), np.int32), CLEAN).all())
