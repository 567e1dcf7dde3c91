"""Pool and catalog of the simulator: the production code over memory that records its stores.

:class:`SimPool` is production's ``MappedPool`` with another map beneath, so that header layout, order of stores and
state changes are the very ones that run in earnest. What a crash leaves is made of the record by ``sim/crash.py``.

Fault model of the pool: the CPU may write a dirty line to the media at any time, of its own accord; stores to one line
arrive in program order; lines arrive in any order; a flush followed by a fence makes what was stored arrive. In class
``disk`` the kernel writes pages at any time, and only a sync makes them arrive.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.pool import MappedPool
from cachefsd.media.ports import (
    Buffer,
    CatalogError,
    CatalogFullError,
    Changes,
    Durability,
    FileRecord,
    Files,
    Intent,
    hash_of_handle,
)
from cachefsd.media.records import decode_record, encode_record
from cachefsd.media.superblock import Geometry, Superblock, SuperblockPair
from cachefsd.runs import numbers_of
from sim import log as events
from sim.log import Log, Violation

BLOCK = 128
"""Two lines: a block can be torn, and images stay small."""
LINE = 64
WORD = struct.Struct("<Q")


class PoolImage(NamedTuple):
    """What lies on the media: the two superblocks, None for a damaged one, and headers followed by data."""

    superblocks: tuple[Superblock | None, Superblock | None]
    content: bytes
    unreadable: frozenset[int] = frozenset()
    """slots whose data can't be read"""


def geometry(slots: int) -> Geometry:
    header_bytes = slots * HEADER_SIZE
    return Geometry(header_bytes + slots * BLOCK, BLOCK, slots, 0, header_bytes)


def format_pool(slots: int) -> PoolImage:
    """An empty pool."""
    first = Superblock(b"sim-pool-16bytes", geometry(slots), generation=1)
    return PoolImage((replace(first, generation=2), first), bytes(slots * (HEADER_SIZE + BLOCK)))


Check = Callable[[str], None]
"""Called with the name of what is about to be done; raises OSError if that is to fail."""


class _SimSuperblocks(SuperblockPair):
    """Production's choice and replacement; a write that a crash meets leaves the copy damaged.

    One that fails may have arrived all the same: fault ``superblock`` keeps the old copy, ``superblock_late`` has the
    new one.
    """

    log: Log
    check: Check

    def _write(self, target: int, new: Superblock) -> None:
        self.check("superblock")
        self.log.add(events.SUPERBLOCK, target, new)
        self.check("superblock_late")


class _Recorder:
    """Indexable like the views of the map that ``MappedPool`` stores headers through."""

    def __init__(self, memory: memoryview, log: Log, *, words: bool) -> None:
        self._memory = memory.cast("Q") if words else memory
        self._log = log
        self._words = words

    def __getitem__(self, index: int) -> int:
        return self._memory[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self._memory[index] = value
        if self._words:
            self._log.add(events.STORE, 8 * index, WORD.pack(value))
        else:
            self._log.add(events.STORE, index.start, bytes(value))

    def release(self) -> None:
        self._memory.release()


class _Table:
    """Indexable like the array of all headers, shape (n, 8): by ``(places, 0)`` and ``(places, slice(1, None))``."""

    def __init__(self, memory: memoryview, log: Log) -> None:
        self._words = np.frombuffer(memory, "<u8").reshape(-1, HEADER_SIZE // WORD.size)
        self._log = log

    def __getitem__(self, index: Any) -> Any:
        return self._words[index]

    def __setitem__(self, index: Any, values: Any) -> None:
        self._words[index] = values
        places, columns = index
        first = columns.start if isinstance(columns, slice) else columns
        for slot, value in zip(numbers_of(places, np.int64).tolist(), values, strict=True):
            self._log.add(events.STORE, slot * HEADER_SIZE + first * WORD.size, value.tobytes())


class _SimMedium:
    """What headers and blocks are read from; superblocks are beside it."""

    path = Path("the simulator's pool")
    bad = ()

    def __init__(self, mapping: _SimMapping, log: Log) -> None:
        self._mapping = mapping
        self._log = log
        self.unreadable: frozenset[int] = frozenset()
        """offsets where reading fails"""
        self.known_bad: set[int] = set()
        """those of them that have been tried"""

    def read(self, buffer: memoryview, offset: int) -> int:
        for bad in self.unreadable:
            if offset <= bad < offset + len(buffer):
                self.known_bad.add(bad)
                raise OSError(errno.EIO, os.strerror(errno.EIO))
        buffer[:] = self._mapping.view[offset : offset + len(buffer)]
        return len(buffer)

    def write(self, data: Buffer, offset: int) -> None:
        self._mapping.written(offset, data)


class _SimMapping:
    """The three primitives over a bytearray."""

    def __init__(self, log: Log, content: bytes, durability: Durability, headers: int) -> None:
        self.durability = durability
        self._headers = headers
        self._memory = bytearray(content)
        self.view = memoryview(self._memory)
        self._seen = bytearray(content)
        """The memory as the record has it: what differs came in by direct I/O."""
        self._log = log

    def copy(self, offset: int, data: Buffer) -> None:
        self.written(offset, data)
        self._log.add(events.FLUSH, offset, len(data))

    def written(self, offset: int, data: Buffer) -> None:
        """What a system call has written: in the page cache, and nothing makes it go on."""
        size = len(data)
        self.view[offset : offset + size] = data
        self._seen[offset : offset + size] = data
        self._log.add(events.STORE, offset, bytes(data))

    def persist(self, offset: int, length: int) -> None:
        now = bytes(self.view[offset : offset + length])
        if offset >= self._headers and now != self._seen[offset : offset + length]:
            self._seen[offset : offset + length] = now
            self._log.add(events.STORE, offset, now)
        self._log.add(events.FLUSH, offset, length)

    def fence(self) -> None:
        self._log.add(events.FENCE)

    def close(self) -> None:
        self.view.release()


class SimPool(MappedPool):
    """A pool over an image."""

    def __init__(self, log: Log, image: PoolImage, durability: Durability, check: Check) -> None:
        headers = len(image.content) // (HEADER_SIZE + BLOCK) * HEADER_SIZE
        self.mapping = _SimMapping(log, image.content, durability, headers)
        medium: Any = _SimMedium(self.mapping, log)
        medium.unreadable = frozenset(headers + slot * BLOCK for slot in image.unreadable)
        superblocks = _SimSuperblocks.choose(medium, image.superblocks)
        superblocks.log, superblocks.check = log, check
        super().__init__(medium, superblocks, self.mapping, ExitStack())  # type: ignore[arg-type]
        self._header_bytes.release()
        self._words.release()
        self._header_bytes = _Recorder(self.mapping.view[:headers], log, words=False)  # type: ignore[assignment]
        self._words = _Recorder(self.mapping.view[:headers], log, words=True)  # type: ignore[assignment]
        self._headers = _Table(self.mapping.view[:headers], log)  # type: ignore[assignment]
        self._log = log
        self._check = check
        self._prepared: set[int] = set()
        if superblocks.damaged:
            superblocks.repair()

    def view(self, slot: int, count: int = 1) -> memoryview:
        if count == 1 and self._data_offset + slot * BLOCK in self._medium.unreadable:  # type: ignore[attr-defined]
            raise Violation(f"slot {slot} is loaded, and its media can't be read: this ends the process")
        return super().view(slot, count)

    def write(self, slot: int, data: Buffer) -> None:
        for each in range(slot, slot + len(data) // BLOCK):
            self._require_usable(each)
            if self.durability is Durability.DISK and each not in self._prepared:
                raise Violation(f"a store goes to slot {each}, which is not in memory and might be on bad media")
        super().write(slot, data)

    def prepare(self, slot: int, count: int = 1) -> None:
        for each in range(slot, slot + count):
            self._require_usable(each)
            self._prepared.add(each)
        super().prepare(slot, count)

    def _require_usable(self, slot: int) -> None:
        if self._data_offset + slot * BLOCK in self._medium.known_bad:  # type: ignore[attr-defined]
            raise Violation(f"slot {slot} is used again, and its media were found to be bad")

    def sync(self) -> None:
        if self.durability is not Durability.DISK:
            self.fence()
            return
        with self._sync_lock:
            self._require_media()
            try:
                self._check("pool_sync")
            except OSError:
                self._sync_failed = True
                raise
            self._log.add(events.SYNC, self._log.mark)


class CatalogState(NamedTuple):
    """What a catalog holds; never changed, but replaced."""

    files: dict[int, bytes]
    intents: dict[tuple[int, int], tuple[int, int]]
    settings: dict[str, bytes]

    def key(self) -> tuple[Any, ...]:
        """The same for equal states."""
        return (
            tuple(sorted(self.files.items())),
            tuple(sorted(self.intents.items())),
            tuple(sorted(self.settings.items())),
        )


EMPTY_CATALOG = CatalogState({}, {}, {})


class SimCatalog:
    """A :class:`cachefsd.media.ports.Catalog`: transactions are all or nothing, as LMDB's are.

    Of one that fails nobody knows which: fault ``catalog`` is nothing, ``catalog_late`` all. None succeeds afterwards,
    unless there was just no space.
    """

    def __init__(self, log: Log, state: CatalogState, check: Check) -> None:
        self.state = state
        self._log = log
        self._check = check
        self._failed = False

    def files(self) -> Iterator[FileRecord]:
        self._reading()
        return iter([decode_record(file_id, value) for file_id, value in sorted(self.state.files.items())])

    def table(self) -> Files:
        records = list(self.files())
        return Files(
            np.array([record.file_id for record in records], np.uint64),
            np.array([hash_of_handle(record.handle) for record in records], np.uint64),
            np.array([record.attr_seq for record in records], np.uint64),
            np.array([record.unlinked for record in records], np.bool_),
        )

    def record(self, file_id: int) -> FileRecord:
        self._reading()
        if file_id not in self.state.files:
            raise CatalogError(f"the catalog has no record of file {file_id}")
        return decode_record(file_id, self.state.files[file_id])

    def _reading(self) -> None:
        try:
            self._check("catalog_read")
        except OSError as error:
            raise CatalogError(f"the catalog: {error.strerror}") from error

    def intents(self) -> Sequence[Intent]:
        return [Intent(*key, *value) for key, value in sorted(self.state.intents.items())]

    def setting(self, name: str) -> bytes | None:
        return self.state.settings.get(name)

    def settings(self, prefix: str) -> dict[str, bytes]:
        return {name: value for name, value in self.state.settings.items() if name.startswith(prefix)}

    def transact(self, changes: Changes) -> None:
        try:
            if self._failed:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            self._check("catalog")
            self._commit(changes)
            self._check("catalog_late")
        except OSError as error:
            if error.errno == errno.ENOSPC:
                raise CatalogFullError(f"the catalog: {error.strerror}") from error
            self._failed = True
            raise CatalogError(f"the catalog: {error.strerror}") from error

    def _commit(self, changes: Changes) -> None:
        files, intents, settings = (dict(part) for part in self.state)
        for file_id in changes.delete:
            files.pop(file_id, None)
            intents = {key: value for key, value in intents.items() if key[0] != file_id}
        for file_id, seq in changes.drop_intents:
            intents = {key: value for key, value in intents.items() if key[0] != file_id or key[1] > seq}
        for record in changes.put:
            files[record.file_id] = encode_record(record)
        for intent in changes.add_intents:
            intents[intent.file_id, intent.seq] = (intent.size, intent.mtime_ns)
        for name, setting in changes.settings.items():
            if setting is None:
                settings.pop(name, None)
            else:
                settings[name] = setting
        self.state = CatalogState(files, intents, settings)
        self._log.add(events.CATALOG, self.state)

    def close(self) -> None:
        pass
