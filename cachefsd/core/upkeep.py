"""What can wait: orphans, records and memory of files that nobody needs, stamps; and the end of the cache."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial

import trio

from ..media.ports import CatalogError, Changes
from .cache import Cache
from .files import CachedFile
from .policy import settings_of
from .records import BATCH
from .scrub import Scrub
from .stamps import Stamps

log = logging.getLogger(__name__)
DORMANT_AT_ONCE = 64  # files that become dormant between two looks at the loop: 1 to 2 ms


class Upkeep:
    """Background care for files; nothing here is needed for a promise to hold."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self._stamps = Stamps(cache)

    async def run(self) -> None:
        """Do the rounds until cancelled."""
        async with trio.open_nursery() as nursery:
            keep = self._cache.stats.faults.keep
            nursery.start_soon(keep, "upkeep", self._rounds)
            nursery.start_soon(keep, "the check of recovered data", Scrub(self._cache).run)
            if self._cache.slots.deferred:
                nursery.start_soon(keep, "a commit of the pool", self._persist_periodically)

    async def _rounds(self) -> None:
        cache = self._cache
        while True:
            with trio.move_on_after(cache.options.upkeep_s):
                await cache.upkeep.wait()
            if cache.health.failed is not None:
                return
            # Each of them on its own: one that fails again and again holds the others up no more.
            for task in (self.reap, self._stamps.renew, self._delete_records, self._make_dormant):
                try:
                    await task()
                except OSError as error:
                    log.warning("upkeep: %s", error)
                except Exception as error:
                    cache.stats.faults.note("upkeep", error)
            # A round that was asked for must not be followed by another at once.
            await trio.sleep(0.05)

    async def _persist_periodically(self) -> None:
        cache = self._cache
        while cache.health.failed is None:
            await trio.sleep(cache.options.commit_s)
            if cache.slots.unpersisted or cache.blocks.next_seq - 1 > cache.blocks.persisted_seq:
                with contextlib.suppress(OSError):  # it has been logged, and was the last one
                    await cache.blocks.persist()

    # ---- unlinked files

    async def reap(self) -> None:
        """Drop the slots of files without names and users, after the backing's unlinks are durable.

        :raises OSError: from the sync; everything is kept.
        """
        cache = self._cache
        dead = list(cache.files.orphans)
        if not dead:
            return
        await cache.syncs.sync_all()
        for file in dead:
            async with file.lock:
                if file not in cache.files.orphans:
                    continue  # another call has reaped it
                if file.ref_count or not file.unlinked:
                    cache.files.not_orphaned(file)
                    continue
                # It is durably gone, and its tombstone says so: this is gone through with.
                for _ in cache.blocks.remove_pieces(file):
                    await trio.lowlevel.checkpoint()
                file.intents.clear()
                cache.dirty.dequeue_if_clean(file)
                cache.files.not_orphaned(file)
            cache.files.forget(file)

    async def _delete_records(self) -> None:
        """Delete records that no header names any more: once the FREEs are durable."""
        cache = self._cache
        forgotten = cache.files.take_forgotten()
        if not forgotten:
            return
        # Only these: the FREEs of what is forgotten while we wait are not durable yet.
        gone, files, dormant = forgotten
        try:
            await cache.blocks.persist_frees()
            for first in range(0, len(gone), BATCH):
                await cache.records.transact(partial(Changes, delete=gone[first : first + BATCH]))
                await trio.lowlevel.checkpoint()
            for first in range(0, max(len(files), len(dormant)), BATCH):
                await self._leave(files[first : first + BATCH], dormant[first : first + BATCH])
        except BaseException:
            cache.files.put_back(forgotten)
            raise

    async def _leave(self, files: Sequence[CachedFile], dormant: Sequence[int]) -> None:
        """Forget files, and delete their records before there can be others for their handles."""
        cache = self._cache
        gone: list[int] = []

        def changes() -> Changes:
            gone.extend(cache.files.leave(files, dormant))
            return Changes(delete=gone)

        try:
            await cache.records.transact(changes)
        except BaseException:
            cache.files.forget_ids(gone)  # they have left memory, and nothing else remembers their records
            raise

    # ---- files that nobody uses

    async def _make_dormant(self) -> None:
        """Let files become dormant that nobody uses any more. Their stamps have been put into their records before.

        Those that may not yet are looked at again when what keeps them awake has ended (:meth:`FileTable.forget`).
        """
        files = self._cache.files
        unused = files.take_unused()
        for first in range(0, len(unused), DORMANT_AT_ONCE):
            files.make_dormant(unused[first : first + DORMANT_AT_ONCE])
            await trio.lowlevel.checkpoint()

    # ---- the end

    async def shut_down_clean(self) -> None:
        """Complete the catalog and mark the pool clean, last of all (O8)."""
        cache = self._cache
        if cache.health.failed is not None:
            return
        try:
            await cache.blocks.persist_frees()
            await self._stamps.note_dirty()
            await self._stamps.renew(dirty_too=True)
            await self._delete_records()
            for piece, name in enumerate(settings_of(cache.pool.slots)):
                state = cache.slots.policy.dump(piece)
                await cache.records.transact(partial(Changes, settings={name: state}))
                await trio.lowlevel.checkpoint()
            cache.pool.mark_clean(cache.blocks.next_seq)
        except Exception as error:
            if not isinstance(error, OSError | CatalogError):
                cache.stats.faults.note("the end of the cache", error)
            log.error("the cache is not marked clean; the next start will recover it: %s", error)
