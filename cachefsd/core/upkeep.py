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
from .policy import PIECE
from .slots import CLEAN, DIRTY

log = logging.getLogger(__name__)
SCRUB_STRIDE = 64  # slots between two looks at the loop: about 50 us of checksums
SEARCH_STRIDE = 1 << 16  # slots searched at a time for such as nobody has checked: 0.1 ms
SCRUB_PAUSE_S = 0.002  # a few percent of one core
BATCH = 1000  # records per catalog transaction
SLEEPERS = 64  # files that become dormant between two looks at the loop: 1 to 2 ms


def policy_settings(slots: int) -> list[str]:
    """The settings of the catalog that hold the state of the replacement policy, piece by piece."""
    return [f"policy {piece}" for piece in range(-(-slots // PIECE))]


class Upkeep:
    """Background care for files; nothing here is needed for a promise to hold."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def run(self) -> None:
        """Do the rounds until cancelled."""
        async with trio.open_nursery() as nursery:
            keep = self._cache.stats.faults.keep
            nursery.start_soon(keep, "upkeep", self._rounds)
            nursery.start_soon(keep, "the check of recovered data", self._scrub)
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
            for task in (self.reap, self._fresh_stamps, self._delete_records, self._to_sleep):
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
                    continue  # another call has buried it
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

    # ---- stamps

    async def _fresh_stamps(self, *, dirty_too: bool = False) -> None:
        """Note how backing files look that we changed (chmod, rename), so that a crash keeps their blocks.

        Dirty files wait: their next writeback notes it anyway.
        """
        cache = self._cache
        stamped: list[CachedFile] = []
        for number, file in enumerate(list(cache.files.unstamped), 1):
            if number % BATCH == 0:
                await trio.lowlevel.checkpoint()
            if not file.recorded or file.unlinked:
                cache.files.stamped(file)
                continue
            if file.lock.locked() or (file.dirty and not dirty_too):
                continue
            async with file.lock:
                if await self._stamp(file):
                    stamped.append(file)
            cache.files.close_if_idle(file)
        if stamped:
            # Clean blocks that the new stamp would keep after a crash must be gone before it is there.
            await cache.blocks.persist()
        for first in range(0, len(stamped), BATCH):
            batch = stamped[first : first + BATCH]
            try:
                await cache.records.renew(batch)
            except OSError:
                raise
            except Exception:
                for file in batch:  # find the one that no record can be made of
                    try:
                        await cache.records.renew([file])
                    except Exception as error:
                        cache.stats.faults.note(f"the record of {file.label}", error)
            await trio.lowlevel.checkpoint()

    async def _stamp_dirty(self) -> None:
        """Note how the backing files of dirty data look, durably. Who changes one of them while nothing is mounted is
        found out by the next start then, also after a power cut."""
        cache = self._cache
        owed = [file for file in cache.dirty if file.recorded and not file.unlinked and file.held is None]
        owed = [
            file for file in owed if file.touched or file.intents or file in cache.files.unstamped or not file.synced
        ]
        if not owed:
            return
        try:
            await cache.syncs.sync_all()
        except OSError as error:
            log.warning("changes of dirty files behind the mount may go unnoticed: %s", error.strerror)
            return
        stamped = []
        for file in owed:
            async with file.lock:
                as_stamped = not (file.touched or file.intents or file in cache.files.unstamped)
                if as_stamped or await self._stamp(file):
                    file.synced = not file.doubtful and file.error is None
                    stamped.append(file)
            cache.files.close_if_idle(file)
        for first in range(0, len(stamped), BATCH):
            await cache.records.renew(stamped[first : first + BATCH])

    async def _stamp(self, file: CachedFile) -> bool:
        cache = self._cache
        try:
            if not file.backing.writable:
                await file.backing.open(write=False)
            touches = file.touches
            cache.records.note_stamp(file, await file.backing.stat(), touches=touches)
        except OSError:
            cache.files.stamped(file)  # its clean blocks will not outlive a crash, no more
            return False
        except Exception as error:
            cache.stats.faults.note(f"the stamp of {file.label}", error)
            cache.files.stamped(file)
            return False
        return True

    # ---- files that nobody uses

    async def _to_sleep(self) -> None:
        """Let files become dormant that nobody uses any more. Their stamps have been put into their records before.

        Those that may not yet are looked at again when what keeps them awake has ended (:meth:`Cache.rest`).
        """
        cache = self._cache
        drowsy = cache.files.take_drowsy()
        for first in range(0, len(drowsy), SLEEPERS):
            cache.files.sleep(drowsy[first : first + SLEEPERS])
            await trio.lowlevel.checkpoint()

    # ---- after a restart

    def settle(self, file: CachedFile, stat: BackingStat) -> None:
        """Complete a recovered file now that its backing file is known: sizes, times, clean blocks.

        Clean blocks are kept only when the backing file is exactly as we left it (H42).
        """
        cache = self._cache
        file.seen()
        seen = Stamp(stat.size, stat.mtime_ns, stat.ctime_ns)
        changed = file.stamp != seen
        file.doubtful |= file.touched
        if file.touched or file.stamp is None or file.stamp[:2] != seen[:2]:
            file.outdate_record()  # else it would be taken for a stranger's change after a crash
        if changed:
            cache.blocks.remove_all(file, only_clean=True)
        file.backing_size = stat.size
        file.size = max(file.size, stat.size)  # it was that of the last block that the backing has not got
        if file.dirty:
            # mtime and ctime hold what the newest headers say
            file.ctime_ns = max(file.mtime_ns, stat.ctime_ns)
        else:
            file.mtime_ns = stat.mtime_ns
            file.ctime_ns = stat.ctime_ns if changed else file.ctime_ns
        cache.records.note_stamp(file, stat, touches=file.touches)
        if changed:
            cache.files.unstamped[file] = None  # the record would still have the old one when it wakes again

    async def _scrub(self) -> None:
        """Check once, slowly, the data that was recovered; what is read meanwhile is checked first."""
        cache = self._cache
        slots = cache.slots
        for start in range(0, cache.pool.slots, SEARCH_STRIDE):
            unverified = slots.unverified(start, start + SEARCH_STRIDE)
            for first in range(0, len(unverified), SCRUB_STRIDE):
                for slot in unverified[first : first + SCRUB_STRIDE]:
                    # Somebody may have used it while we slept.
                    if not (slots.verified[slot] or slots.pins[slot]) and slots.state[slot] in (CLEAN, DIRTY):
                        try:
                            self._check(slot)
                        except OSError:
                            pass  # a loss has been logged and counted
                        except Exception as error:
                            cache.stats.faults.note("the check of recovered data", error)
                await trio.sleep(SCRUB_PAUSE_S)
            await trio.lowlevel.checkpoint()

    def _check(self, slot: int) -> None:
        cache = self._cache
        owner = cache.slots.owner[slot]
        file = cache.files.by_id.get(owner)
        if file is None and not cache.integrity.matches(slot):
            file = cache.files.find_id(owner)
        if file is not None:
            cache.integrity.verify(file, cache.slots.block[slot], slot)

    # ---- the end

    async def shut_down_clean(self) -> None:
        """Complete the catalog and mark the pool clean, last of all (O8)."""
        cache = self._cache
        if cache.health.failed is not None:
            return
        try:
            await cache.blocks.persist_frees()
            await self._stamp_dirty()
            await self._fresh_stamps(dirty_too=True)
            await self._delete_records()
            for piece, name in enumerate(policy_settings(cache.pool.slots)):
                state = cache.slots.policy.dump(piece)
                await cache.records.transact(partial(Changes, settings={name: state}))
                await trio.lowlevel.checkpoint()
            cache.pool.mark_clean(cache.blocks.next_seq)
        except Exception as error:
            if not isinstance(error, OSError | CatalogError):
                cache.stats.faults.note("the end of the cache", error)
            log.error("the cache is not marked clean; the next start will recover it: %s", error)
