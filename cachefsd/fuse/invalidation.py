"""What is in the page cache and would be old after a direct write.

The kernel drops the pages of a range before it sends an O_DIRECT write, and once more when a synchronous one has
ended. For an asynchronous one (io_submit, io_uring) there is no second time: a page that somebody has read in between
would stay, with the old data. So we have the range dropped before we answer the write.

That is only needed for pages that have come since the file was opened with O_DIRECT. :class:`CachedPages` knows
them: a read or write through the page cache is noted when it is answered. One that is answered after the direct
write is published has the new data, so it does not matter that the kernel may wait for it.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from typing import Final

import trio

from cachefsd.fuse import dropper

log = logging.getLogger(__name__)

_PAGE_SHIFT: Final = 12
_CHUNK_SHIFT: Final = 10  # pages of one number: 4 MiB
_MAX_CHUNKS: Final = 16384
WAIT_S: Final = 2.0
"""How long a write waits for its pages to be dropped. They go in any case; this is for a kernel that waits for us."""
_WAIT_CROWDED_S: Final = 0.1
_CROWD: Final = 64
"""Half of ``handshake.MAX_BACKGROUND``. The kernel sends no read ahead while that many requests are out. If all of
them were writes that wait for pages which a read ahead holds, none would ever end."""


class CachedPages:
    """Which pages of one file may be in the page cache, of those that have come while it was open with O_DIRECT."""

    __slots__ = ("_all", "_chunks")

    def __init__(self) -> None:
        self._chunks: dict[int, int] = {}
        """Sets of pages as numbers, one for each 4 MiB of the file."""
        self._all = False
        """There were too many to remember."""

    def note(self, offset: int, size: int) -> None:
        """Pages of this range, in bytes, have come to the page cache."""
        if size <= 0 or self._all:
            return
        for chunk, pages in _pages(offset, size):
            self._chunks[chunk] = self._chunks.get(chunk, 0) | pages
        if len(self._chunks) > _MAX_CHUNKS:
            self._chunks.clear()
            self._all = True

    def take(self, offset: int, size: int) -> bool:
        """Whether pages of this range, in bytes, may be there; they count as dropped from now on."""
        if self._all:
            return True
        if not self._chunks:
            return False
        found = False
        for chunk, pages in _pages(offset, size):
            there = self._chunks.get(chunk, 0)
            if there & pages:
                found = True
                if there & ~pages:
                    self._chunks[chunk] = there & ~pages
                else:
                    del self._chunks[chunk]
        return found


def _pages(offset: int, size: int) -> Iterator[tuple[int, int]]:
    """The pages of a range that is not empty: (number of 4 MiB, set of pages in it)."""
    first, last = offset >> _PAGE_SHIFT, (offset + size - 1) >> _PAGE_SHIFT
    for chunk in range(first >> _CHUNK_SHIFT, (last >> _CHUNK_SHIFT) + 1):
        start = chunk << _CHUNK_SHIFT
        low, high = max(first - start, 0), min(last - start + 1, 1 << _CHUNK_SHIFT)
        yield chunk, (1 << high) - (1 << low)


class Invalidator:
    """Has the kernel drop pages, by a process of its own (see :mod:`cachefsd.fuse.dropper`), started when needed."""

    def __init__(self) -> None:
        self._connection = -1
        self._name = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: trio.socket.SocketType | None = None
        self._starting: Final = trio.Lock()
        self._next = 0
        self._waiting: dict[int, trio.Event] = {}
        self._failed: set[int] = set()

    def attach(self, connection: int, name: str) -> None:
        """Work on this descriptor of /dev/fuse, whose connection has this name in /sys. Without it nothing is done."""
        self._connection, self._name = connection, name

    def close(self) -> None:
        """End the process, and with it the connection where the kernel still waits. To be called before the unmount:
        the process has the connection open. May be called again."""
        self._connection = -1
        self._hang_up()
        process, self._process = self._process, None
        if process is not None:
            with suppress(subprocess.TimeoutExpired):
                process.wait(WAIT_S)
                return
            log.warning("the process %d that drops pages does not end", process.pid)

    async def drop(self, node: int, offset: int, size: int, *, patient: bool) -> bool:
        """Have the pages of a range dropped, in bytes; whether it was done in time.

        ``patient``: the kernel certainly waits for nothing that we are about to answer.
        """
        if self._connection < 0:
            return True
        number = self._next
        self._next += 1
        event = self._waiting[number] = trio.Event()
        wait_s = WAIT_S if patient and len(self._waiting) < _CROWD else _WAIT_CROWDED_S
        try:
            with trio.move_on_after(wait_s):
                if self._socket is None:
                    await self._start()
                if self._socket is not None:
                    await self._socket.send(dropper.REQUEST.pack(number, node, offset, size))
                    await event.wait()
                    return number not in self._failed
        except OSError as error:
            log.warning("cannot have pages dropped: %s", error.strerror)
        except trio.ClosedResourceError:
            log.debug("pages were not dropped: the process that does it has ended")
        finally:
            self._waiting.pop(number, None)
            self._failed.discard(number)
        return False

    async def _start(self) -> None:
        async with self._starting:
            if self._socket is not None or self._connection < 0:
                return
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with theirs:
                fds = (theirs.fileno(), self._connection)
                command = [sys.executable, "-I", "-S", dropper.__file__, *map(str, fds), self._name]
                try:
                    # In the loop: it takes a few milliseconds, once, and must not be left half-way.
                    process = subprocess.Popen(command, pass_fds=fds, stdin=subprocess.DEVNULL, cwd="/")
                except OSError:
                    ours.close()
                    raise
            ours.setblocking(False)
            self._process, self._socket = process, trio.socket.from_stdlib_socket(ours)
            trio.lowlevel.spawn_system_task(self._listen, self._socket, process)

    async def _listen(self, sock: trio.socket.SocketType, process: subprocess.Popen[bytes]) -> None:
        with suppress(OSError, trio.ClosedResourceError):  # the latter: closed by us
            while answer := await sock.recv(dropper.ANSWER.size):
                number, error = dropper.ANSWER.unpack(answer)
                if number in self._waiting:
                    if error:
                        log.debug("pages were not dropped: %s", os.strerror(error))
                        self._failed.add(number)
                    self._waiting.pop(number).set()
        if sock is self._socket:
            log.warning("the process %d that drops pages has ended; the next direct write starts another", process.pid)
            self._hang_up()
            process.poll()

    def _hang_up(self) -> None:
        sock, self._socket = self._socket, None
        if sock is not None:
            sock.close()
        self._failed.update(self._waiting)
        for event in self._waiting.values():
            event.set()
