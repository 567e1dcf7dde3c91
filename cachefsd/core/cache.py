"""The state that all operations share, and the steps they are made of. The commit protocol is here.

Commit protocol (docs/design.md §6), as :meth:`Cache.commit_blocks` runs it for one request, and
:meth:`Cache.commit_block` for a request of one whole block:

1. take slots for the whole request, from the fenced-free list;
2. build each block's image and checksum it;
3. copy the images to the slots and persist them: **fence A**;
4. store the headers and persist them: **fence B**;
5. publish in memory, retire the predecessors; their slots come back after a later fence, which the
   next operation's fence A gives for free;
6. the caller acknowledges.

All of it runs between two awaits, in one thread: that is the critical section (docs/concurrency.md).
"""

from __future__ import annotations

import errno
import logging
from array import array
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from typing import Protocol, TypeVar

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..backing.ports import Backing, BackingStat
from ..media.ports import (
    U64,
    Buffer,
    Catalog,
    CatalogError,
    CatalogFullError,
    Changes,
    FileRecord,
    Pool,
    SlotState,
    Stamp,
)
from ..runs import equal_runs, numbers_of, slot_index, stretches
from ..wakeup import Signal
from .conflicts import Conflict
from .dormant import Dormant
from .files import CachedFile, Hints
from .options import EngineOptions
from .policy import Clock
from .slots import CLEAN, DIRTY, NOBODY, QUARANTINED, SET_ASIDE, Slots
from .stats import Statistics

log = logging.getLogger(__name__)
REMOVED_AT_ONCE = 8  # chunks of a file's table, of 256 blocks each, that are dropped before the loop turns: 1 ms
T = TypeVar("T")


class RunBlocking(Protocol):
    """Runs a blocking function without stopping the loop (a worker thread; inline in simulation)."""

    def __call__(self, fn: Callable[..., T], /, *args: object) -> Awaitable[T]: ...


class Cache:
    """Slots, files and their catalog, with the invariants of docs/concurrency.md."""

    def __init__(
        self,
        pool: Pool,
        catalog: Catalog,
        backing: Backing,
        options: EngineOptions,
        run_blocking: RunBlocking,
        now_ns: Callable[[], int],
    ) -> None:
        self.pool = pool
        self.catalog = catalog
        self.backing = backing
        self.options = options
        self.run_blocking = run_blocking
        self._clock = now_ns
        self.now_ns = now_ns
        """What time it is, as the backing can keep it."""
        self._set_clock()
        self.block_size = pool.block_size
        self.shift = pool.block_size.bit_length() - 1
        self.mask = pool.block_size - 1
        self.stats = Statistics()
        self.slots = Slots(pool, Clock(pool.slots), self._evicted, self._set_aside)
        self.data = pool.view(0, pool.slots)
        self.files: dict[int, CachedFile] = {}
        """by file id: every file that has a record and is not dormant"""
        self.by_handle: dict[bytes, CachedFile] = {}
        self.dormant = Dormant(catalog, backing, self.slots)
        self.drowsy: dict[CachedFile, None] = {}
        """Files without users that may become dormant: upkeep looks."""
        self.next_seq = 1
        self.next_file_id = 1
        self.due: dict[CachedFile, None] = {}
        """Files with dirty blocks or intents."""
        self.queue: OrderedDict[CachedFile, None] = OrderedDict()
        """Those of them that have yet to be written back, oldest ``due_since`` first; writeback takes them out."""
        self.unnamed: dict[CachedFile, None] = {}
        """Those that it has taken out and that have no name: writeback is only wanted when slots are needed."""
        self.work = Signal()
        """Set when writeback should look again."""
        self.room = Signal()
        """Set when slots may have become free or evictable."""
        self.upkeep = Signal()
        """Set when upkeep should not wait for its next round: slots of unlinked files are wanted."""
        self.high_mark = max(1, int(options.high_watermark * pool.slots))
        self.low_mark = min(self.high_mark - 1, int(options.low_watermark * pool.slots))
        self.syncs_begun = self.syncs_done = 0
        """Syncs of the whole backing: how many have begun, and the number of the last one that was good."""
        self.written_when_synced = 0
        """How much had been written back when the last good one of them began, in bytes."""
        self.next_look = float("inf")
        """when writeback looks at ``due`` again unless ``work`` is set"""
        self.pressure = False
        """The high watermark has been passed and the low one not yet reached."""
        self.waiting = 0
        """how many wait for slots"""
        self.failed: Exception | None = None
        """Set once when the cache's own media fail: nothing is acknowledged any more."""
        self.forgotten: list[int] = []
        """file ids whose records nobody needs any more; upkeep deletes them"""
        self.leaving: dict[CachedFile, None] = {}
        """Class ``disk``: files that nobody needs any more, and whose old versions a crash may bring back, as the FREEs
        of their slots are not durable. Until they are, the files keep their ids and handles."""
        self.leaving_dormant: dict[int, None] = {}
        """The same, by file id, for those that were dormant."""
        self.restamp: dict[CachedFile, None] = {}
        """files whose backing inode we changed without noting its new stamp"""
        self.conflicts: dict[int, Conflict] = {}
        """by file id: files of which there are two versions that a person has yet to choose from"""
        self.held: dict[CachedFile, None] = {}
        """files that could not be brought up to date after the start"""
        self.orphans: dict[CachedFile, None] = {}
        """files without names and users; their slots wait for the backing's unlink to be durable"""
        self._cuts: list[slice] = []
        """The first, second, ... block of an image, as far as they were needed: to make them costs as much as half of a
        checksum."""
        self.kept_open: dict[CachedFile, None] = {}
        """Idle files with something owed to them, in the order in which they came to rest."""
        self._persist_lock = trio.Lock()
        self.persisted_seq = pool.persisted_seq
        self._catalog_lock = trio.Lock()

    def close(self) -> None:
        """Let go of the map and of all backing files; nothing is changed."""
        self.data.release()
        for file in self.by_handle.values():
            file.backing.close()

    # ---- files

    def find(self, handle: bytes) -> CachedFile | None:
        """The file with this handle, if anything of it is known; a dormant one wakes.

        :raises OSError: EIO when the catalog can't be read; the cache has failed then.
        """
        return self.by_handle.get(handle) or self._wake(self.dormant.wake, handle)

    def find_id(self, file_id: int) -> CachedFile | None:
        """:meth:`find` by file id."""
        return self.files.get(file_id) or self._wake(self.dormant.wake_id, file_id)

    def _wake(self, wake: Callable[[T], CachedFile | None], key: T) -> CachedFile | None:
        if not self.dormant:
            return None
        try:
            file = wake(key)
        except CatalogError as error:
            self.fail(error)
            raise OSError(errno.EIO, str(error)) from error
        if file is not None:
            file.ready = self.failed is None
            self.files[file.file_id] = file
            self.by_handle.setdefault(file.handle, file)  # where the backing gives handles out again
            self.drowsy[file] = None
        return file

    # ---- publishing

    def commit_blocks(
        self, file: CachedFile, first: int, images: Sequence[Buffer], taken: array[int], end: int, now: int
    ) -> None:
        """Make new versions of consecutive blocks durable and current (steps 3 to 5).

        ``images`` are whole blocks, one or more each; ``taken`` are their slots, and ``end`` is the size that the
        file then has.
        """
        pool, size, done = self.pool, self.block_size, 0
        checksums = self.checksums(images)
        for image in images:
            places, at = taken[done : done + len(image) // size], 0
            for slot, count in stretches(slot_index(places)):
                pool.write(slot, image[at : at + count * size])
                at += count * size
            done += len(places)
        self.slots.fence()  # A: data before header (O1); also what was retired before becomes reusable
        self.publish(file, first, taken, SlotState.DIRTY, checksums, now, end)
        pool.fence()  # B: header before acknowledgement (O2) and before the predecessor's FREE (O3)
        self.install_all(file, first, taken, DIRTY)

    def commit_block(self, file: CachedFile, block: int, image: Buffer, slot: int, now: int) -> bool:
        """:meth:`commit_blocks` for one block that the file fills; whether it replaces a cached one.

        The same steps without the loops, which cost as much again as the steps.
        """
        assert file.truncate_done is None  # see publish
        pool, slots = self.pool, self.slots
        checksum = xxh3_64_intdigest(image)
        pool.write(slot, image)
        slots.fence()  # A
        seq = self.next_seq
        self.next_seq = seq + 1
        pool.publish(slot, SlotState.DIRTY, seq, file.file_id, block, checksum, now, self.block_size)
        pool.fence()  # B
        return self.install(file, block, slot, DIRTY)

    def publish(
        self,
        file: CachedFile,
        first: int,
        slots: array[int],
        state: SlotState,
        checksums: Sequence[int],
        mtime_ns: int,
        end: int,
    ) -> None:
        """Store headers of new versions of consecutive blocks of a file that has ``end`` bytes, without a fence."""
        # Between a truncate's intent and its end a version would have a seq above the intent's and outlive it.
        assert file.truncate_done is None, "a version is published within a truncate"
        pool, shift, size, seq = self.pool, self.shift, self.block_size, self.next_seq
        self.next_seq += len(slots)
        if len(slots) < self.slots.vector_min_blocks:
            for index, slot in enumerate(slots):
                block = first + index
                length = min(size, end - (block << shift))
                pool.publish(slot, state, seq + index, file.file_id, block, checksums[index], mtime_ns, length)
        else:
            length = min(size, end - (first + len(slots) - 1 << shift))
            pool.publish_run(
                slot_index(slots),
                state,
                seq,
                file.file_id,
                first,
                np.array(checksums, np.uint64),
                mtime_ns,
                length,
            )

    def install_all(self, file: CachedFile, first: int, slots: array[int], state: int) -> None:
        """:meth:`install` for consecutive blocks."""
        count = len(slots)
        if count < self.slots.vector_min_blocks:
            for index, slot in enumerate(slots):
                self.install(file, first + index, slot, state)
            return
        if state == DIRTY:
            file.newest = first
            self._now_dirty(file, count)
            if file.fetches:
                for block in range(first, first + count):
                    file.fetches.pop(block, None)
        new, old = slot_index(slots), slot_index(file.table.put_run(first, slots))
        self.slots.occupy_all(new, state, file.file_id, first, count)
        if not isinstance(old, slice):
            places, replaced = numbers_of(new, np.int32), old >= 0
            self.slots.policy.admitted_all(places[~replaced])
            new, old = places[replaced], old[replaced]
            if not len(old):
                return
        self.slots.policy.touched_all(new)
        file.dirty -= self.slots.supersede_all(old, new)[DIRTY]

    def _now_dirty(self, file: CachedFile, count: int) -> None:
        """``count`` blocks more of the file are about to be dirty."""
        file.dirty += count
        if file not in self.due:
            self.mark_due(file)
        if self.slots.counts[DIRTY] + count > self.high_mark and not self.pressure:
            self.pressure = True
            self.work.set()

    def install(self, file: CachedFile, block: int, slot: int, state: int) -> bool:
        """Step 5: ``slot``, published and fenced, is now the block's place. Whether another one was."""
        slots = self.slots
        if state == DIRTY:
            file.newest = block
            self._now_dirty(file, 1)
            if file.fetches:
                file.fetches.pop(block, None)  # what is being read from the backing is old now (H26)
        old = file.table.put(block, slot)
        slots.occupy(slot, state, file.file_id, block)
        if old >= 0:
            if slots.state[old] == DIRTY:
                file.dirty -= 1
            slots.policy.touched(slot)
            slots.supersede(old, slot)
            return True
        slots.policy.admitted(slot)
        return False

    def mark_due(self, file: CachedFile) -> None:
        """Enter a file with something owed to the backing in ``due``."""
        file.due_since = trio.current_time()
        self.due[file] = None
        self.queue[file] = None
        if self.pressure or file.due_since + self.options.dirty_age_s < self.next_look:
            self.work.set()

    def not_due(self, file: CachedFile) -> None:
        """Take a file out of ``due`` once nothing is owed."""
        if not file.dirty and not file.intents:
            self.due.pop(file, None)
            self.queue.pop(file, None)
            self.unnamed.pop(file, None)

    # ---- removing

    def remove(self, file: CachedFile, block: int, slot: int) -> None:
        """Drop a cached block of a file without writing it (invalidate)."""
        file.table.remove(block)
        file.dirty -= self.slots.state[slot] == DIRTY
        self.slots.drop([slot])
        self._removed(file)

    def _removed(self, file: CachedFile) -> None:
        self.slots.fence()
        self.not_due(file)
        self.made_room()

    def remove_all(self, file: CachedFile, first: int = 0, *, only_clean: bool = False) -> None:
        """Drop the cached blocks of ``file`` from ``first`` on, or just the clean ones of them."""
        for _ in self.remove_pieces(file, first, only_clean=only_clean):
            pass

    def remove_pieces(self, file: CachedFile, first: int = 0, *, only_clean: bool = False) -> Iterator[None]:
        """:meth:`remove_all` in pieces, for who lets the loop turn between two of them. In between the accounts are
        right; that nobody minds a part of the blocks is for the caller to see to."""
        blocks: list[npt.NDArray[np.int64]] = []
        places: list[npt.NDArray[np.int32]] = []
        for looked_at, (numbers, slots) in enumerate(file.table.walk(first), 1):
            if only_clean:
                clean = self.slots.in_state(slots, CLEAN)  # neither dirty ones nor those that are lost
                numbers, slots = numbers[clean], slots[clean]
            blocks.append(numbers)
            places.append(slots)
            if looked_at % REMOVED_AT_ONCE == 0:
                self._remove_piece(file, np.concatenate(blocks), np.concatenate(places))
                blocks.clear()
                places.clear()
                yield
        if blocks:
            self._remove_piece(file, np.concatenate(blocks), np.concatenate(places))
            yield

    def _remove_piece(self, file: CachedFile, blocks: npt.NDArray[np.int64], places: npt.NDArray[np.int32]) -> None:
        if not len(blocks):
            return
        file.table.remove_all(blocks.view(np.uint64))
        file.dirty -= int(np.count_nonzero(self.slots.in_state(places, DIRTY)))
        self.slots.drop(array("i", places.tobytes()))
        self._removed(file)

    def _evicted(self, owners: U64, blocks: U64) -> None:
        """Take blocks of files out of their tables: shape (n,), n > 0."""
        order = np.lexsort((blocks, owners))
        owners, blocks = owners[order], blocks[order]
        for first, end in equal_runs(owners):
            file_id = int(owners[first])
            file = self.files.get(file_id)
            if file is None:
                if self.dormant.evicted(file_id, end - first, leaving=self.slots.deferred):
                    if self.slots.deferred:
                        self.leaving_dormant[file_id] = None
                    else:
                        self.forgotten.append(file_id)
                continue
            file.table.remove_all(blocks[first:end])
            if not file.table.cached and not file.ref_count:
                self.forget(file)

    def close_if_idle(self, file: CachedFile) -> None:
        """Close the backing file once nobody has it open and nothing is owed to it, or forget it all.

        Of those that are owed something the last ones stay open, for their writeback.
        """
        if not file.idle:
            return
        self.kept_open.pop(file, None)
        if file.dirty or file.intents:
            self._keep_open(file)
            return
        file.backing.close()
        self.forget(file)

    def _keep_open(self, file: CachedFile) -> None:
        """Keep the descriptors of an idle file that is owed something, and close those of the one that has had them
        for longest: small files come faster than a slow backing takes them."""
        self.kept_open[file] = None
        if len(self.kept_open) > self.backing.most_kept_open:
            oldest = next(iter(self.kept_open))
            del self.kept_open[oldest]
            # One that is busy comes again when it is not; the handle of one without a name may lead nowhere.
            if oldest.idle and not oldest.unlinked:
                oldest.backing.close()

    def close_idle(self) -> None:
        """Close the descriptors of idle files, where they can be opened again: somebody needs them more."""
        for file in list(self.kept_open):
            if file.idle and not file.unlinked:
                del self.kept_open[file]
                file.backing.close()

    def forget(self, file: CachedFile) -> None:
        """Let a file leave memory that has neither users nor slots nor anything owed.

        In class ``disk`` it stays until upkeep calls :meth:`leave`. A second id for its handle would know nothing of
        old versions that a crash may bring back: they would outlive a truncate, and an unlink.
        """
        if not self._unneeded(file):
            if not file.ref_count:
                self.drowsy[file] = None
            return
        if self.slots.deferred and file.file_id:
            self.leaving[file] = None
            self.kept_open.pop(file, None)
            file.backing.close()
            return
        if file.file_id:
            self.forgotten.append(file.file_id)
        self._leave_memory(file)

    def leave(self, files: Iterable[CachedFile], dormant: Iterable[int]) -> list[int]:
        """Let files leave memory whose FREEs are durable since they were forgotten; their ids. Those that somebody
        needs again stay. ``dormant`` are the ids of files that were dormant when they were forgotten."""
        gone = self.dormant.leave([file_id for file_id in dormant if file_id not in self.leaving_dormant])
        for file in files:
            # It was used meanwhile, and forgotten again, and waits for newer FREEs; or it fell asleep.
            if file in self.leaving or self.files.get(file.file_id) is not file:
                continue
            if self._unneeded(file):
                self._leave_memory(file)
                gone.append(file.file_id)
            elif not file.ref_count:
                self.leaving[file] = None  # an operation has it: the next round sees what has become of it
        return gone

    def _unneeded(self, file: CachedFile) -> bool:
        locked = file.lock.locked() or file.record_lock.locked()
        return not (file.ref_count or file.table.cached or file.dirty or file.intents or locked)

    def sleep(self, files: list[CachedFile]) -> None:
        """Make files dormant that may be, see :func:`may_sleep`."""
        for file in self.dormant.add_files(files):
            self._leave_memory(file)

    def _leave_memory(self, file: CachedFile) -> None:
        if self.by_handle.get(file.handle) is file:
            del self.by_handle[file.handle]
        self.files.pop(file.file_id, None)
        self.restamp.pop(file, None)
        self.held.pop(file, None)
        self.kept_open.pop(file, None)
        self.drowsy.pop(file, None)
        self.leaving.pop(file, None)
        file.ready = file.recorded = False
        file.backing.close()

    # ---- slots and room

    def made_room(self) -> None:
        """Wake everybody who waits for slots."""
        self.room.set()

    async def wait_for_room(self, deadline: float) -> None:
        """Wait until slots may be had. OSError when ``deadline`` (loop time) passes first."""
        if self.slots.searching:
            await trio.lowlevel.checkpoint()  # and the search goes on
            return
        if self.slots.deferred and self.slots.unpersisted:
            await self.persist()
            return
        self.pressure = True
        self.work.set()
        self.upkeep.set()
        self.waiting += 1
        try:
            with trio.move_on_at(deadline) as scope:
                await self.room.wait()
        finally:
            self.waiting -= 1
        if scope.cancelled_caught:
            raise self.full_error()

    def full_error(self) -> OSError:
        """Why a full cache does not empty: the backing's own error where it says one."""
        for file in self.due:
            if file.error is not None:
                return OSError(file.error.errno, f"cache full, writeback fails: {file.error.strerror}")
        return OSError(errno.EIO, "cache full, and writeback has not freed a slot in time")

    # ---- checksums

    def checksums(self, images: Iterable[Buffer]) -> list[int]:
        """Of each block of ``images``, which are whole blocks, one or more each."""
        size, cuts = self.block_size, self._cuts
        found: list[int] = []
        for image in images:
            count = len(image) // size
            while len(cuts) < count:
                cuts.append(slice(len(cuts) * size, (len(cuts) + 1) * size))
            found += [xxh3_64_intdigest(image[cut]) for cut in cuts[:count]]
        return found

    def verify(self, file: CachedFile, block: int, slot: int) -> bool:
        """Check a slot's data once after a start. A bad clean block is dropped (the backing has it): False.

        :raises OSError: EIO for a bad dirty block, now and until the block is written anew (P5, H11).
        """
        slots = self.slots
        if slots.verified[slot]:
            return True
        if slots.state[slot] != QUARANTINED:
            if self.matches(slot):
                return True
            if slots.state[slot] == CLEAN:
                log.warning("clean block %d of %s failed its checksum: dropped", block, self.name_of(file))
                self.remove(file, block, slot)
                return False
            self.lose(file, block, slot)
        raise OSError(errno.EIO, "the block is lost: its data was damaged in the cache")

    def matches(self, slot: int) -> bool:
        """Whether a slot's data is what was written; it is not looked at again then."""
        good = self.intact(slot)
        if good:
            self.slots.verified[slot] = 1
        return good

    def intact(self, slot: int) -> bool:
        """Whether the data of a live slot is what was written. The first look at it after a start has to be this one.

        It is read and not loaded: a load of what the media can't give ends the process. Once it has been read, its
        pages are in memory.
        """
        try:
            data = self.pool.read(slot)
        except OSError as error:
            log.error("slot %d of the pool can't be read: %s", slot, error.strerror)
            self.slots.suspect.add(slot)
            return False
        return xxh3_64_intdigest(data) == self.pool.checksum_of(slot)

    def _set_aside(self, slot: int) -> None:
        """Never use a free slot again, whose media are bad, not even after a restart: its header says so."""
        log.error("slot %d of the pool is on bad media: it is set aside and not used again", slot)
        self.pool.publish(slot, SlotState.QUARANTINED, self.next_seq, NOBODY, slot, 0, 0, self.block_size)
        self.next_seq += 1
        self.slots.occupy(slot, QUARANTINED, SET_ASIDE, slot)
        self.slots.note_lost(slot)
        self.slots.verified[slot] = 0

    def lose(self, file: CachedFile, block: int, slot: int) -> None:
        """Quarantine a dirty block whose data is not what was written, and say so.

        It reads as EIO until it is overwritten as a whole, or cut off, or the file is unlinked.
        """
        slots = self.slots
        if slots.state[slot] == DIRTY:
            file.dirty -= 1
        slots.change(slot, SlotState.QUARANTINED)
        slots.verified[slot] = 0
        slots.fence()
        self.not_due(file)
        where = f"{self.name_of(file)}: bytes {block << self.shift} to {(block + 1) << self.shift}"
        log.error("data in the cache is damaged, the block is lost: %s", where)
        file.errors.record(errno.EIO)

    def lost(self, file: CachedFile) -> list[int]:
        """The lost blocks of a file."""
        slots = self.slots
        return [slots.block[slot] for slot in slots.quarantined() if slots.owner[slot] == file.file_id]

    def still_lost(self, file: CachedFile, block: int, slot: int, size: int, now: int) -> None:
        """Publish a version, in ``slot``, of a lost block that a truncate to ``size`` has cut: it is lost as well.

        The length in the header says how long the file was; without this a restart would find the old one.
        """
        pool = self.pool
        zeros = bytes(self.block_size)
        pool.write(slot, zeros)
        self.slots.fence()
        length = size - (block << self.shift)
        checksum = xxh3_64_intdigest(zeros)
        pool.publish(slot, SlotState.QUARANTINED, self.next_seq, file.file_id, block, checksum, now, length)
        self.next_seq += 1
        pool.fence()
        self.install(file, block, slot, QUARANTINED)
        self.slots.note_lost(slot)
        self.slots.verified[slot] = 0

    def name_of(self, file: CachedFile) -> str:
        """A file's path as far as it is known, for people."""
        path = file.hints().path if file.hints else b""
        return path.decode("utf-8", "backslashreplace") if path else f"file {file.file_id}"

    # ---- durability of pool and catalog

    async def persist(self) -> None:
        """Make everything stored so far durable. Without an await but in class ``disk``."""
        if not self.slots.deferred:
            self.slots.fence()
            return
        wanted = self.next_seq - 1
        async with self._persist_lock:
            # A clean block that a crash makes dirty again would bring the mtime of its last writeback back.
            if self.persisted_seq >= wanted and not (self.slots.unpersisted or self.slots.changed_since_persist):
                return  # the commit that we waited for has covered it
            self.check_failed()
            seq, covered = self.next_seq - 1, self.slots.persist_begin()
            try:
                await self.run_blocking(self.pool.sync)
                await self.run_blocking(self.pool.mark_persisted, seq)
            except BaseException as error:  # a cancellation may come between the two
                self.slots.persist_failed(covered)
                if isinstance(error, OSError):
                    self.fail(error)
                raise
            with trio.CancelScope(shield=True):  # it is done: what it has covered must not wait for another one
                for _ in self.slots.persist_end(covered):
                    await trio.lowlevel.checkpoint()
            self.persisted_seq = seq
        self.made_room()

    async def persist_frees(self) -> None:
        """Make every FREE so far durable: before something that remembers the dead is deleted."""
        await self.persist()
        if self.slots.deferred:
            await self.persist()  # the FREEs of versions whose successors the first one has made durable

    async def transact(self, make: Callable[[], Changes], *, essential: bool = False) -> None:
        """One durable catalog transaction; off the loop where the catalog's disk is slow.

        ``make`` is called when its turn has come: a record that was made before it had to wait would overwrite
        what others have said of the file meanwhile, a tombstone for example. ``essential``: the caller can't go on
        without it, so that a full disk is like a broken one.

        :raises OSError: ENOSPC when the catalog's disk is full: nothing has changed. Else EIO; the cache then
            acknowledges nothing more (H50).
        """
        self.check_failed()
        try:
            if self.slots.deferred:
                async with self._catalog_lock:
                    await self.run_blocking(self.catalog.transact, make())
            else:
                self.catalog.transact(make())
        except CatalogFullError as error:
            if essential:
                self.fail(error)
            raise OSError(errno.ENOSPC, str(error)) from error
        except CatalogError as error:
            self.fail(error)
            raise OSError(errno.EIO, str(error)) from error

    def fail(self, error: Exception) -> None:
        """The cache's own media have failed: stop acknowledging, keep what is there."""
        if self.failed is None:
            log.error("the cache has failed, nothing more is acknowledged: %s", error)
            self.failed = error
        for file in self.files.values():
            file.ready = False

    def check_failed(self) -> None:
        """:raises OSError: EIO once the media have failed."""
        if self.failed is not None:
            raise OSError(errno.EIO, f"the cache has failed: {self.failed}")

    async def sync_all(self) -> None:
        """Make the whole backing durable, names included.

        :raises OSError: from the backing.
        """
        self.syncs_begun += 1
        number, written = self.syncs_begun, self.stats.writeback.bytes
        await self.backing.sync_all()
        self.written_when_synced = max(self.written_when_synced, written)
        self.syncs_done = max(self.syncs_done, number)

    # ---- records

    async def record(self, file: CachedFile) -> None:
        """Make the file's record durable: before the first header that names it (O6)."""
        async with file.record_lock:
            self.check_failed()
            if file.recorded and file.tombstone == file.unlinked and not file.outdated:
                file.ready = self.may_be_ready(file)
                return
            if not file.file_id:
                file.file_id = self.next_file_id
                self.next_file_id += 1
            tombstone, touched, touches = file.unlinked, False, 0
            await self.before_stamps([file])

            def changes() -> Changes:
                nonlocal touched, touches
                touched, touches = file.touched, file.touches
                return Changes(
                    put=[self.record_of(file, tombstone)], settings={"next_file_id": b"%d" % self.next_file_id}
                )

            await self.transact(changes)
            self.files[file.file_id] = file
            file.recorded = True
            file.tombstone = tombstone
            file.announced = file.announced or (touched and file.touched)
            file.outdated = touches != file.touches and not file.announced
            file.ready = self.may_be_ready(file)

    def record_of(self, file: CachedFile, unlinked: bool | None = None) -> FileRecord:
        """The record that says what is known of ``file`` now, to be committed."""
        if not file.touched:
            file.announced = False  # from now on, whenever it arrives
        hints = file.hints() if file.hints else Hints(b"", b"", b"", 0o100600, 0, 0)
        return FileRecord(
            file_id=file.file_id,
            handle=file.handle,
            parent_handle=hints.parent_handle,
            name=hints.name,
            path=hints.path,
            mode=hints.mode,
            uid=hints.uid,
            gid=hints.gid,
            stamp=file.stamp,
            attr_seq=file.attr_seq,
            mtime_ns=file.mtime_ns,
            ctime_ns=file.ctime_ns,
            unlinked=file.tombstone if unlinked is None else unlinked,
            touched=file.touched,
            synced=file.synced,
            doubtful=file.doubtful,
        )

    # ---- times

    def kept_time(self, asked_ns: int, kept_ns: int) -> int:
        """What the backing makes of the time ``asked_ns``, where a file of it has ``kept_ns`` after it was set.

        A file system that tells is asked first: somebody else may have set another time in between.
        """
        times = self.backing.times
        known = times.of(asked_ns)
        if known is not None:
            return known
        times.learn(asked_ns, kept_ns)
        self._set_clock()
        return kept_ns

    def _set_clock(self) -> None:
        """See that what is written gets times that the backing can keep."""
        granularity, clock = self.backing.times.granularity, self._clock
        if granularity <= 1:
            return

        def now_ns() -> int:
            now = clock()
            return now - now % granularity

        self.now_ns = now_ns

    # ---- what the backing files look like

    def may_be_ready(self, file: CachedFile) -> bool:
        """Whether writes of the file need not wait for anything but slots."""
        settled = file.recorded and file.tombstone == file.unlinked and not file.outdated
        return settled and file.truncate_done is None and file.held is None and self.failed is None

    async def before_stamps(self, files: Iterable[CachedFile]) -> None:
        """Class ``disk``: to be awaited before records of files are committed with new stamps. Clean blocks that such a
        stamp would keep after a crash are durably gone then."""
        if self.slots.deferred and any(file.recorded and file in self.restamp for file in files):
            await self.persist()

    async def announce(self, files: Sequence[CachedFile]) -> None:
        """Say durably that we are about to change size or mtime of these backing files: what they look like after a
        crash is then no sign of a stranger. A new stamp ends it."""
        for file in files:
            file.touched = True
        if all(file.announced or not file.recorded for file in files):
            return
        named: list[CachedFile] = []
        await self.before_stamps(files)

        def changes() -> Changes:
            named[:] = [file for file in files if file.recorded and not file.announced]
            return Changes(put=[self.record_of(file) for file in named])

        await self.transact(changes)
        for file in named:
            file.announced = file.touched

    async def touch(self, file: CachedFile) -> None:
        """To be called before size or mtime of a backing file is changed by other ways than a pass or an intent."""
        file.touches += 1
        file.touched = True
        if file.announced:
            return
        # What is clean by now may be dirty again after a power cut, until a commit.
        if (
            file.dirty
            or file.intents
            or (self.slots.deferred and (self.slots.changed_since_persist or self.slots.unpersisted))
        ):
            await self.announce([file])
        else:
            file.ready, file.outdated = False, True  # the next version waits for a record that says so

    def note_stamp(self, file: CachedFile, stat: BackingStat, *, touches: int, synced: bool = False) -> None:
        """The backing file is now as ``stat`` says, and we know all that is in it.

        ``touches``: those of the file before it was synced and looked at. ``synced``: it was synced, names included.
        """
        seen = Stamp(stat.size, stat.mtime_ns, stat.ctime_ns)
        if touches == file.touches and not file.changing:
            same = file.stamp is not None and not file.touched and file.stamp[:2] == seen[:2]
            file.synced = synced or (same and file.synced)
            file.touched = False
            file.doubtful &= not synced
        file.stamp = seen
        self.restamp.pop(file, None)

    def hold(self, file: CachedFile, error: OSError) -> None:
        """Set aside a file that cannot be brought up to date: who wants to use it gets the error."""
        if self.failed is None and (file.held is None or file.held.errno != error.errno):
            log.warning("set aside, the data stays in the cache: %s: %s", self.name_of(file), error.strerror or error)
        file.held = file.error = OSError(error.errno, error.strerror or str(error))
        file.ready = False
        file.failures += 1
        self.held[file] = None
        self.close_if_idle(file)

    def let_go(self, file: CachedFile) -> None:
        """A file that was set aside may be used."""
        if self.held.pop(file, file) is None:
            log.info("in use again: %s", self.name_of(file))
            file.held = file.error = None
            file.failures, file.retry_at = 0, 0.0
            file.ready = self.may_be_ready(file)
            if file in self.due:  # writeback has passed it over
                self.queue[file] = None
                self.work.set()
