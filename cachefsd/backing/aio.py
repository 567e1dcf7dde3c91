"""Linux AIO: vectored reads and writes that go from and to the caller's memory, and do not block the loop.

``io_submit`` blocks when the file system must allocate, must read its own metadata, or has no request left.
So it is called in the loop only for reads, and only with RWF_NOWAIT, which turns waiting into EAGAIN; what
would wait, and every write, is submitted by a worker thread.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Final, Self

import cffi
import trio

from cachefsd.backing.workers import Drain, Workers
from cachefsd.errors import UserError

_LIBRARIES = ("libaio.so.1", "libaio.so.1t64")  # the second where time_t once had 32 bits
_OP_PREADV = 7  # linux/aio_abi.h
_OP_PWRITEV = 8
_FLAG_RESFD = 1
_MAX_VECTORS = 1024  # UIO_MAXIOV
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


class _Vectors:
    """Where the bytes of some views lie in memory, adjacent ones as one piece, as long as it is entered.

    Left explicitly rather than by being forgotten: the traceback of an error may live for long, and memory
    with a buffer exported can not be unmapped.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._keep = [_ffi.from_buffer(view) for view in views]
        pieces: list[tuple[int, int]] = []
        end = -1
        for view, buffer in zip(views, self._keep, strict=True):
            address = int(_ffi.cast("uintptr_t", buffer))
            if address == end:
                start, length = pieces[-1]
                pieces[-1] = (start, length + view.nbytes)
            else:
                pieces.append((address, view.nbytes))
            end = address + view.nbytes
        self.count = len(pieces)
        self.array = _ffi.new("struct iovec[]", pieces)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for buffer in self._keep:
            _ffi.release(buffer)


class _Request:
    __slots__ = ("iocb", "iocbs", "keep", "result", "task")

    def __init__(self) -> None:
        self.iocb: Any = _ffi.new("struct iocb *")
        self.iocbs = _ffi.new("struct iocb *[1]", [self.iocb])
        self.result: int | None = None
        self.task: trio.lowlevel.Task | None = None

    async def completion(self) -> int:
        if self.result is None:
            self.task = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(_not_now)
            assert self.result is not None
        return self.result


class Aio:
    """One AIO context of ``depth`` requests. ``async with`` starts and stops it."""

    def __init__(self, workers: Workers, depth: int = 256) -> None:
        """
        :raises UserError: libaio is missing, or the system has no room for so many requests.
        """
        self._lib: Final = _load()
        self._workers: Final = workers
        self._depth: Final = depth
        self._slots: Final = trio.Semaphore(depth)
        self._flying: dict[int, _Request] = {}
        self._next = 0
        self._events = _ffi.new("struct io_event[]", depth)
        self._context: Any = None
        self._drain: Drain | None = None
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
        self._drain = Drain(self._collect, "completions of direct I/O")

    async def stop(self) -> None:
        """Wait for the requests in flight and destroy the context."""
        assert self._drain is not None
        with trio.CancelScope(shield=True):
            for _ in range(self._depth):
                await self._slots.acquire()
            await self._workers.run(self._lib.io_destroy, self._context)
        await self._drain.stop()

    async def __aenter__(self) -> Self:
        self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    async def readv(self, fd: int, offset: int, views: Sequence[memoryview]) -> int:
        """Read from ``offset`` on into ``views``; return the number of bytes, which may be less.

        Not cancellable half-way. ``fd`` must stay open until it returns.

        :raises OSError: what the kernel answered.
        """
        with _Vectors(views) as vectors:
            done = await self._transfer(_OP_PREADV, fd, offset, vectors, os.RWF_NOWAIT)
            if -done in _WOULD_WAIT:
                done = await self._transfer(_OP_PREADV, fd, offset, vectors, 0)
        return _checked(done)

    async def writev(self, fd: int, offset: int, views: Sequence[memoryview]) -> int:
        """Write ``views`` to ``offset``; as :meth:`readv`."""
        with _Vectors(views) as vectors:
            done = await self._transfer(_OP_PWRITEV, fd, offset, vectors, 0)
        return _checked(done)

    async def _transfer(self, opcode: int, fd: int, offset: int, vectors: _Vectors, flags: int) -> int:
        """One request, of the first 1024 vectors: the number of bytes, or minus the errno."""
        await trio.lowlevel.checkpoint_if_cancelled()
        try:
            self._slots.acquire_nowait()
        except trio.WouldBlock:
            await self._slots.acquire()
        request = _Request()
        self._next += 1
        key = self._next
        iocb = request.iocb
        iocb.data, iocb.opcode, iocb.fd, iocb.rw_flags = key, opcode, fd, flags
        iocb.vectors, iocb.count, iocb.offset = vectors.array, min(vectors.count, _MAX_VECTORS), offset
        assert self._drain is not None
        iocb.flags, iocb.eventfd = _FLAG_RESFD, self._drain.eventfd
        self._flying[key] = request
        try:
            if flags & os.RWF_NOWAIT:
                self.inline += 1
                error = self._lib.io_submit(self._context, 1, request.iocbs)
            else:
                self.deferred += 1
                with trio.CancelScope(shield=True):
                    error = await self._workers.run(self._lib.io_submit, self._context, 1, request.iocbs)
            return error if error < 0 else await request.completion()
        finally:
            del self._flying[key]
            self._slots.release()

    def _collect(self) -> None:
        while (count := self._lib.io_getevents(self._context, 0, self._depth, self._events, _ffi.NULL)) > 0:
            for event in self._events[0:count]:
                request = self._flying[event.data]
                request.result = event.result
                if request.task is not None:
                    trio.lowlevel.reschedule(request.task)
            if count < self._depth:
                break


def _checked(done: int) -> int:
    if done < 0:
        raise OSError(-done, os.strerror(-done))
    return done


def _not_now(_: object) -> trio.lowlevel.Abort:
    return trio.lowlevel.Abort.FAILED
