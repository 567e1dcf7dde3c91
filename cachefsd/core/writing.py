"""What users write: whole blocks, and parts of blocks, which need the old content of the rest.

To *fill* a block is to read that old content from the backing, where the cache does not have it.
"""

from __future__ import annotations

import errno

import trio

from ..media.ports import Buffer
from .cache import Cache
from .fetch import Fetcher
from .files import CUT, CachedFile, Fetch
from .space import Space

NO_SLOTS, NO_ROOM, TOO_LARGE = -1, -2, -3


class Writer:
    """Writes to files. :meth:`write` has no await: it is the hot path."""

    def __init__(self, cache: Cache, fetcher: Fetcher, space: Space) -> None:
        self._cache = cache
        self._fetcher = fetcher
        self._space = space
        self._block_size, self._shift, self._mask = cache.block_size, cache.shift, cache.mask
        self._sync_writes = cache.slots.deferred and cache.options.sync_writes

    def write(self, file: CachedFile, offset: int, data: bytes) -> bool:
        """Write at once, durably (class ``disk``: once the pool is synced); False when it has to wait.

        :raises OSError: EIO when a block that is to be merged was lost.
        """
        if not file.ready or self._sync_writes:
            return False
        if len(data) == self._block_size and not offset & self._mask:
            return self._write_block(file, offset, data)
        return self._write_blocks(file, offset, memoryview(data), {}) is None

    def _write_block(self, file: CachedFile, offset: int, data: bytes) -> bool:
        """:meth:`_write_blocks` for exactly one whole block, which is what databases and fio write: 40 % less time."""
        cache = self._cache
        end = offset + len(data)
        if end > file.size and end > file.backing.max_size:
            return False
        if end > file.allocated_to and not self._space.has_room(file, offset >> self._shift, 1):
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
        cache = self._cache
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
                    await self._cache.records.record(file)
                else:
                    wanted = self._write_blocks(file, offset, piece, fills)
                    if wanted is None:
                        return
                    if wanted == NO_ROOM:
                        end = offset + len(piece) - 1 >> self._shift
                        first = offset >> self._shift
                        await self._space.find(file, first, end - first + 1, deadline)
                    elif wanted == NO_SLOTS:
                        await self._cache.room.wait(deadline)
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
        cache, shift, size = self._cache, self._shift, self._block_size
        end = offset + len(data)
        if end > file.size and end > file.backing.max_size:
            return TOO_LARGE
        first, last = offset >> shift, (end - 1) >> shift
        count = last - first + 1
        if end > file.allocated_to and not self._space.has_room(file, first, count):
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
        cache, size = self._cache, self._block_size
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


def _too_large() -> OSError:
    return OSError(errno.EFBIG, "larger than the backing can hold")


class _NeedsFill(Exception):
    """A block's old content must be read from the backing before it can be merged."""

    def __init__(self, block: int) -> None:
        self.block = block
