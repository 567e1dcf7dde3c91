"""Bringing files up to date that something was owed to when the cache was last used.

Each is found by its handle, compared with what the catalog says of it, and its truncates are finished. One for which
the backing fails is set aside: nobody may use it, the others are served, and it is tried again from time to time. A
crash may come anywhere here; the next start does the same again.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from contextlib import suppress

import trio

from ..backing.ports import BackingStat, LostFile, Place
from ..media.ports import Changes, FileRecord, SlotState
from .cache import Cache
from .conflicts import Conflict, copy_name, same_file, when
from .files import CachedFile, Hints, Record
from .records import BATCH
from .settle import settle
from .slots import CLEAN

log = logging.getLogger(__name__)
FILES_IN_PARALLEL = 16
LOST_AND_FOUND = b"lost+found.cachefsd"
ConflictOf = Callable[[bytes], Conflict]
"""What is noted of a conflict whose copy is at a path."""


class Resolver:
    """Brings up to date the files that something is owed to. The others are looked at when they are first used."""

    def __init__(self, cache: Cache, records: dict[int, FileRecord], *, page_cache_kept: bool, clean: bool) -> None:
        """``records``: those of all files that something may be owed to, by file id.

        ``page_cache_kept``: what was written to the backing is there, synced or not, and so is every name.
        ``clean``: the cache was left in order, after the last change of ours.
        """
        self._cache = cache
        self._records = records
        self._kept = page_cache_kept
        self._clean = clean

    async def run(self) -> None:
        """Resolve all files with dirty or lost blocks, intents or a tombstone; those that fail are set aside.

        :raises OSError: the cache has failed.
        """
        cache = self._cache
        lost = {cache.slots.owner[slot] for slot in cache.slots.quarantined()}
        files = cache.files.by_id.values()
        wanted = [f for f in files if f.dirty or f.intents or f.tombstone or f.file_id in lost]
        limit = trio.CapacityLimiter(FILES_IN_PARALLEL)

        async def one(file: CachedFile) -> None:
            async with limit:
                await self._resolve_or_hold(file)

        async with trio.open_nursery() as nursery:
            for file in wanted:
                nursery.start_soon(one, file)
        cache.health.check()
        await self._note([file for file in wanted if file.record is Record.OUTDATED])
        if not self._kept:
            # Nobody has looked at these since the power cut: the next start must not trust their stamps.
            doubted = [file for file in cache.files.held if file.recorded and not file.synced]
            for file in doubted:
                file.stamp = None
            await self._note(doubted)

    async def retry(self) -> None:
        """Try the files that were set aside again, as they come due, until cancelled."""
        cache = self._cache
        while cache.files.held and cache.health.failed is None:
            await trio.sleep(cache.options.retry_min_s)
            for file in [file for file in cache.files.held if file.retry_at <= trio.current_time()]:
                if file in cache.files.held:
                    async with file.lock:
                        with suppress(OSError):  # the cache has failed, and says so
                            await self._resolve_or_hold(file, note=True)
                    cache.files.close_if_idle(file)

    async def _resolve_or_hold(self, file: CachedFile, *, note: bool = False) -> None:
        """Bring a file up to date, or set it aside with the error that keeps us from it.

        ``note``: what its backing file looks like then is noted at once. :meth:`run` does it for all files together.
        """
        cache, options = self._cache, self._cache.options
        try:
            try:
                await self._resolve(file)
            except OSError:
                raise
            except Exception as error:  # a bug, but the trouble of this file only
                raise cache.stats.faults.note(f"the recovery of {file.label}", error) from None
        except OSError as error:
            pause = options.retry_pause_s(file.failures)
            file.retry_at = trio.current_time() + pause
            cache.files.hold(file, error)
        else:
            if cache.files.let_go(file):
                cache.dirty.look_at(file)  # writeback has passed it over
            if file.record is Record.OUTDATED and note:
                await self._note([file])

    async def _note(self, files: list[CachedFile]) -> None:
        """Note durably how backing files look that we, or a power cut, have changed since their records."""
        for first in range(0, len(files), BATCH):
            part = files[first : first + BATCH]
            await self._cache.records.before_stamps(part)
            await self._cache.records.renew(part)

    async def _resolve(self, file: CachedFile) -> None:
        """Find the backing file, decide whose version of it counts, and finish what was begun.

        A crash may have come between any two of our own changes, and a power cut may have taken those that were not
        synced. What can be neither of these was done by somebody else, a *stranger*.
        """
        cache = self._cache
        stat = await self._open(file)
        if file.tombstone and (stat is None or stat.nlink == 0):
            self._drop_unlinked(file)
            return
        if stat is None:
            # A file without a stamp and without a conflict is one that we were about to create.
            begun = file.stamp is None and file.file_id not in cache.records.conflicts
            if not begun and self._was_there(file):
                stat = await self._make_copy(file, "removed")
            else:
                stat = await self._recreate(file)
        elif self._was_edited(file, stat):
            if file.dirty:
                stat = await self._make_copy(file, "changed")
            else:
                await self._forgo_truncates(file)
        if file.tombstone:  # the unlink has not happened, and nobody was told that it had
            file.keep_name()
            await cache.records.record(file)
        if file.intents:
            stat = await self._redo_truncates(file)
        settle(cache, file, stat)
        cache.files.close_if_idle(file)

    async def _open(self, file: CachedFile) -> BackingStat | None:
        """The backing file, opened; None when it is no more."""
        try:
            await file.backing.open(write=bool(file.intents))
            return await file.backing.stat()
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
            return None

    def _drop_unlinked(self, file: CachedFile) -> None:
        """The last name is gone, and its user was told so. Its data goes, too."""
        cache = self._cache
        cache.blocks.remove_all(file)
        file.intents.clear()
        cache.dirty.dequeue_if_clean(file)
        cache.files.close_if_idle(file)

    # ---- strangers

    def _was_there(self, file: CachedFile) -> bool:
        """Whether a file that is gone was removed by a stranger, as no power cut can have taken it."""
        return self._is_known(file) or file.file_id in self._cache.records.conflicts

    def _was_edited(self, file: CachedFile, stat: BackingStat) -> bool:
        """Whether somebody else has changed the backing file since the record was made."""
        if not (file.dirty or file.intents) or file.stamp is None or file.touched or not self._is_known(file):
            return False
        # An orderly end has stamped the file after its last truncate.
        stamped = self._clean and file.synced and bool(file.intents) and file.stamp.size == file.intents[-1].size
        if not stamped and any(stat.size == intent.size for intent in file.intents):
            return False  # a truncate of ours
        return not same_file(file.stamp.size, file.stamp.mtime_ns, stat.size, stat.mtime_ns)

    def _is_known(self, file: CachedFile) -> bool:
        """Whether the backing has the file as its stamp says, unless a stranger has changed it."""
        return file.synced or self._kept

    async def _make_copy(self, file: CachedFile, why: str) -> BackingStat:
        """Make a copy in the backing for the cache's version of a file that a stranger has changed or removed.

        Blocks that the cache does not have come from the stranger's file. ``why`` is what the stranger has done.
        """
        cache = self._cache
        record, earlier = self._records[file.file_id], cache.records.conflicts.get(file.file_id)
        size = self._keep_as_only_copy(file)
        if earlier is not None:  # a crash has taken an earlier copy before its name was durable
            handle, path, size = bytes.fromhex(earlier.handle), earlier.path, max(size, earlier.size)
            why = earlier.why
        else:
            handle, path = file.handle, _shown(record.path or record.name)
            size = max(size, file.stamp.size if file.stamp is not None else 0)
        now = cache.now_ns()
        name = copy_name(path.encode("utf-8", "surrogateescape").rpartition(b"/")[2] or b"file-%d" % file.file_id, now)
        complete = file.table.cached << cache.shift >= size
        lost = LostFile(
            *(record.parent_handle, name, name, record.mode, record.uid, record.gid),
            numbered=True,
            size=size,
            copy_of=b"" if complete else handle,
            # What the cache's version has no blocks of behind that is a hole, whatever a stranger has appended.
            copy_size=min(size, file.stamp.size) if file.stamp is not None and earlier is None else size,
            like=handle,
        )

        def conflict(copy: bytes) -> Conflict:
            return Conflict(file.file_id, path, _shown(copy), when(now), why, handle.hex(), size)

        stat = await self._make_file(file, lost, conflict)
        log.warning("%s was %s behind the mount: the cache's version is %s", path, why, file.label)
        return stat

    # ---- new files

    async def _recreate(self, file: CachedFile) -> BackingStat:
        """The backing has lost the file, but nobody unlinked it: create it again for its data (H40)."""
        record = self._records[file.file_id]
        log.warning("%s is not in the backing any more: created again", file.label)
        self._keep_as_only_copy(file)
        fallback = b"file-%d" % file.file_id
        name = record.name or fallback
        lost = LostFile(record.parent_handle, name, fallback, record.mode, record.uid, record.gid)
        return await self._make_file(file, lost)

    def _keep_as_only_copy(self, file: CachedFile) -> int:
        """Make all cached blocks of a file dirty, as they are the only copy; how long the file is by them."""
        cache = self._cache
        # They become dirty durably: recovery would drop a clean block, as the new record has no stamp.
        for blocks, slots in file.table.walk():
            clean = slots[cache.slots.in_state(slots, CLEAN)]
            cache.slots.change(clean, SlotState.DIRTY)
            file.dirty += len(clean)
            length = int(cache.pool.scan(int(slots[-1]), 1).length[0])
            file.size = max(file.size, (int(blocks[-1]) << cache.shift) + length)
        if file.dirty and file not in cache.dirty:
            cache.dirty.enqueue(file)
        return file.size

    async def _make_file(self, file: CachedFile, lost: LostFile, conflict: ConflictOf | None = None) -> BackingStat:
        """Have the backing make a new file for the data of one that it has lost, or that is a stranger's now.

        ``conflict``: it is a stranger's, and this is noted of it in the same transaction as the new handle.
        """
        cache = self._cache
        record = self._records[file.file_id]
        await cache.blocks.persist()

        async def note(handle: bytes, place: Place) -> None:
            """Called before the new file has its name: after a crash the record says which file it is."""
            before = file.handle, file.stamp, file.synced, file.touched, file.hints
            cache.files.change_handle(file, handle)
            file.stamp, file.synced, file.touched, file.unnamed_since = None, False, False, cache.syncs.begun
            directory = LOST_AND_FOUND if place.aside else record.path.rpartition(b"/")[0]
            path = b"/".join(filter(None, (directory, place.name)))
            entries: dict[str, bytes | None] = {}
            if conflict is not None:
                hints = Hints(record.parent_handle, place.name, path, record.mode, record.uid, record.gid)
                file.hints = lambda: hints
                entry = conflict(path)
                entries[entry.key] = entry.encode()
            try:
                await cache.records.transact(lambda: Changes(put=[cache.records.record_of(file)], settings=entries))
            except BaseException:
                # The catalog still has the old handle, and the next try has to begin with that.
                cache.files.change_handle(file, before[0])
                _, file.stamp, file.synced, file.touched, file.hints = before
                raise
            if conflict is not None:
                cache.records.note_conflict(entry)

        await cache.backing.recreate(lost, note)
        self._records[file.file_id] = cache.records.record_of(file)
        await file.backing.open(write=True)
        return await file.backing.stat()

    # ---- truncates

    async def _redo_truncates(self, file: CachedFile) -> BackingStat:
        """Repeat the truncates in the backing, in their order, and zero in cached blocks what they have cut."""
        cache = self._cache
        for block in {intent.size >> cache.shift for intent in file.intents if intent.size & cache.mask}:
            self._zero_tail(file, block)
        await cache.records.announce([file])
        for intent in file.intents:
            await file.backing.truncate(intent.size)
        await file.backing.set_mtime(file.mtime_ns)
        await file.backing.sync()
        if file.unnamed_since >= cache.syncs.done:  # a file that is lost with its name is as long as its last block
            await cache.syncs.sync_all()
        await cache.blocks.persist_frees()
        await self._end_intents(file)
        return await file.backing.stat()

    async def _forgo_truncates(self, file: CachedFile) -> None:
        """Leave a stranger's version as it is: it is newer than our truncates, and there is no data to write."""
        cache = self._cache
        log.warning("%s was changed behind the mount, after a truncate: it stays as it is", file.label)
        await cache.blocks.persist_frees()
        await self._end_intents(file)

    async def _end_intents(self, file: CachedFile) -> None:
        cache, last = self._cache, file.intents[-1]
        file.attr_seq = last.seq  # from now on the record says the mtime, where the intent did
        drop = [(file.file_id, last.seq)]
        await cache.records.transact(lambda: Changes(put=[cache.records.record_of(file)], drop_intents=drop))
        file.intents.clear()
        cache.dirty.dequeue_if_clean(file)

    def _zero_tail(self, file: CachedFile, block: int) -> None:
        """If the version of ``block`` is from before a cut within it, publish a new one that is cut."""
        cache, size = self._cache, self._cache.block_size
        slot = file.table.get(block)
        if slot < 0:
            return
        header = cache.pool.scan(slot, 1)
        seq, start = int(header.seq[0]), block * size
        rest = min((intent.size for intent in file.intents if intent.seq > seq), default=start + size) - start
        if int(header.length[0]) <= rest:
            return
        if cache.slots.state[slot] == CLEAN:
            cache.blocks.remove(file, block, slot)
            return
        while (taken := cache.slots.take(1)) is None and cache.slots.searching:
            pass
        if taken is None:
            raise OSError(errno.ENOSPC, "no free slot to finish a truncate with")
        if _verified(cache, file, slot):
            image = bytearray(size)
            image[:rest] = cache.data[slot * size : slot * size + rest]
            cache.blocks.commit(file, block, [image], taken, start + rest, file.mtime_ns)
        else:
            cache.integrity.still_lost(file, block, taken[0], start + rest, file.mtime_ns)
        if file.size <= start + size:  # it was the last block that the cache has the only copy of
            file.size = start + rest


def _verified(cache: Cache, file: CachedFile, slot: int) -> bool:
    try:
        return cache.integrity.verify(file, cache.slots.block[slot], slot)
    except OSError:
        return False


def _shown(path: bytes) -> str:
    return path.decode("utf-8", "surrogateescape")
