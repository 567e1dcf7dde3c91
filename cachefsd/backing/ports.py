"""What the engine asks of the backing: one regular file at a time, and a sync of everything.

These are the only names of this layer that ``core`` may import. All methods raise :class:`OSError` with
the errno that the kernel gave. None of the coroutines may block the loop, whatever the disk does;
none is left half done by a cancellation (it is waited for, and the cancellation comes after).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, NamedTuple, Protocol, Self

import numpy as np
import numpy.typing as npt

from cachefsd.times import KeptTimes, clamp


class BackingStat(NamedTuple):
    """The part of a stat that the engine needs. Times are within the range of ``cachefsd.times``."""

    size: int
    mtime_ns: int
    ctime_ns: int
    nlink: int

    @classmethod
    def of(cls, status: Any) -> Self:
        """Of what ``os.stat`` has returned."""
        return cls(status.st_size, clamp(status.st_mtime_ns), clamp(status.st_ctime_ns), status.st_nlink)


class Run(NamedTuple):
    """Whole blocks that are adjacent in a file, from the byte ``offset`` on: where in memory each of them lies, counted
    in blocks, shape (n,)."""

    offset: int
    places: npt.NDArray[np.integer[Any]]


class Piece(NamedTuple):
    """``length`` bytes for a file at byte ``offset``, which lie in memory from byte ``start`` on."""

    offset: int
    start: int
    length: int


class SmallWrite(NamedTuple):
    """What :meth:`Backing.write_files` does to one file: runs of whole blocks, its last and partial block if any, its
    mtime."""

    file: BackingFile
    runs: Sequence[Run]
    tail: Piece | None
    mtime_ns: int


class LostFile(NamedTuple):
    """A regular file that the backing has lost. It goes to ``name`` in the directory ``parent_handle``, or, where that
    directory is gone or the name taken, to the directory ``lost+found.cachefsd`` of the root as ``fallback``.

    ``numbered``: it goes to ``name`` with ``-1``, ``-2`` and so on behind it, whatever is free.
    ``size``: how long it is made, in bytes.
    ``copy_of``: the handle of a file whose content it gets, its first ``copy_size`` bytes, as far as that reaches and
    the file is there. ``copy_size`` is ``size`` at most.
    ``like``: the handle of a file whose owner and mode it gets instead, if the file is there.
    """

    parent_handle: bytes
    name: bytes
    fallback: bytes
    mode: int
    uid: int
    gid: int
    numbered: bool = False
    size: int = 0
    copy_of: bytes = b""
    copy_size: int = 0
    like: bytes = b""


class Place(NamedTuple):
    """Where a lost file goes: to a name in its own directory, or in ``lost+found.cachefsd`` of the root."""

    name: bytes
    aside: bool


class Space(NamedTuple):
    """What a file system has, in bytes."""

    total: int
    available: int
    """to users without privileges"""
    unit: int
    """in which it is allocated"""


class BackingFile(Protocol):
    """One regular file of the backing, found by its handle and held open while it matters.

    The descriptor stays the same from :meth:`open` to :meth:`close`: a writeback error that the kernel
    reports once reaches the :meth:`sync` that must hear of it.
    """

    handle: bytes
    sync_failures: int
    """How many syncs of this file have failed. A caller that wrote and then synced successfully must
    also find this unchanged: another sync may have consumed the error."""
    bounced_bytes: int
    """Bytes that did not go by direct I/O, in both directions, since the file object exists."""
    direct_bytes: int
    direct: bool
    """Whether :meth:`read` and :meth:`write_runs` go past the page cache; known once opened."""
    max_size: int
    """No file of its kind can be longer; known once opened."""

    @property
    def writable(self) -> bool:
        """Whether an open descriptor for writing is held."""

    async def open(self, *, write: bool) -> None:
        """Open the descriptors unless they are. ESTALE when the file is no more."""

    async def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """Fill ``views`` in order from ``offset`` on, both block aligned; return the number of bytes,
        short only at the end of the file."""

    async def write_runs(self, memory: memoryview, runs: Sequence[Run]) -> None:
        """Write all of ``runs``, blocks of ``memory`` to block-aligned offsets, by direct I/O, in any order.

        It returns, or raises the error of the first one that failed, when all of them have ended: nothing reads their
        memory any more.
        """

    async def write_tail(self, offset: int, data: memoryview) -> None:
        """Write the last, partial block of a file, through the page cache."""

    async def truncate(self, size: int) -> BackingStat:
        """Set the size; what the file looks like then."""

    async def set_mtime(self, mtime_ns: int) -> None:
        """Set the modification time, leave the access time."""

    async def sync(self) -> None:
        """fsync on the descriptor that was written to."""

    async def allocated_until(self, offset: int) -> int:
        """Where the space ends that the file has from ``offset`` on: writing up to there takes no more of it.
        ``offset`` itself where it has none there, or shares it with another file, or where nobody can tell."""

    async def stat(self) -> BackingStat:
        """Size, times and number of names."""

    def close(self) -> None:
        """Close the descriptors; :meth:`open` may be called again."""


class Backing(Protocol):
    """The directory beneath, as far as the engine needs it."""

    @property
    def times(self) -> KeptTimes:
        """What its file system makes of times."""

    @property
    def overwrites_take_space(self) -> bool:
        """Whether it copies on write: new data never goes to where the old is."""

    @property
    def most_kept_open(self) -> int:
        """How many files may stay open that nobody uses: any number where one could not be opened again by its
        handle."""

    def file(self, handle: bytes) -> BackingFile:
        """An object for the file with this handle; nothing is opened yet, unless it has just been created."""

    def scratch(self, size: int) -> memoryview:
        """``size`` bytes of memory that direct I/O can read into (page aligned)."""

    async def space(self) -> Space:
        """What the file system has, and has left."""

    async def sync_all(self) -> None:
        """Make the whole backing durable, names included (syncfs)."""

    @property
    def sync_all_tells_files(self) -> bool:
        """Whether :meth:`sync_all` makes the data of files durable as their :meth:`BackingFile.sync` does, and each
        file can be asked afterwards whether that has met an error."""

    async def write_files(
        self, memory: memoryview, waiting: deque[SmallWrite], written: list[tuple[SmallWrite, OSError | None]]
    ) -> None:
        """Do what is ``waiting``, one after the other, through the page cache; open files that are not open.

        Each goes to ``written`` when it has ended, with its error if it has failed. The caller may take out of
        ``waiting`` what has not begun, at any time. Only when this returns nothing reads ``memory`` any more.
        """

    async def finish_files(self, files: Sequence[BackingFile], *, synced: bool) -> list[BackingStat | OSError]:
        """Make durable what was written to each of ``files``: what it looks like then, or the error that concerns it.

        ``synced``: a :meth:`sync_all` that began after the writes has been good, so that files are only asked for
        errors. What fails counts in ``sync_failures``.
        """

    async def recreate(self, lost: LostFile, note: Callable[[bytes, Place], Awaitable[None]]) -> None:
        """Create a lost regular file again. What it gets of another one is durable.

        ``note`` is awaited with its handle and its place before it has a name (where the file system has files without
        names), so that a crash leaves either nothing of it or a file that is known. It is awaited again if the place
        turns out to be another one.

        :raises OSError: from the backing, or what ``note`` raises.
        """
