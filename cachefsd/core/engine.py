"""What users of files see: it counts the users of a file, takes its last name away, and makes it durable.

Data and attributes are in parts of their own: :class:`Reader`, :class:`Writer` and :class:`Attributes`. ``read`` and
``write`` answer at once when the cache can (no await: the hot path). When they cannot, ``read_slow`` and
``write_slow`` bring what is missing and try again.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import trio

from ..backing.ports import BackingStat
from ..media.ports import Stamp
from . import report
from .attributes import Attributes
from .cache import Cache
from .fetch import Fetcher
from .files import CachedFile, Hints, Life
from .reading import Reader
from .settle import settle
from .slots import DIRTY, SET_ASIDE
from .space import Space
from .upkeep import Upkeep
from .writeback import Writeback
from .writing import Writer

log = logging.getLogger(__name__)
FLUSH_TRIES = 3  # failed rounds of a file after which a flush gives up and says why


class Engine:
    """The cache as its users see it."""

    def __init__(self, cache: Cache, retry: Callable[[], Awaitable[None]] | None = None) -> None:
        """``retry`` runs beside the engine and tries the files again that were set aside."""
        self.cache = cache
        self.block_size = cache.block_size
        self.writeback = Writeback(cache)
        self.space = Space(cache, self.writeback)
        self._upkeep = Upkeep(cache)
        fetcher = Fetcher(cache)
        self.reader = Reader(cache, fetcher)
        self.writer = Writer(cache, fetcher, self.space)
        self.attributes = Attributes(cache, self.space)
        self._retry = retry

    # ---- files

    def find(self, handle: bytes) -> CachedFile | None:
        """The file with this handle, if the engine knows it: it has slots or users.

        :raises OSError: EIO when the catalog can't be read; the cache has failed then.
        """
        return self.cache.files.find(handle)

    def path_of(self, handle: bytes) -> bytes:
        """The path last known for a handle, or an empty one. May be called from any thread."""
        file = self.cache.files.by_handle.get(handle)
        if file is None:
            return self.cache.files.dormant.path_of(handle)
        return file.hints().path if file.hints is not None else b""

    def acquire(
        self,
        handle: bytes,
        stat: BackingStat,
        hints: Callable[[], Hints],
        sync_names: Callable[[], Awaitable[None]],
    ) -> CachedFile:
        """Get or make the file with this handle and count a user of it.

        ``stat`` is the backing file as it is now; it matters for a file that is new here. ``sync_names`` makes the
        file's names durable: it is called before blocks become clean.

        :raises OSError: the file could not be brought up to date after the start, and this is why. EIO when the
            catalog can't be read; the cache has failed then.
        """
        cache = self.cache
        file = cache.files.find(handle)
        if file is not None:
            self._require_usable(file)
        if file is None:
            file = cache.files.new(handle)
            file.size = file.backing_size = stat.size
            file.mtime_ns, file.ctime_ns = stat.mtime_ns, stat.ctime_ns
            file.stamp = Stamp(stat.size, stat.mtime_ns, stat.ctime_ns)
            if stat.nlink == 0:
                file.unlink()
        elif file.life is Life.UNSEEN:
            settle(cache, file, stat)
        file.hints, file.sync_names = hints, sync_names
        file.ref_count += 1
        return file

    def is_held(self, handle: bytes) -> bool:
        """Whether :meth:`acquire` would refuse the file with this handle."""
        file = self.cache.files.by_handle.get(handle)
        return file is not None and file.held is not None

    def require_usable(self, handle: bytes) -> None:
        """:raises OSError: :meth:`acquire` would refuse the file with this handle, and this is why."""
        file = self.cache.files.by_handle.get(handle)
        if file is not None:
            self._require_usable(file)

    @staticmethod
    def _require_usable(file: CachedFile) -> None:
        if file.held is not None:
            raise OSError(file.held.errno, file.held.strerror)

    def release(self, file: CachedFile) -> None:
        """One user less. Without users and slots the file leaves memory."""
        file.ref_count -= 1
        if file.ref_count:
            return
        file.sync_names, file.unnamed_since = None, self.cache.syncs.begun
        if file.unlinked:
            self.cache.files.orphan(file)
            self.space.freed()
        elif file.hints is not None:
            last = file.hints()  # the callable may hold what its user is about to close
            file.hints = lambda: last
        self.cache.files.forget(file)

    def opened(self, file: CachedFile) -> None:
        """A user has opened the file."""
        file.open_count += 1

    def closed(self, file: CachedFile) -> None:
        """A user has closed it; an idle file gives its descriptors back."""
        file.open_count -= 1
        self.cache.files.close_if_idle(file)

    def close_idle(self) -> None:
        """Give back the descriptors of files that nobody has open, as far as these can be opened again."""
        if self.cache.backing.most_kept_open < sys.maxsize:
            self.cache.files.close_idle()

    # ---- names

    async def unlinking(self, file: CachedFile) -> None:
        """The last name is about to go: say so durably first, or a crash would create the file again."""
        self._require_usable(file)
        file.unlink()
        owed = file.dirty or file.intents or self.cache.integrity.lost(file)
        if file.recorded and (owed or self.cache.slots.deferred):
            try:
                await self.cache.records.record(file)
            except BaseException:
                await self.unlink_failed(file)
                raise

    def unlinked(self, file: CachedFile) -> None:
        """The last name is gone. Slots are kept until the backing's unlink is durable."""
        self.space.freed()
        if not file.ref_count:
            self.cache.files.orphan(file)

    async def unlink_failed(self, file: CachedFile) -> None:
        """The name is still there after all. The record must say so again, before a crash that loses the backing's
        file: it would take the data for unlinked, too."""
        file.keep_name()
        self.writeback.look_again()  # while it had no name it was not due
        if file.recorded:
            with trio.CancelScope(shield=True), suppress(OSError):  # the cache has failed then, and says so
                await self.cache.records.record(file)

    # ---- durability for users

    async def fsync(self, file: CachedFile) -> None:
        """Make data and inode durable, wherever they are: data in the cache, with or without the backing.

        That the backing does not take it is not an error of this call: ``file.errors`` has it, once for each
        open file.

        :raises OSError: of the media, or of the backing's own sync.
        """
        await self.cache.blocks.persist()
        self.cache.health.check()  # after a failed transaction nobody knows what a crash would find
        await self.sync_inode(file)

    async def write_out(self, file: CachedFile) -> None:
        """Write back what is dirty of the file: something is to come that a write to the backing would undo.

        :raises OSError: of the backing.
        """
        await self.writeback.write_out(file)

    async def sync_inode(self, file: CachedFile) -> None:
        """Make durable what was changed of the backing inode: its size, times, owner, mode, attributes.

        :raises OSError: from the backing; the next call tries again.
        """
        if not file.needs_sync and not file.sync_lock.locked():
            return
        async with file.sync_lock:
            if not file.needs_sync:
                return  # the sync that we waited for has covered it
            file.needs_sync = False
            try:
                if not file.backing.writable:
                    await file.backing.open(write=False)
                await file.backing.sync()
            except BaseException as error:
                file.needs_sync = True
                if isinstance(error, OSError):
                    file.errors.record(error.errno or errno.EIO)
                raise
        self.cache.files.close_if_idle(file)

    async def flush(self, progress: Callable[[int], None] | None = None) -> None:
        """Write back everything that is dirty now, and sync the backing.

        :raises OSError: of the backing, after FLUSH_TRIES rounds without success for some file.
        """
        await self._upkeep.reap()
        await self.writeback.flush(FLUSH_TRIES, progress)
        await self.cache.syncs.sync_all()
        self.cache.health.check()
        if self.cache.slots.deferred:
            await self.cache.blocks.persist_frees()

    # ---- life

    async def run(self) -> None:
        """Writeback and upkeep, until cancelled."""
        keep = self.cache.stats.faults.keep
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.writeback.run)
            nursery.start_soon(self._upkeep.run)
            nursery.start_soon(keep, "the account of space", self.space.run)
            if self._retry is not None:
                nursery.start_soon(keep, "the care for files that are set aside", self._retry)

    async def shutdown(self) -> None:
        """Leave the cache as it is, complete and marked clean. :meth:`run` must have ended."""
        await self._upkeep.shut_down_clean()

    async def is_delivered(self) -> bool:
        """Whether the backing has everything, durably: nothing is dirty, cut, unlinked or lost, and its sync was good.
        To be asked after :meth:`shutdown`."""
        cache = self.cache
        if cache.health.failed is not None or cache.dirty or cache.files.orphans:
            return False
        if any(cache.slots.owner[slot] != SET_ASIDE for slot in cache.slots.quarantined()):
            return False  # what is set aside is lost data of nobody: only the media are bad
        try:
            await cache.syncs.sync_all()
        except OSError as error:
            log.warning("the backing cannot be synced: %s", error.strerror)
            return False
        return True

    async def forget_conflict(self, file_id: int) -> None:
        """A person has chosen from the two versions of a file, or keeps both.

        :raises OSError: ENOENT if there is no such conflict; EIO.
        """
        await self.cache.records.forget_conflict(file_id)

    def close(self) -> None:
        """Let go of the pool's map and of all backing files."""
        self.cache.close()

    @property
    def dirty_bytes(self) -> int:
        """What the backing has yet to get."""
        return self.cache.slots.counts[DIRTY] << self.cache.shift

    def notes(self) -> list[str]:
        """What a person should know when the mount begins, one line each."""
        return report.notes(self.cache)

    def status(self) -> dict[str, Any]:
        """The engine's part of ``cachefsd status``."""
        return report.status(self.cache, self.space)
