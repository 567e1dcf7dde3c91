"""What users of a file see: read, write, truncate, times, sync, unlink. FUSE calls nothing else.

``read`` and ``write`` answer at once when the cache can (no await: the hot path); when they can't, their
``_slow`` twins bring what is missing and try again.
"""

from __future__ import annotations

import errno
import logging
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import trio

from ..backing.ports import BackingStat
from ..media.ports import Buffer, Stamp
from ..runs import slot_index, stretches
from . import report
from .attributes import Attributes
from .blocktable import CHUNK_MASK, CHUNK_SHIFT
from .cache import Cache
from .fetch import Fetcher
from .files import CUT, CachedFile, Fetch, Hints, Life
from .settle import settle
from .slots import DIRTY, SET_ASIDE
from .space import Space
from .upkeep import Upkeep
from .writeback import Writeback

log = logging.getLogger(__name__)
FLUSH_TRIES = 3  # failed rounds of a file after which a flush gives up and says why
NO_SLOTS, NO_ROOM, TOO_LARGE = -1, -2, -3


class Engine:
    """The cache as its users see it."""

    def __init__(self, cache: Cache, retry: Callable[[], Awaitable[None]] | None = None) -> None:
        """``retry`` runs beside the engine and tries the files again that were set aside."""
        self.cache = cache
        self.block_size = cache.block_size
        self._shift, self._mask = cache.shift, cache.mask
        self._fetcher = Fetcher(cache)
        self.writeback = Writeback(cache)
        self.space = Space(cache, self.writeback)
        self._upkeep = Upkeep(cache)
        self.attributes = Attributes(cache, self.space)
        self.truncate, self.set_mtime = self.attributes.truncate, self.attributes.set_mtime
        self.set_mtime_of_dirty, self.changed = self.attributes.set_mtime_of_dirty, self.attributes.changed
        self._retry = retry
        self._sync_writes = cache.slots.deferred and cache.options.sync_writes

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

    # ---- reading

    def read(self, file: CachedFile, offset: int, size: int) -> Buffer | None:
        """Bytes from ``offset`` on, fewer at the end of the file; None when the backing is needed.

        What is returned may be a view of live slots: use it before the next await.

        :raises OSError: EIO for a block whose data was lost.
        """
        end = min(offset + size, file.size)
        if end <= offset:
            return b""
        shift = self._shift
        block = offset >> shift
        if (end - 1) >> shift != block:
            data = self._assemble(file, offset, end, {}, touch=True)
            self.cache.stats.read_hits += data is not None
            return data
        chunk = file.table.chunks.get(block >> CHUNK_SHIFT)
        slot = -1 if chunk is None else chunk[block & CHUNK_MASK]
        if slot < 0:
            return bytes(end - offset) if block << shift >= file.backing_size else None
        slots = self.cache.slots
        if not slots.verified[slot] and not self.cache.integrity.verify(file, block, slot):
            return None
        slots.policy.touched(slot)
        self.cache.stats.read_hits += 1
        start = (slot << shift) + (offset & self._mask)
        return self.cache.data[start : start + end - offset]

    async def read_slow(self, file: CachedFile, offset: int, size: int) -> Buffer:
        """The same, with what is missing brought from the backing first."""
        self.cache.stats.read_misses += 1
        got: dict[int, memoryview] = {}
        promote = self.cache.health.failed is None
        while True:
            missing = self._missing(file, offset, min(offset + size, file.size), got)
            if missing:
                await self._fetcher.fetch(file, missing, got, promote=promote)
            end = min(offset + size, file.size)
            if end <= offset:
                return b""
            # What it has promoted must not count as used twice: one pass over a large file would displace all.
            data = self._assemble(file, offset, end, got, touch=False)
            if data is not None:
                return data
            # Small caches may evict what was promoted before all of it is there: from the second
            # round on read into memory of our own, which nobody takes away.
            promote = False

    def _missing(self, file: CachedFile, offset: int, end: int, got: dict[int, memoryview]) -> list[int]:
        shift = self._shift
        stop = min(end, file.backing_size)
        first = offset >> shift
        if stop <= first << shift:
            return []
        absent = file.table.absent(first, ((stop - 1) >> shift) + 1 - first)
        return [block for block in absent if block not in got] if got else absent

    def _assemble(
        self, file: CachedFile, offset: int, end: int, got: dict[int, memoryview], *, touch: bool
    ) -> Buffer | None:
        """A read of several blocks; None when one is neither cached nor in ``got`` nor a hole. ``touch``: it counts as
        a use of those that are cached."""
        data = None
        if (end - offset) >> self._shift >= self.cache.slots.vector_min_blocks and not got:
            data = self._read_hits(file, offset, end, touch)
        return self._read_blocks(file, offset, end, got, touch) if data is None else data

    def _read_hits(self, file: CachedFile, offset: int, end: int, touch: bool) -> Buffer | None:
        """:meth:`_read_blocks` for many that are all cached and verified, without a loop over them; else None."""
        cache, shift, first = self.cache, self._shift, offset >> self._shift
        places = slot_index(file.table.get_run(first, ((end - 1) >> shift) + 1 - first))
        if not (isinstance(places, slice) or places.min() >= 0) or not cache.slots.all_verified(places):
            return None
        if touch:
            cache.slots.policy.touched_all(places)
        parts: list[memoryview] = []
        start = first << shift
        for slot, count in stretches(places):
            stop, ahead = start + (count << shift), (slot << shift) - start
            parts.append(cache.data[max(offset, start) + ahead : min(end, stop) + ahead])
            start = stop
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_blocks(
        self, file: CachedFile, offset: int, end: int, got: dict[int, memoryview], touch: bool
    ) -> Buffer | None:
        """:meth:`_assemble` block by block."""
        cache, shift, size = self.cache, self._shift, self.block_size
        slots, data = cache.slots, cache.data
        parts: list[Buffer] = []
        run_start = run_end = 0  # bytes of the map that lie in one piece
        touched: list[int] = []
        for block in range(offset >> shift, ((end - 1) >> shift) + 1):
            low = max(offset, block << shift) & self._mask
            high = min(end - (block << shift), size)
            slot = file.table.get(block)
            if slot >= 0 and (slots.verified[slot] or cache.integrity.verify(file, block, slot)):
                touched.append(slot)
                start = slot << shift
                if run_end != start + low or run_end == run_start:
                    if run_end > run_start:
                        parts.append(data[run_start:run_end])
                    run_start = start + low
                run_end = start + high
                continue
            if run_end > run_start:
                parts.append(data[run_start:run_end])
                run_start = run_end = 0
            if block in got:
                parts.append(got[block][low:high])
            elif block << shift >= file.backing_size:
                parts.append(bytes(high - low))
            else:
                return None
        if touch:
            for slot in touched:
                slots.policy.touched(slot)
        if run_end > run_start:
            parts.append(data[run_start:run_end])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    # ---- writing

    def write(self, file: CachedFile, offset: int, data: bytes) -> bool:
        """Write at once, durably (class ``disk``: at the next commit); False when it has to wait.

        :raises OSError: EIO when a block that is to be merged was lost.
        """
        if not file.ready or self._sync_writes:
            return False
        if len(data) == self.block_size and not offset & self._mask:
            return self._write_block(file, offset, data)
        return self._write_blocks(file, offset, memoryview(data), {}) is None

    def _write_block(self, file: CachedFile, offset: int, data: bytes) -> bool:
        """:meth:`_write_blocks` for exactly one whole block, which is what databases and fio write: 40 % less time."""
        cache = self.cache
        end = offset + len(data)
        if end > file.size and end > file.backing.max_size:
            return False
        if end > file.allocated_to and not self.space.has_room(file, offset >> self._shift, 1):
            return False
        slot = cache.slots.take_one()
        if slot < 0:
            return False
        now = cache.now_ns()
        if cache.blocks.commit_block(file, offset >> self._shift, data, slot, now):
            cache.stats.write_hits += 1
        else:
            cache.stats.write_misses += 1
        if end > file.size:
            file.size = end
        file.mtime_ns = file.ctime_ns = now
        return True

    async def write_slow(self, file: CachedFile, offset: int, data: Buffer) -> int:
        """The same, waiting for what it needs; bytes written, at least one.

        Of what reaches beyond the largest file that the backing can hold, the part that fits is written.

        :raises OSError: the backing's error where old content had to be read; ENOSPC or EDQUOT when the backing
            has no space for it; EIO, or the error that keeps writeback from freeing slots, when the cache
            stays full for ``full_timeout_s``; EFBIG when not one byte fits.
        """
        cache = self.cache
        view = memoryview(data)
        if offset + len(view) > max(file.size, file.backing.max_size):
            view = view[: max(0, file.backing.max_size - offset)]
            if not view:
                raise _too_large()
        # A request may be larger than the cache: pieces of a quarter always fit sooner or later.
        step = max(1, cache.pool.slots // 4) << self._shift
        deadline = trio.current_time() + cache.options.full_timeout_s
        done = 0
        while done < len(view):
            at = offset + done
            piece = view[done : done + step - (at & self._mask)]
            try:
                await self._write_piece(file, at, piece, deadline)
            except OSError:
                if done:
                    break
                raise
            done += len(piece)
        if self._sync_writes:
            await cache.blocks.persist()
        return done

    async def _write_piece(self, file: CachedFile, offset: int, piece: memoryview, deadline: float) -> None:
        fills: dict[int, tuple[Fetch, memoryview]] = {}
        try:
            while True:
                if file.life is CUT:
                    await file.until_truncate_done()
                elif not file.ready:
                    await self.cache.records.record(file)
                else:
                    wanted = self._write_blocks(file, offset, piece, fills)
                    if wanted is None:
                        return
                    if wanted == NO_ROOM:
                        end = offset + len(piece) - 1 >> self._shift
                        first = offset >> self._shift
                        await self.space.find(file, first, end - first + 1, deadline)
                    elif wanted == NO_SLOTS:
                        await self.cache.room.wait(deadline)
                    elif wanted == TOO_LARGE:
                        raise _too_large()
                    else:
                        await self._fill(file, wanted, fills)
        finally:
            for block, (fetch, _) in fills.items():
                if file.fetches.get(block) is fetch:
                    del file.fetches[block]

    async def _fill(self, file: CachedFile, block: int, fills: dict[int, tuple[Fetch, memoryview]]) -> None:
        """Read the old content of a block that will be partly overwritten.

        It stays entered in ``fetches`` until the write is done, so that a change meanwhile shows.
        """
        fetch = Fetch()
        file.fetches[block] = fetch
        try:
            if not file.backing.writable:
                await file.backing.open(write=False)
            memory = await self._fetcher.read_past(file, block, 1)
        except BaseException:
            if file.fetches.get(block) is fetch:
                del file.fetches[block]
            raise
        finally:
            fetch.done.set()
        fills[block] = (fetch, memory)

    def _write_blocks(
        self,
        file: CachedFile,
        offset: int,
        data: memoryview,
        fills: dict[int, tuple[Fetch, memoryview]],
    ) -> int | None:
        """One atomic step: all blocks of ``data``, or nothing.

        None when done, NO_SLOTS, NO_ROOM (in the backing) or TOO_LARGE, else a block whose old content must be read
        first.
        """
        cache, shift, size = self.cache, self._shift, self.block_size
        end = offset + len(data)
        if end > file.size and end > file.backing.max_size:
            return TOO_LARGE
        first, last = offset >> shift, (end - 1) >> shift
        count = last - first + 1
        if end > file.allocated_to and not self.space.has_room(file, first, count):
            return NO_ROOM
        taken = cache.slots.take(count)  # first: it may evict what we would merge with
        if taken is None:
            return NO_SLOTS
        images: list[Buffer]
        try:
            if count == 1 and len(data) != size:
                images = [self._merge(file, first, offset, data, fills)]
            else:
                head, tail = -offset & self._mask, end & self._mask  # what does not fill the blocks that it is in
                middle = data[head : len(data) - tail]
                images = [middle] if len(middle) else []
                if head:
                    images.insert(0, self._merge(file, first, offset, data[:head], fills))
                if tail:
                    images.append(self._merge(file, last, last << shift, data[len(data) - tail :], fills))
        except _NeedsFill as need:
            cache.slots.give_back(taken)
            return need.block
        except OSError:
            cache.slots.give_back(taken)
            raise
        if file.table.get(first) >= 0:
            cache.stats.write_hits += 1
        else:
            cache.stats.write_misses += 1
        now = cache.now_ns()
        cache.blocks.commit(file, first, images, taken, max(end, file.size), now)
        if end > file.size:
            file.size = end
        file.mtime_ns = file.ctime_ns = now
        return None

    def _merge(
        self,
        file: CachedFile,
        block: int,
        offset: int,
        piece: memoryview,
        fills: dict[int, tuple[Fetch, memoryview]],
    ) -> memoryview:
        """The image of a block of which ``piece`` overwrites a part at file ``offset``."""
        cache, size = self.cache, self.block_size
        start = block << self._shift
        low = offset - start
        image = bytearray(size)
        covers = low == 0 and offset + len(piece) >= file.size
        if not covers:
            slot = file.table.get(block)
            if slot >= 0 and cache.integrity.verify(file, block, slot):
                image[:] = cache.data[slot * size : (slot + 1) * size]
            elif start < file.backing_size:
                fetch, memory = fills.get(block, (None, None))
                if fetch is None or memory is None or file.fetches.get(block) is not fetch:
                    raise _NeedsFill(block)
                image[:] = memory
        image[low : low + len(piece)] = piece
        return memoryview(image)

    @asynccontextmanager
    async def changing(self, file: CachedFile) -> AsyncIterator[None]:
        """Around a change of the mtime of the backing inode that the caller makes."""
        file.changing += 1
        try:
            await self.cache.records.touch(file)
            yield
        finally:
            file.changing -= 1
            file.touches += 1

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
        self.cache.health.check()  # after a commit of the catalog that failed nobody knows what a crash would find
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
        return self.cache.slots.counts[DIRTY] << self._shift

    def notes(self) -> list[str]:
        """What a person should know when the mount begins, one line each."""
        return report.notes(self.cache)

    def status(self) -> dict[str, Any]:
        """The engine's part of ``cachefsd status``."""
        return report.status(self.cache, self.space)


def _too_large() -> OSError:
    return OSError(errno.EFBIG, "larger than the backing can hold")


class _NeedsFill(Exception):
    """A block's old content must be read from the backing before it can be merged."""

    def __init__(self, block: int) -> None:
        self.block = block
