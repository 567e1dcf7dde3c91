"""The pool port over a mapped file or device."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from cachefsd.errors import UserError
from cachefsd.media import extents
from cachefsd.media.cachedir import PrivateDirectory
from cachefsd.media.header import HEADER_SIZE, WORDS_PER_HEADER
from cachefsd.media.mapping import Mapping, nothing_to_persist
from cachefsd.media.medium import DeviceMedium, FileMedium, Medium
from cachefsd.media.poolfile import POOL, erase, open_locked, require_durable
from cachefsd.media.poolreader import PoolReader, load_superblocks
from cachefsd.media.poolrecord import PoolRecord
from cachefsd.media.ports import U64, Buffer, Durability, SlotState
from cachefsd.media.superblock import IDENTITY_MAX, PATH_HINT_MAX, SuperblockPair
from cachefsd.runs import SlotIndex, numbers_of, stretches

_NO_HEADERS = np.empty((0, WORDS_PER_HEADER), np.uint64)


class MappedPool(PoolReader):
    """A :class:`cachefsd.media.ports.Pool` over a map; see there for the methods of the port.

    ``notes`` are lines for people about what was found and repaired on opening.
    """

    def __init__(
        self, medium: Medium, superblocks: SuperblockPair, mapping: Mapping, resources: contextlib.ExitStack
    ) -> None:
        """``resources``, the medium and what else was locked, are closed together with the pool."""
        super().__init__(medium, superblocks, resources)
        self._mapping = mapping
        self._view = mapping.view
        self._header_bytes = self._view[self._header_offset :][: self.slots * HEADER_SIZE]
        self._words = self._header_bytes.cast("Q")
        self._headers = np.frombuffer(self._header_bytes, "<u8").reshape(-1, WORDS_PER_HEADER)
        self._copy = mapping.copy
        self._persist = mapping.persist
        self.fence = mapping.fence
        self._sync_lock = threading.Lock()
        self._sync_failed = False

        self.durability: Durability = mapping.durability
        self.incarnation = self.superblock.incarnation + 1
        self.seq_floor = self.superblock.seq_floor
        self.persisted_seq = self.superblock.persisted_seq
        self.notes: list[str] = []

    @property
    def fileno(self) -> int:
        """The descriptor of what is mapped."""
        return self._medium.fd

    def bind(self, identity: bytes, path_hint: bytes) -> None:
        """Note durably to which backing the pool belongs.

        ``identity`` is opaque, 1 to 64 bytes; of ``path_hint`` 256 bytes are kept.
        """
        if not 0 < len(identity) <= IDENTITY_MAX:
            raise ValueError(f"an identity has 1 to {IDENTITY_MAX} bytes")
        self._store(identity=identity, path_hint=path_hint[:PATH_HINT_MAX])

    def view(self, slot: int, count: int = 1) -> memoryview:
        start = self._data_offset + slot * self.block_size
        return self._view[start : start + count * self.block_size]

    def write(self, slot: int, data: Buffer) -> None:
        self._copy(self._data_offset + slot * self.block_size, data)

    def prepare(self, slot: int, count: int = 1) -> None:
        self._medium.write(bytes(count * self.block_size), self._data_offset + slot * self.block_size)

    def persist(self, slot: int, count: int = 1) -> None:
        self._persist(self._data_offset + slot * self.block_size, count * self.block_size)

    def publish(
        self,
        slot: int,
        state: SlotState,
        seq: int,
        file_id: int,
        block: int,
        checksum: int,
        mtime_ns: int,
        length: int,
    ) -> None:
        # struct.pack_into would zero its target first: the words are put together beside the map.
        body = self._codec.body(seq, file_id, block, checksum, mtime_ns, slot, length)
        state_word = self._codec.state_word(state, seq, slot)
        offset = slot * HEADER_SIZE
        self._header_bytes[offset + 8 : offset + HEADER_SIZE] = body
        self._words[slot * WORDS_PER_HEADER] = state_word
        self._persist(self._header_offset + offset, HEADER_SIZE)

    def publish_run(
        self,
        places: SlotIndex,
        state: SlotState,
        seq: int,
        file_id: int,
        block: int,
        checksums: U64,
        mtime_ns: int,
        last_length: int,
    ) -> None:
        slots = numbers_of(places, np.uint64)
        words = self._codec.headers(state, seq, file_id, block, checksums, mtime_ns, slots, last_length)
        # All bodies come before all state words, so each comes before its own; numpy stores aligned words whole.
        self._headers[places, 1:] = words[:, 1:]
        self._headers[places, 0] = words[:, 0]
        self._persist_headers(places)

    def set_state(self, slot: int, state: SlotState) -> None:
        words = self._words
        first = slot * WORDS_PER_HEADER
        words[first] = self._codec.state_word(state, words[first], slot)
        self._persist(self._header_offset + slot * HEADER_SIZE, 8)

    def set_states(self, places: SlotIndex, state: SlotState) -> None:
        slots = numbers_of(places, np.uint64)
        self._headers[places, 0] = self._codec.state_words(state, self._headers[places, 0], slots)
        self._persist_headers(places)

    def _persist_headers(self, places: SlotIndex) -> None:
        if self._persist is nothing_to_persist:
            return
        for first, count in stretches(places):
            self._persist(self._header_offset + first * HEADER_SIZE, count * HEADER_SIZE)

    def sync(self) -> None:
        if self.durability is Durability.PMEM:
            self.fence()
        elif self.durability is Durability.DISK:
            with self._sync_lock:
                self._require_media()
                try:
                    self._medium.sync()
                except OSError:
                    # The kernel reports a failed page once and then takes it for clean.
                    self._sync_failed = True
                    raise

    def checksum_of(self, slot: int) -> int:
        return self._words[slot * WORDS_PER_HEADER + 4]

    def checksums_of(self, slots: npt.NDArray[np.integer[Any]]) -> U64:
        result: U64 = self._headers[slots, 4]
        return result

    def mark_open(self) -> None:
        self._store(clean=False, incarnation=self.incarnation)

    def mark_persisted(self, seq: int) -> None:
        self._store(persisted_seq=seq)
        self.persisted_seq = seq

    def mark_clean(self, seq_floor: int) -> None:
        self._store(clean=True, seq_floor=seq_floor)
        self.seq_floor = seq_floor

    def _store(self, **changes: object) -> None:
        # Its fdatasync may be the one that hears of an error of the slots, so it counts as a sync.
        with self._sync_lock:
            self._require_media()
            try:
                self._superblocks.store(**changes)
            except OSError:
                self._sync_failed = True
                raise

    def _require_media(self) -> None:
        if self._sync_failed:
            raise OSError(errno.EIO, "an earlier sync of the pool failed")

    def close(self) -> None:
        self._headers = _NO_HEADERS  # numpy holds the map as well
        self._words.release()
        self._header_bytes.release()
        self._mapping.close()
        super().close()

    def abandon(self) -> None:
        """The name of the pool is about to be removed: leave nothing on a device that looks like one.

        :raises OSError: from the media.
        """
        if isinstance(self._medium, DeviceMedium):
            erase(self._medium)


def open_pool(
    cache: Path, *, volatile: bool = False, persistence: Durability | None = None, replacing: bool = False
) -> MappedPool:
    """Lock, validate and map the pool of the cache directory ``cache``: the file there, or the device it names.

    Until :meth:`MappedPool.mark_open` nothing is changed but a damaged superblock. ``volatile`` admits class
    ``ram``. ``persistence`` makes an ordinary map with the primitives of that class, wherever the pool is:
    for tests. ``replacing``: the caller has locked the directory.

    :raises UserError: the pool is missing, in use, damaged, or not to be used as it is.
    """
    path = cache / POOL
    with contextlib.ExitStack() as undo:
        try:
            directory = undo.enter_context(PrivateDirectory(cache))
            if not replacing:
                directory.lock(shared=True)
            medium: Medium = undo.enter_context(contextlib.closing(FileMedium(open_locked(directory), path)))
            record = PoolRecord.read(medium)
        except OSError as error:
            raise UserError(f"{path}: can't open the pool: {error.strerror}") from error
        memory = None
        if record is not None:
            memory = require_durable(medium.fd, path, volatile=volatile)
            medium = undo.enter_context(contextlib.closing(DeviceMedium(record.device)))
        pool = attach(medium, undo, record, volatile=volatile, persistence=persistence)
    if record is None and pool.durability is Durability.DISK:
        pool.notes += extents.notes(pool.fileno, path)
    if memory:
        pool.durability = Durability.RAM  # what the cache knows of files goes with the power
    return pool


def attach(
    medium: Medium,
    resources: contextlib.ExitStack,
    record: PoolRecord | None = None,
    *,
    volatile: bool = False,
    persistence: Durability | None = None,
) -> MappedPool:
    """Validate and map the pool on an open, locked medium; see :func:`open_pool`.

    ``record`` says which pool it has to be. Unless this fails, ``resources`` pass to the pool, which closes them.

    :raises UserError: there is none, or it is not to be used as it is.
    """
    try:
        superblocks = load_superblocks(medium, record)
        size = superblocks.current.geometry.file_size
        mapping = Mapping(medium.fd, size, name=os.fspath(medium.path), volatile=volatile, forced=persistence)
        pool = MappedPool(medium, superblocks, mapping, resources.pop_all())
    except OSError as error:
        raise UserError(f"{medium.path}: can't use the pool: {error.strerror}") from error
    if superblocks.damaged:
        try:
            pool.notes.append(superblocks.repair())
        except OSError as error:
            pool.close()
            raise UserError(f"{medium.path}: can't repair a superblock: {error.strerror}") from error
    return pool
