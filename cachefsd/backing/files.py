"""One regular file of the backing: direct I/O by blocks, its tail through the page cache."""

from __future__ import annotations

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final, NamedTuple

import trio

from cachefsd.backing import blocking, syscalls
from cachefsd.backing.aio import Aio
from cachefsd.backing.opened import ANY_SIZE, Closer, Opened, Opener, adopt_file, open_file, reopen
from cachefsd.backing.ports import BackingStat, Run, SmallWrite
from cachefsd.backing.workers import Workers

_SECTOR = 512  # no device has smaller ones: a count that is no multiple of it is the end of the file


class DirectFile:
    """A :class:`~cachefsd.backing.ports.BackingFile`."""

    __slots__ = (
        *(
            "handle",
            "sync_failures",
            "bounced_bytes",
            "direct_bytes",
            "direct",
            "max_size",
            "_opener",
            "_aio",
            "_workers",
            "_closer",
            "_scarce",
        ),
        *("_block_size", "_lock", "_opened", "_tail_written", "_in_page_cache", "_in_small", "_replaced"),
    )

    def __init__(
        self,
        handle: bytes,
        opener: Opener,
        aio: Aio,
        workers: Workers,
        closer: Closer,
        block_size: int,
        scarce: Callable[[int], bool] = lambda _: False,
    ) -> None:
        """``scarce``: whether such a descriptor is one of the last and should not be kept."""
        self.handle = handle
        self._scarce: Final = scarce
        self.sync_failures = 0
        self.bounced_bytes = 0
        self.direct_bytes = 0
        self.direct = True
        self.max_size = ANY_SIZE
        self._opener: Final = opener
        self._aio: Final = aio
        self._workers: Final = workers
        self._closer: Final = closer
        self._block_size: Final = block_size
        # Held to open, and to sync: of two syncs at once the second could hear nothing of an error that the
        # first one was told, and be back before it.
        self._lock: Final = trio.Semaphore(1, max_value=1)
        self._opened: Opened | None = None
        self._tail_written = False  # since the last good sync: that descriptor must be asked as well
        self._in_page_cache = False
        self._in_small = False
        self._replaced: Opened | None = None  # by a small write that is under way

    @property
    def writable(self) -> bool:
        """See the port."""
        return self._opened is not None and self._opened.writable

    async def open(self, *, write: bool) -> None:
        """See the port. Opening for writing replaces what was open for reading."""
        if self._is_open(write):
            return
        async with self._lock:
            if self._is_open(write):
                return
            old = self._opened
            self._opened = new = await self._workers.run(self._open, write)
            self.direct, self.max_size = new.direct, new.max_size
            if old is not None:
                self._closer.retire(old)

    def adopt(self, fd: int) -> None:
        """Take a descriptor, of a regular file and for reading and writing, as what :meth:`open` would have opened."""
        self._opened = opened = adopt_file(fd, self._block_size)
        self.direct, self.max_size = opened.direct, opened.max_size

    def close(self) -> None:
        """See the port."""
        if self._opened is not None:
            self._closer.retire(self._opened)
            self._opened = None

    async def read(self, offset: int, views: Sequence[memoryview]) -> int:
        """See the port."""
        with self._using() as opened:
            total = sum(view.nbytes for view in views)
            done = 0
            while done < total:
                # Direct I/O starts at whole blocks only: a count in between is read again.
                start = done - done % self._block_size
                count = await self._read_some(opened, offset + start, _without(views, start))
                if start + count <= done:
                    break
                done = start + count
                if done % _SECTOR:
                    break
            self._count(opened, done)
            return done

    async def write_runs(self, memory: memoryview, runs: Sequence[Run]) -> None:
        """See the port."""
        size = self._block_size
        await trio.lowlevel.checkpoint_if_cancelled()
        with self._using() as opened, trio.CancelScope(shield=True):
            failure: OSError | None = None
            # What is left to write, how much of its first block is done, and how long the run was.
            left = [(run, 0, len(run.places) * size) for run in runs]
            while left:
                counts = await self._write_some(opened, memory, [run for run, _, _ in left])
                unfinished = []
                for (run, done, total), count in zip(left, counts, strict=True):
                    whole = count // size
                    if count < 0:
                        failure = failure or OSError(-count, os.strerror(-count))
                    elif count <= done:
                        failure = failure or OSError(errno.EIO, "a write to the backing makes no progress")
                    elif whole < len(run.places):
                        rest = Run(run.offset + whole * size, run.places[whole:])
                        unfinished.append((rest, count % size, total))
                    else:
                        self._count(opened, total)
                left = unfinished
            if failure is not None:
                raise failure

    async def write_tail(self, offset: int, data: memoryview) -> None:
        """See the port."""
        with self._using() as opened:
            if opened.buffered < 0:
                async with self._lock:
                    if opened.tail < 0:
                        # Before the first such write: its failure is told to descriptors open by then.
                        opened.tail = await self._workers.run(reopen, opened.main, os.O_WRONLY)
            self._tail_written = self._in_page_cache = True
            opened.tail_users += 1
            try:
                await self._workers.run(blocking.write_buffered, opened.buffered, offset, data)
            finally:
                opened.tail_users -= 1
            self.bounced_bytes += data.nbytes

    async def truncate(self, size: int) -> BackingStat:
        """See the port."""
        with self._using() as opened:
            self._in_page_cache = True  # the file system zeroes the rest of the last page there
            return await self._workers.run(blocking.truncate, opened.main, size)

    async def set_mtime(self, mtime_ns: int) -> None:
        """See the port."""
        with self._using() as opened:
            await self._workers.run(syscalls.utimens, opened.main, None, mtime_ns)

    async def sync(self) -> None:
        """See the port. Afterwards nothing of the file stays in the page cache."""
        with self._using() as opened:
            async with self._lock:
                tail_written, self._tail_written = self._tail_written, False
                in_page_cache, self._in_page_cache = self._in_page_cache, False
                tail = opened.tail if tail_written else -1
                try:
                    await self._workers.run(blocking.sync, opened.main, tail, in_page_cache)
                except BaseException as error:
                    self._tail_written |= tail_written
                    self._in_page_cache |= in_page_cache
                    self.sync_failures += isinstance(error, OSError)
                    raise
                self._spare_tail(opened)

    async def allocated_until(self, offset: int) -> int:
        """See the port."""
        with self._using() as opened:
            return await self._workers.run(syscalls.allocated_until, opened.main, offset)

    async def stat(self) -> BackingStat:
        """See the port."""
        with self._using() as opened:
            return await self._workers.run(blocking.stat, opened.main)

    def _spare_tail(self, opened: Opened) -> None:
        """After a good sync: close the second descriptor where they are scarce. It has no error to tell any more."""
        if opened.tail >= 0 and not opened.tail_users and not self._tail_written and self._scarce(opened.tail):
            tail, opened.tail = opened.tail, -1
            self._workers.post(os.close, tail)

    def _is_open(self, write: bool) -> bool:
        opened = self._opened
        if opened is None or (opened.small and not self._tail_written):
            return False
        return opened.writable or not write

    @contextmanager
    def _using(self) -> Iterator[Opened]:
        opened = self._opened
        if opened is None:
            raise OSError(errno.EBADF, "the backing file is not open")
        opened.users += 1
        try:
            yield opened
        finally:
            self._closer.end_use(opened)

    def _count(self, opened: Opened, size: int) -> None:
        if opened.direct:
            self.direct_bytes += size
        else:
            self.bounced_bytes += size

    async def _read_some(self, opened: Opened, offset: int, views: Sequence[memoryview]) -> int:
        if opened.direct:
            return await self._aio.readv(opened.main, offset, views)
        return await self._workers.run(blocking.read_buffered, opened.main, offset, views[: blocking.MAX_VECTORS])

    async def _write_some(self, opened: Opened, memory: memoryview, runs: Sequence[Run]) -> list[int]:
        """Of each run the number of bytes that were written, or minus the errno."""
        if opened.direct:
            return await self._aio.write_runs(opened.main, memory, self._block_size, runs)
        self._in_page_cache = True
        return await self._workers.run(blocking.write_runs_buffered, opened.main, memory, self._block_size, runs)

    # ---- small writes, many files at a time

    def begin_small(self) -> bool:
        """Before :meth:`write_small`: False if the descriptors are not to be had without waiting.

        :meth:`end_small` must follow when it is over.
        """
        try:
            self._lock.acquire_nowait()
        except trio.WouldBlock:
            return False
        self._in_small = self._tail_written = self._in_page_cache = True
        return True

    def write_small(self, memory: memoryview, write: SmallWrite) -> None:
        """Write through the page cache, in a thread."""
        opened = self._opened
        if opened is None or not opened.writable:
            # Who has it open for reading goes on with the new one, and should not do without direct I/O.
            self._replaced, opened = opened, self._open(write=True, small=opened is None)
            self._opened = opened
            self.direct, self.max_size = opened.direct, opened.max_size
        if opened.buffered < 0:
            opened.tail = reopen(opened.main, os.O_WRONLY)
        fd = opened.buffered
        done = 0
        counts = blocking.write_runs_buffered(fd, memory, self._block_size, write.runs)
        for run, count in zip(write.runs, counts, strict=True):
            if count < 0:
                raise OSError(-count, os.strerror(-count))
            if count < len(run.places) * self._block_size:
                raise OSError(errno.EIO, "a write to the backing was cut short")
            done += count
        if write.tail is not None:
            offset, start, length = write.tail
            blocking.write_buffered(fd, offset, memory[start : start + length])
            done += length
        self.bounced_bytes += done
        syscalls.utimens(fd, None, write.mtime_ns)

    def end_small(self) -> None:
        """See :meth:`begin_small`. Calls after the first one do nothing."""
        if not self._in_small:
            return
        self._in_small = False
        self._tail_written = self._in_page_cache = True  # a sync may have been faster than the write
        replaced, self._replaced = self._replaced, None
        if replaced is not None:
            self._closer.retire(replaced)
        self._lock.release()

    async def begin_finish(self) -> Finish:
        """Before :func:`blocking.sync_files`, and after what was written; :meth:`end_finish` must follow."""
        self.end_small()  # other files of the same job may take longer
        await self._lock.acquire()
        opened = self._opened
        if opened is None:
            self._lock.release()
            raise OSError(errno.EBADF, "the backing file is not open")
        opened.users += 1
        return Finish(opened.main, opened.tail, opened)

    def end_finish(self, begun: Finish, result: BackingStat | OSError) -> None:
        """See :meth:`begin_finish`."""
        if isinstance(result, OSError):
            self.sync_failures += 1
        else:
            self._tail_written = self._in_page_cache = False
            self._spare_tail(begun.opened)
        self._closer.end_use(begun.opened)
        self._lock.release()

    # ---- in a thread

    def _open(self, write: bool, small: bool = False) -> Opened:
        path = self._opener(self.handle)
        try:
            return open_file(path, self._block_size, write=write, small=small)
        finally:
            os.close(path)


class Finish(NamedTuple):
    """The descriptors that a file was written through, -1 for none, held until :meth:`DirectFile.end_finish`."""

    main: int
    tail: int
    opened: Opened


def write_small(
    memory: memoryview, waiting: deque[SmallWrite], written: list[tuple[SmallWrite, OSError | None]]
) -> None:
    """The job of :meth:`~cachefsd.backing.ports.Backing.write_files`."""
    while True:
        try:
            write = waiting.popleft()
        except IndexError:
            return
        failure: OSError | None = None
        try:
            assert isinstance(write.file, DirectFile)
            write.file.write_small(memory, write)
        except OSError as error:
            failure = OSError(error.errno, error.strerror)  # the traceback of this one holds views of the map
        written.append((write, failure))


def _without(views: Sequence[memoryview], count: int) -> Sequence[memoryview]:
    """``views`` less their first ``count`` bytes."""
    if not count:
        return views
    rest = list(views)
    while rest and count >= rest[0].nbytes:
        count -= rest.pop(0).nbytes
    if rest and count:
        rest[0] = rest[0][count:]
    return rest
