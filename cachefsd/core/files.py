"""One regular file as the engine sees it: what users see of it, what is known of it, what is owed to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from enum import Enum, auto
from typing import NamedTuple

import trio

from ..backing.ports import BackingFile
from ..media.ports import FileRecord, Intent, Stamp
from .blocktable import BlockTable
from .errseq import ErrorSequence


class Hints(NamedTuple):
    """What helps to create a file again whose creation the backing has lost (see FileRecord)."""

    parent_handle: bytes
    name: bytes
    path: bytes
    mode: int
    uid: int
    gid: int


class Fetch:
    """Blocks on their way from the backing. It is current for a block as long as the file's ``fetches``
    names it; a write or truncate that comes in between takes the name away, and the result is dropped."""

    __slots__ = ("done",)

    def __init__(self) -> None:
        self.done = trio.Event()


class Life(Enum):
    """What may be done with a file: one of these at a time, see docs/concurrency.md."""

    UNSEEN = auto()
    """It comes from its record, and nobody has looked at the backing file since: size and times are unknown."""
    HELD = auto()
    """It could not be brought up to date after a start: nobody may use it."""
    USABLE = auto()
    CUT = auto()
    """Between a truncate's intent and its end: no version is published but those that the truncate itself publishes."""


class Record(Enum):
    """What the catalog has of a file."""

    NONE = auto()
    OUTDATED = auto()
    """It must be written again before a new version comes."""
    CURRENT = auto()


CUT = Life.CUT  # for the hot path: an attribute of an enumeration costs more than a global name


class CachedFile:
    """One regular file. All fields belong to the engine; FUSE reads size, times and ``backing``.

    ``life``, ``record``, ``tombstone``, ``unlinked`` and ``stopped`` are changed by the methods here, which keep
    ``ready`` in step.

    Invariants: ``size >= backing_size`` but for a truncate in progress; uncached blocks from
    ``backing_size`` on are zeros; bytes of a cached block from ``size`` on are zeros;
    ``dirty > 0`` or ``intents`` exactly when the file is in the dirty queue.
    """

    __slots__ = (
        "_truncate_done",
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
        "life",
        "lock",
        "mtime_ns",
        "needs_sync",
        "newest",
        "no_space",
        "open_count",
        "ready",
        "record",
        "record_lock",
        "ref_count",
        "retry_at",
        "size",
        "stamp",
        "stopped",
        "sync_lock",
        "sync_names",
        "synced",
        "table",
        "tombstone",
        "touched",
        "touches",
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
        # -- its life
        self.life = Life.USABLE
        self.held: OSError | None = None
        """While it is HELD: why."""
        self._truncate_done: trio.Event | None = None
        """While it is CUT: set at the end."""
        self.record = Record.NONE
        self.tombstone = False
        """The record on the media says unlinked."""
        self.unlinked = False
        self.stopped = False
        """The cache has failed: nothing more is acknowledged."""
        self.ready = False
        """Writes need not wait for anything but slots. It follows from the other fields, see :meth:`_derive`."""
        # -- what users see
        self.size = 0
        self.mtime_ns = 0
        self.ctime_ns = 0
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
        """mtime_ns when a failure was last entered there: a failure of later data is entered again."""
        self.no_space = 0
        """The errno of that, if it says that the backing has no space for the file."""
        self.failures = 0
        self.retry_at = 0.0

    @property
    def idle(self) -> bool:
        """Whether nobody has it open, and no operation that uses the backing file is under way."""
        return not (self.open_count or self.fetches or self.lock.locked() or self.sync_lock.locked())

    @property
    def label(self) -> str:
        """Its path as far as it is known, for people."""
        path = self.hints().path if self.hints else b""
        return path.decode("utf-8", "backslashreplace") if path else f"file {self.file_id}"

    # ---- its life

    def _derive(self) -> None:
        self.ready = (
            self.life is Life.USABLE
            and self.record is Record.CURRENT
            and self.tombstone == self.unlinked
            and not self.stopped
        )

    def stop(self) -> None:
        """The cache has failed."""
        self.stopped = True
        self._derive()

    def seen(self) -> None:
        """Size and times are known: it may be used."""
        self.life, self.held = Life.USABLE, None
        self._derive()

    def hold(self, error: OSError) -> None:
        """It could not be brought up to date: who wants to use it gets the error."""
        self.life, self.held = Life.HELD, error
        self._derive()

    def let_go(self) -> None:
        """It is not held any more."""
        if self.life is Life.HELD:
            self.life, self.held = Life.UNSEEN, None

    @contextmanager
    def cut(self) -> Iterator[None]:
        """Around a truncate, with the lock held."""
        done = trio.Event()
        self.life, self._truncate_done = Life.CUT, done
        self._derive()
        try:
            yield
        finally:
            done.set()
            self.life, self._truncate_done = Life.USABLE, None
            self._derive()

    @contextmanager
    def published_by_truncate(self) -> Iterator[None]:
        """What a truncate itself publishes before its end is cut already. There must be no await within."""
        life, self.life = self.life, Life.USABLE
        try:
            yield
        finally:
            self.life = life

    async def until_truncate_done(self) -> None:
        """Wait until no truncate is between its intent and its end: nothing may be published of the file there."""
        while self._truncate_done is not None:  # another truncate may be the next one to run
            await self._truncate_done.wait()

    # ---- its record and its names

    @property
    def recorded(self) -> bool:
        """Whether the catalog has a record of it."""
        return self.record is not Record.NONE

    @property
    def record_fits(self) -> bool:
        """Whether the record says all that it must say before a new version comes."""
        return self.record is Record.CURRENT and self.tombstone == self.unlinked

    def was_recorded(self, *, tombstone: bool, outdated: bool) -> None:
        """A record was committed. ``outdated``: it must be written again before a new version comes."""
        self.record, self.tombstone = Record.OUTDATED if outdated else Record.CURRENT, tombstone
        self._derive()

    def outdate_record(self) -> None:
        """The next version waits for a new record."""
        if self.record is Record.CURRENT:
            self.record = Record.OUTDATED
            self._derive()

    def renew_record(self) -> None:
        """The record has been written again."""
        if self.record is Record.OUTDATED:
            self.record = Record.CURRENT
            self._derive()

    def forget_record(self) -> None:
        """It leaves memory, and its record is nobody's."""
        self.record = Record.NONE
        self._derive()

    def unlink(self) -> None:
        """Its last name is gone, or about to go."""
        self.unlinked = True
        self._derive()

    def keep_name(self) -> None:
        """It has a name after all."""
        self.unlinked = False
        self._derive()


def file_of(record: FileRecord, backing: BackingFile) -> CachedFile:
    """A file as its record says it is; its blocks, and what the backing says of it, are still to come."""
    file = CachedFile(record.handle, backing)
    hints = Hints(record.parent_handle, record.name, record.path, record.mode, record.uid, record.gid)
    file.hints = lambda: hints
    file.file_id = record.file_id
    file.life = Life.UNSEEN
    file.record = Record.CURRENT
    file.touched = file.announced = record.touched
    file.synced, file.doubtful = record.synced, record.doubtful
    file.tombstone = file.unlinked = record.unlinked
    file.stamp, file.attr_seq = record.stamp, record.attr_seq
    file.mtime_ns, file.ctime_ns = record.mtime_ns, record.ctime_ns
    return file
