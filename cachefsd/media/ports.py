"""What the engine asks of its media: a pool of slots and a catalog of files.

These are the only names of this layer that ``core`` may import. The crash simulator implements them
over images in memory; production implements them in ``pool.py`` and ``catalog.py``.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
from xxhash import xxh3_64_intdigest

from cachefsd.runs import SlotIndex

NUMBERS_END = 1 << 63
"""Above all file ids, sequence numbers and sizes: from here on one of them can only be damaged."""
Buffer = bytes | bytearray | memoryview
U8 = npt.NDArray[np.uint8]
U64 = npt.NDArray[np.uint64]
Bools = npt.NDArray[np.bool_]


class Durability(enum.StrEnum):
    """What an acknowledged write survives; decided once, when the pool is opened."""

    PMEM = "pmem"
    """DAX with MAP_SYNC: a fenced store survives a power cut."""
    DISK = "disk"
    """An ordinary file: stores survive the daemon, :meth:`Pool.sync` makes them survive a power cut."""
    RAM = "ram"
    """tmpfs: survives the daemon and nothing else."""


class SlotState(enum.IntEnum):
    """State of a slot as its header says it."""

    FREE = 0
    CLEAN = 1
    DIRTY = 2
    QUARANTINED = 3


NO_FILE = 0
"""No file has this id. It stands in the headers of slots that are set aside, and of slots never used."""


class Holding(enum.IntEnum):
    """What a slot holds, as far as its header tells."""

    FREE = 0
    CLEAN = 1
    DIRTY = 2
    LOST = 3
    """the place of a block of a file, whose data is lost"""
    SET_ASIDE = 4
    """nothing: its media are bad, and it is never used again"""
    UNKNOWN = 5
    """nobody knows: its header is damaged or can't be read"""


@dataclass(frozen=True, slots=True)
class Headers:
    """Headers of consecutive slots as parallel arrays (see docs/format.md).

    ``malformed`` marks headers that claim a live state and fail their checks; the other fields of
    such a slot mean nothing. ``unreadable`` marks those whose media could not be read (EIO).
    ``seq_known`` marks headers whose body (w1-w7) is intact whatever their state, FREE included: their
    ``seq`` was once given out. ``mtime_ns`` are words, see ``cachefsd.times``.
    """

    first_slot: int
    state: U8
    seq: U64
    file_id: U64
    block: U64
    checksum: U64
    mtime_ns: U64
    length: U64
    seq_known: Bools
    malformed: Bools
    unreadable: Bools

    def holdings(self) -> U8:
        """What each slot holds, as :class:`Holding`."""
        found = self.state.copy()  # the first four are numbered as the states are
        found[(self.state == SlotState.QUARANTINED) & (self.file_id == NO_FILE)] = Holding.SET_ASIDE
        found[self.malformed | self.unreadable] = Holding.UNKNOWN
        return found


class Pool(Protocol):
    """A mapped file of slots, each a block of data and a 64-byte header.

    Stores become durable in two steps: every store below also starts its way to the media (*persist*),
    and :meth:`fence` waits until all started ones have arrived. In class ``disk`` a fence orders
    nothing and only :meth:`sync` makes stores durable. All methods are called from one thread, but
    for :meth:`sync` in class ``disk``, which may run in a worker thread beside stores of the first.
    """

    durability: Durability
    block_size: int
    slots: int
    incarnation: int
    """How often this pool has been opened for serving, this time included."""
    was_clean: bool
    """Whether the previous owner set the clean flag; meaningless after :meth:`mark_open`."""
    place: str
    """Where it is, for people."""
    seq_floor: int
    """No sequence number at or below this one may be given out again."""
    persisted_seq: int
    """Class ``disk``: versions up to this one were durable when the superblock was written."""

    def view(self, slot: int, count: int = 1) -> memoryview:
        """The live bytes of ``count`` adjacent slots, writable: direct I/O reads into them."""

    def write(self, slot: int, data: Buffer) -> None:
        """Copy ``data`` (a whole number of blocks) to adjacent slots from ``slot`` on, and persist it."""

    def read(self, slot: int) -> Buffer:
        """The bytes of a block, by ``read`` and not by load: a copy.

        :raises OSError: the media can't be read there, where a load would end the process (SIGBUS).
        """

    def prepare(self, slot: int, count: int = 1) -> None:
        """Class ``disk``: overwrite the data of adjacent free slots with zeros, by ``write`` and not by stores.

        A store into a page that is not in memory reads that page first, and ends the process where this fails. After
        this call the pages are in memory.

        :raises OSError: from the media.
        """

    def persist(self, slot: int, count: int = 1) -> None:
        """Persist data that came into ``view`` by other ways than :meth:`write`."""

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
        """Store a header: w1-w7, then w0 by one 8-byte store; persist the line.

        ``length`` is the number of valid bytes of the block, 1 to ``block_size``.
        """

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
        """:meth:`publish` of consecutive blocks from ``block`` on, with consecutive numbers from ``seq`` on.

        ``places`` are the slots, in the order of the blocks; ``checksums`` are of shape (n,); all blocks are full but
        the last one.
        """

    def set_state(self, slot: int, state: SlotState) -> None:
        """Change the state of a published header by one 8-byte store; persist the line."""

    def set_states(self, places: SlotIndex, state: SlotState) -> None:
        """:meth:`set_state` of many slots."""

    def fence(self) -> None:
        """Wait until all that was persisted is durable (``disk``: nothing to wait for)."""

    def sync(self) -> None:
        """Make every store so far durable. Blocks: in class ``disk`` this is fdatasync.

        :raises OSError: from the media; then nothing since the last good sync may be called durable.
        """

    def scan(self, first_slot: int, count: int) -> Headers:
        """Read and check headers from the media, by ``read`` and not by load: poison must give EIO."""

    def checksum_of(self, slot: int) -> int:
        """The data checksum that the header of ``slot`` carries."""

    def checksums_of(self, slots: npt.NDArray[np.integer[Any]]) -> U64:
        """:meth:`checksum_of` for many slots, shape (n,); a copy."""

    def mark_open(self) -> None:
        """Clear the clean flag and count the incarnation, durably: before the first change."""

    def mark_persisted(self, seq: int) -> None:
        """Class ``disk``: note durably that versions up to ``seq`` are durable. Blocks."""

    def mark_clean(self, seq_floor: int) -> None:
        """Set the clean flag, durably: after everything else has been made durable."""

    def close(self) -> None:
        """Unmap and unlock. Views must have been released."""


class Stamp(NamedTuple):
    """What tells whether a file of the backing was changed by somebody else."""

    size: int
    mtime_ns: int
    ctime_ns: int


@dataclass(slots=True)
class FileRecord:
    """What the catalog knows about one regular file of the backing that has slots.

    ``handle`` is the kernel's file handle, opaque here. ``parent_handle`` and ``name`` are hints, used
    only to create a file again whose creation the backing lost; ``path`` is for people. ``stamp`` is
    the backing file as cachefsd last left it: None means that clean blocks can't be trusted.
    ``attr_seq``: versions up to this one no longer decide the file's mtime: ``mtime_ns`` does, until a
    later version says otherwise.
    ``ctime_ns`` is the visible change time as long as the backing file's is still ``stamp.ctime_ns``.
    ``unlinked`` says that the last name was about to be removed.
    ``touched``: size or mtime of the backing file may have been changed by cachefsd since the stamp.
    ``synced``: a power cut cannot make the backing file older than the stamp, nor take its name.
    ``doubtful``: a sync of the backing file tells nothing before all that is dirty has been written again.
    """

    file_id: int
    handle: bytes
    parent_handle: bytes = b""
    name: bytes = b""
    path: bytes = b""
    mode: int = 0o100600
    uid: int = 0
    gid: int = 0
    stamp: Stamp | None = None
    attr_seq: int = 0
    mtime_ns: int = 0
    ctime_ns: int = 0
    unlinked: bool = False
    touched: bool = False
    synced: bool = False
    doubtful: bool = False


class Intent(NamedTuple):
    """A truncate that was acknowledged, or is about to be: ``file_id`` cut or extended to ``size`` bytes.

    Versions of the file with a lower ``seq`` are dead from ``size`` on. Of intents and versions the one with the
    highest ``seq`` says the file's mtime.
    """

    file_id: int
    seq: int
    size: int
    mtime_ns: int


@dataclass(slots=True)
class Changes:
    """One catalog transaction: all of it becomes durable, or nothing. What is removed is removed first."""

    put: list[FileRecord] = field(default_factory=list)
    delete: list[int] = field(default_factory=list)
    """file ids; their intents go with them"""
    add_intents: list[Intent] = field(default_factory=list)
    drop_intents: list[tuple[int, int]] = field(default_factory=list)
    """(file id, seq): intents of that file up to and including that seq"""
    settings: dict[str, bytes | None] = field(default_factory=dict)
    """None removes one"""


class Files(NamedTuple):
    """What recovery needs of every record at once, as arrays of shape (n,), by file id."""

    file_id: U64
    handle_hash: U64
    """see :func:`hash_of_handle`"""
    attr_seq: U64
    unlinked: Bools


def hash_of_handle(handle: bytes) -> int:
    """64 bits that tell handles apart, but for rare cases: who relies on it compares the handles as well."""
    return xxh3_64_intdigest(handle)


class Catalog(Protocol):
    """The durable table of files. Every method is one transaction, begun and ended inside the call."""

    def files(self) -> Iterator[FileRecord]:
        """All records, by file id."""

    def table(self) -> Files:
        """The numbers of all records. All of each record is checked.

        :raises CatalogError: the catalog can't be read, or a record is damaged.
        """

    def record(self, file_id: int) -> FileRecord:
        """The record of one file. May be called from any thread.

        :raises CatalogError: there is none, or it can't be read.
        """

    def intents(self) -> Sequence[Intent]:
        """All intents, by file id and seq."""

    def setting(self, name: str) -> bytes | None:
        """A small named value, or None."""

    def settings(self, prefix: str) -> dict[str, bytes]:
        """All of those whose names begin so."""

    def transact(self, changes: Changes) -> None:
        """Apply ``changes`` in one transaction, durable on return.

        :raises CatalogFullError: there is no space; nothing was applied, and the catalog goes on.
        :raises CatalogError: nothing was applied, or nobody knows: the catalog takes no further commits.
        """

    def close(self) -> None:
        """Close the environment."""


class CatalogError(Exception):
    """The catalog can't be read or written; the message is one line."""


class CatalogFullError(CatalogError):
    """The disk of the catalog is full."""
