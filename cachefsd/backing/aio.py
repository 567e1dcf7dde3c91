"""Linux AIO: vectored reads and writes that go from and to the caller's memory, and do not block the loop.

``io_submit`` blocks when the file system must allocate, must read its own metadata, or has no request left.
So it is called in the loop only for reads, and only with RWF_NOWAIT, which turns waiting into EAGAIN; what
would wait, and every write, is submitted by a worker thread.

Reads that come together are submitted together where somebody says when they are all there (``Aio.gathers``): a call
costs 25 us for one of 4 KiB on a virtual disk, which is told of it by leaving the guest, and 8 us each for 16.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any, Final, NamedTuple, Self

import cffi
import numpy as np
import trio

from cachefsd.backing.completions import Completing, not_cancellable
from cachefsd.backing.ports import Run
from cachefsd.backing.workers import Workers
from cachefsd.errors import UserError

_LIBRARIES = ("libaio.so.1", "libaio.so.1t64")  # the second where time_t once had 32 bits
_OP_PREADV = 7  # linux/aio_abi.h
_OP_PWRITEV = 8
_FLAG_RESFD = 1
_MAX_VECTORS = 1024  # UIO_MAXIOV
_MOST_GATHERED = 16
_WOULD_WAIT = (errno.EAGAIN, errno.EOPNOTSUPP, errno.EINVAL)  # the latter two: no RWF_NOWAIT here

_ffi = cffi.FFI()
_ffi.cdef(
    """
    struct iovec { uintptr_t base; size_t length; };
    struct iocb {
        uint64_t data; uint32_t key; int rw_flags; uint16_t opcode; int16_t priority; uint32_t fd;
        struct iovec *vectors; uint64_t count; int64_t offset, reserved; uint32_t flags, eventfd;
    };
    struct io_event { uint64_t data, iocb; int64_t result, result2; };
    int io_setup(int depth, void **context);
    int io_destroy(void *context);
    int io_submit(void *context, long count, struct iocb **requests);
    int io_getevents(void *context, long minimum, long count, struct io_event *events, void *timeout);
    """
)


def _load() -> Any:
    for name in _LIBRARIES:
        try:
            return _ffi.dlopen(name)
        except OSError:
            continue
    raise UserError(f"{_LIBRARIES[0]} is missing: install libaio")


class _Memory:
    """Where in memory the bytes of some requests lie, as long as it is entered.

    Left explicitly rather than by being forgotten: the traceback of an error may live for long, and memory
    with a buffer exported can not be unmapped.
    """

    def __init__(self) -> None:
        self._buffers: list[Any] = []

    def _address(self, view: memoryview) -> int:
        buffer = _ffi.from_buffer(view)
        self._buffers.append(buffer)
        return int(_ffi.cast("uintptr_t", buffer))

    def views(self, views: Sequence[memoryview]) -> _Vectors:
        """One request for all of ``views``, in their order. Adjacent ones are one piece."""
        pieces: list[tuple[int, int]] = []
        end = -1
        for view in views:
            address = self._address(view)
            if address == end:
                start, length = pieces[-1]
                pieces[-1] = (start, length + view.nbytes)
            else:
                pieces.append((address, view.nbytes))
            end = address + view.nbytes
        return _Vectors(_ffi.new("struct iovec[]", pieces), [0, len(pieces)])

    def blocks(self, view: memoryview, size: int, runs: Sequence[Run]) -> _Vectors:
        """One request for each of ``runs`` of blocks of ``size`` bytes of ``view``. Adjacent blocks are one piece."""
        places = np.concatenate([run.places for run in runs], dtype=np.int64)
        edges = np.cumsum([0, *(len(run.places) for run in runs)])
        begins = np.empty(len(places), np.bool_)
        np.not_equal(places[1:] - places[:-1], 1, out=begins[1:])
        begins[edges[:-1]] = True
        first = np.flatnonzero(begins)
        pieces = np.empty((len(first), 2), np.uint64)
        pieces[:, 0] = places[first] * size + self._address(view)
        pieces[:-1, 1] = (first[1:] - first[:-1]) * size
        pieces[-1, 1] = (len(places) - first[-1]) * size
        return _Vectors(_ffi.from_buffer("struct iovec[]", pieces.data), np.searchsorted(first, edges).tolist())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._buffers:
            _ffi.release(buffer)


class _Vectors(NamedTuple):
    """Pieces of memory as the kernel wants them, n iovecs; where those of each request begin, and n."""

    pieces: Any
    edges: list[int]


class _Batch:
    """Requests that go to the kernel together, one for each of the ``offsets``."""

    def __init__(
        self, key: int, eventfd: int, opcode: int, flags: int, fd: int, offsets: Sequence[int], vectors: _Vectors
    ) -> None:
        """``key`` and the numbers after it are the names of the requests. Of each only the first 1024 pieces are
        asked for."""
        self.key = key
        self._pieces = pieces = vectors.pieces
        self._iocbs = iocbs = _ffi.new(
            "struct iocb[]",
            [
                (
                    *(key + index, 0, flags, opcode, 0, fd),
                    *(pieces + first, min(end - first, _MAX_VECTORS), offset, 0, _FLAG_RESFD, eventfd),
                )
                for index, (offset, (first, end)) in enumerate(zip(offsets, pairwise(vectors.edges), strict=True))
            ],
        )
        self.requests: Any = _ffi.new("struct iocb *[]", [iocbs + index for index in range(len(offsets))])
        self.results = [0] * len(offsets)
        """bytes, or minus the errno"""
        self.left = len(offsets)
        """How many have not ended."""
        self.task: trio.lowlevel.Task | None = None


class Aio(Completing):
    """One AIO context of ``depth`` requests. ``async with`` starts and stops it."""

    def __init__(self, workers: Workers, depth: int = 256) -> None:
        """
        :raises UserError: libaio is missing, or the system has no room for so many requests.
        """
        super().__init__("direct I/O")
        self._lib: Final = _load()
        self._workers: Final = workers
        self._depth: Final = depth
        self._room = depth
        self._waiting: Final = trio.lowlevel.ParkingLot()
        self._flying: dict[int, tuple[_Batch, int]] = {}
        self._next_key = 0
        self._events = _ffi.new("struct io_event[]", depth)
        self._context: Any = None
        self._gathered: list[_Batch] = []
        self.gathers: Callable[[], bool] = lambda: False
        """Whether reads should wait for :meth:`submit`, which is sure to be called before long."""
        self.inline = 0
        """Requests that the loop has submitted itself."""
        self.deferred = 0
        """Requests that a worker thread has submitted."""

    def start(self) -> None:
        """Make the context; to be called in the thread of the loop.

        :raises UserError: the system has no room for so many requests.
        """
        context = _ffi.new("void **")
        error = self._lib.io_setup(self._depth, context)
        if error < 0:
            raise UserError(f"no room for {self._depth} asynchronous requests: raise fs.aio-max-nr")
        self._context = context[0]
        self._listener.start()

    async def stop(self) -> None:
        """Wait for the requests in flight and destroy the context."""
        with trio.CancelScope(shield=True):
            taken = 0
            while taken < self._depth:
                taken += await self._take(self._depth - taken)
            await self._workers.run(self._lib.io_destroy, self._context)
        await self._listener.stop()

    def submit(self) -> None:
        """Submit the reads that wait for others."""
        if not self._gathered:
            return
        batches, self._gathered = self._gathered, []
        if len(batches) == 1:
            requests = batches[0].requests
        else:
            requests = _ffi.new("struct iocb *[]", [batch.requests[0] for batch in batches])
        for index, error in self._submit(requests, 0, len(batches)):
            self._end(batches[index].key, error)

    async def readv(self, fd: int, offset: int, views: Sequence[memoryview]) -> int:
        """Read from ``offset`` on into ``views``; return the number of bytes, which may be less.

        Not cancellable half-way. ``fd`` must stay open until it returns.

        :raises OSError: what the kernel answered.
        """
        with _Memory() as memory:
            vectors = memory.views(views)
            (done,) = await self._transfer(_OP_PREADV, fd, [offset], vectors, os.RWF_NOWAIT)
            if -done in _WOULD_WAIT:
                (done,) = await self._transfer(_OP_PREADV, fd, [offset], vectors, 0)
        if done < 0:
            raise OSError(-done, os.strerror(-done))
        return done

    async def write_runs(self, fd: int, memory: memoryview, size: int, runs: Sequence[Run]) -> list[int]:
        """Write all of ``runs``, blocks of ``size`` bytes of ``memory``; return for each the number of bytes, which may
        be less, or minus the errno.

        One job of a worker submits them, and the caller is woken once, when the last has ended. Not cancellable
        half-way. ``fd`` must stay open until it returns.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if not runs:
            return []
        with trio.CancelScope(shield=True), _Memory() as source:
            vectors = source.blocks(memory, size, runs)
            counts = await self._transfer(_OP_PWRITEV, fd, [run.offset for run in runs], vectors, 0)
        return counts

    async def _transfer(self, opcode: int, fd: int, offsets: Sequence[int], vectors: _Vectors, flags: int) -> list[int]:
        """One request for each offset: its number of bytes, or minus the errno. More than one must be shielded, and
        with RWF_NOWAIT there is only one."""
        key, count = self._next_key, len(offsets)
        self._next_key += count
        batch = _Batch(key, self.eventfd, opcode, flags, fd, offsets, vectors)
        submitted = 0
        while submitted < count:
            # What there is room for goes at once: two that wait for all of theirs could wait for each other.
            room = await self._take(count - submitted)
            self._flying.update((key + index, (batch, index)) for index in range(submitted, submitted + room))
            if flags & os.RWF_NOWAIT:
                self.inline += room
                self._gathered.append(batch)
                if len(self._gathered) == _MOST_GATHERED or not self.gathers():
                    self.submit()
            else:
                self.deferred += room
                with trio.CancelScope(shield=True):
                    refused = await self._workers.run(self._submit, batch.requests, submitted, room)
                for index, error in refused:
                    self._end(key + index, error)
            submitted += room
        if batch.left:
            batch.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(not_cancellable)
        return batch.results

    def _submit(self, requests: Any, first: int, count: int) -> list[tuple[int, int]]:
        """Submit some of ``requests``, in any thread; which of them were refused, with minus the errno."""
        refused: list[tuple[int, int]] = []
        end = first + count
        while first < end:
            # The kernel takes those before the first one that it refuses, and says why when it is the first.
            taken = self._lib.io_submit(self._context, end - first, requests + first)
            if taken <= 0:
                refused.append((first, taken or -errno.EAGAIN))
                taken = 1
            first += taken
        return refused

    def _collect(self) -> None:
        while (count := self._lib.io_getevents(self._context, 0, self._depth, self._events, _ffi.NULL)) > 0:
            for event in self._events[0:count]:
                self._end(event.data, event.result)
            if count < self._depth:
                break

    def _end(self, key: int, result: int) -> None:
        """A request has ended, or was refused."""
        batch, index = self._flying.pop(key)
        batch.results[index] = result
        batch.left -= 1
        if not batch.left and batch.task is not None:
            trio.lowlevel.reschedule(batch.task)
        self._room += 1
        self._waiting.unpark()

    async def _take(self, most: int) -> int:
        """Room for some requests: one at least, ``most`` at most."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._room:
            await self._waiting.park()
        taken = min(self._room, most)
        self._room -= taken
        return taken
