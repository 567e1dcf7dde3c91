"""What can wait: burying unlinked files, fresh stamps, deleting records, checking data after a restart."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from functools import partial

import trio

from ..backing.ports import BackingStat
from ..media.ports import CatalogError, Changes, Stamp
from .cache import Cache
from .files import CachedFile

log = logging.getLogger(__name__)
SCRUB_STRIDE = 64  # slots between two looks at the loop: about 50 us of checksums
SCRUB_PAUSE_S = 0.002  # a few percent of one core
BATCH = 1000  # records per catalog transaction


class Upkeep:
    """Background care for files; nothing here is needed for a promise to hold."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def run(self) -> None:
        """Do the rounds until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._rounds)
            nursery.start_soon(self._scrub)
            if self._cache.slots.deferred:
                nursery.start_soon(self._commits)

    async def _rounds(self) -> None:
        cache = self._cache
        while True:
            cache.upkeep = trio.Event()
            with trio.move_on_after(cache.options.upkeep_s):
                await cache.upkeep.wait()
            if cache.failed is not None:
                return
            try:
                await self.bury()
                await self._fresh_stamps()
                await self._delete_records()
            except OSError as error:
                log.warning("upkeep: %s", error)
            # A round that was asked for must not be followed by another at once.
            await trio.sleep(0.05)

    async def _commits(self) -> None:
        cache = self._cache
        while cache.failed is None:
            await trio.sleep(cache.options.commit_s)
            if cache.slots.unsettled or cache.next_seq - 1 > cache.committed_seq:
                with contextlib.suppress(OSError):  # it has been logged, and was the last one
                    await cache.commit()

    # ---- unlinked files

    async def bury(self) -> None:
        """Drop the slots of files without names and users, after the backing's unlinks are durable.

        :raises OSError: from the sync; everything is kept.
        """
        cache = self._cache
        dead = list(cache.graveyard)
        if not dead:
            return
        await cache.sync_all()
        for file in dead:
            async with file.lock:
                if file not in cache.graveyard:
                    continue  # another call has buried it
                del cache.graveyard[file]
                if file.users or not file.nlink_gone:
                    continue
                cache.remove_all(file)
                file.intents.clear()
                cache.not_due(file)
            cache.forget(file)

    async def _delete_records(self) -> None:
        """Delete records that no header names any more: once the FREEs are durable."""
        cache = self._cache
        if not cache.forgotten:
            return
        # Only these: the FREEs of what is forgotten while we wait are not durable yet.
        gone, cache.forgotten = cache.forgotten, []
        try:
            await cache.settle()
            for first in range(0, len(gone), BATCH):
                await cache.commit_catalog(partial(Changes, delete=gone[first : first + BATCH]))
        except BaseException:
            cache.forgotten[:0] = gone
            raise

    # ---- stamps

    async def _fresh_stamps(self, *, dirty_too: bool = False) -> None:
        """Note how backing files look that we changed (chmod, rename), so that a crash keeps their blocks.

        Dirty files wait: their next writeback notes it anyway.
        """
        cache = self._cache
        stamped: list[CachedFile] = []
        for file in list(cache.restamp):
            if not file.recorded or file.nlink_gone:
                cache.restamp.pop(file, None)
                continue
            if file.lock.locked() or (file.dirty and not dirty_too):
                continue
            async with file.lock:
                if await self._stamp(file):
                    stamped.append(file)
            cache.rest(file)
        for first in range(0, len(stamped), BATCH):
            await self._put_records(stamped[first : first + BATCH])

    async def _stamp_dirty(self) -> None:
        """Note how the backing files of dirty data look, durably. Who changes one of them while nothing is mounted is
        found out by the next start then, also after a power cut."""
        cache = self._cache
        owed = [file for file in cache.due if file.recorded and not file.nlink_gone and file.held is None]
        owed = [file for file in owed if file.touched or file.intents or file in cache.restamp or not file.synced]
        if not owed:
            return
        try:
            await cache.sync_all()
        except OSError as error:
            log.warning("changes of dirty files behind the mount may go unnoticed: %s", error.strerror)
            return
        stamped = []
        for file in owed:
            async with file.lock:
                as_stamped = not (file.touched or file.intents or file in cache.restamp)
                if as_stamped or await self._stamp(file):
                    file.synced = True
                    stamped.append(file)
            cache.rest(file)
        for first in range(0, len(stamped), BATCH):
            await self._put_records(stamped[first : first + BATCH])

    async def _put_records(self, files: Sequence[CachedFile]) -> None:
        cache = self._cache
        # What has been forgotten meanwhile must not get a record again.
        await cache.commit_catalog(lambda: Changes(put=[cache.record_of(file) for file in files if file.recorded]))

    async def _stamp(self, file: CachedFile) -> bool:
        cache = self._cache
        try:
            if not file.backing.writable:
                await file.backing.open(write=False)
            touches = file.touches
            cache.note_stamp(file, await file.backing.stat(), touches=touches)
        except OSError:
            cache.restamp.pop(file, None)  # its clean blocks will not outlive a crash, no more
            return False
        return True

    # ---- after a restart

    def settle_recovered(self, file: CachedFile, stat: BackingStat) -> None:
        """Complete a recovered file now that its backing file is known: sizes, times, clean blocks.

        Clean blocks are kept only when the backing file is exactly as we left it (H42).
        """
        cache = self._cache
        file.settled = True
        seen = Stamp(stat.size, stat.mtime_ns, stat.ctime_ns)
        changed = file.stamp != seen
        if file.touched or file.stamp is None or file.stamp[:2] != seen[:2]:
            file.ready, file.outdated = False, True  # else it would be taken for a stranger's change after a crash
        if changed:
            cache.remove_all(file, only_clean=True)
        file.backing_size = stat.size
        file.size = max(file.size, stat.size)  # it was that of the last block that the backing has not got
        if file.dirty:
            # mtime and ctime hold what the newest headers say
            file.ctime_ns = max(file.mtime_ns, stat.ctime_ns)
        else:
            file.mtime_ns = stat.mtime_ns
            file.ctime_ns = stat.ctime_ns if changed else file.ctime_ns
        cache.note_stamp(file, stat, touches=file.touches)

    async def _scrub(self) -> None:
        """Check once, slowly, the data that was recovered; what is read meanwhile is checked first."""
        cache = self._cache
        slots = cache.slots
        for start in range(0, cache.pool.slots, SCRUB_STRIDE):
            unverified = slots.unverified(start, start + SCRUB_STRIDE)
            for slot in unverified:
                file = cache.files.get(slots.owner[slot])
                if file is not None and not slots.pins[slot]:
                    with contextlib.suppress(OSError):  # a loss has been logged and counted
                        cache.verify(file, slots.block[slot], slot)
            if unverified:
                await trio.sleep(SCRUB_PAUSE_S)

    # ---- the end

    async def leave(self) -> None:
        """Complete the catalog and mark the pool clean, last of all (O8)."""
        cache = self._cache
        if cache.failed is not None:
            return
        try:
            await cache.settle()
            await self._stamp_dirty()
            await self._fresh_stamps(dirty_too=True)
            await self._delete_records()
            await cache.commit_catalog(lambda: Changes(settings={"policy": cache.slots.policy.dump()}))
            cache.pool.mark_clean(cache.next_seq)
        except (OSError, CatalogError) as error:
            log.error("the cache is not marked clean; the next start will recover it: %s", error)
