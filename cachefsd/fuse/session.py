"""A FUSE session: it serves a mount until that ends.

pyfuse3 keeps its session in module globals, so a process has one at a time.

pyfuse3's workers wait for requests in the module-level coroutine ``pyfuse3._wait_fuse_readable``; the pump
(``fuse/pump``) takes its place. That name is private: where it is missing, or pyfuse3 is of another
version than the one this was written for, the session serves with the stock wait and says so.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext

import pyfuse3
import trio

from cachefsd.backing.aio import Aio
from cachefsd.errors import UserError
from cachefsd.fuse import mounts, takeover
from cachefsd.fuse.handshake import Handshake
from cachefsd.fuse.mounting import Attached, attach
from cachefsd.fuse.mounts import FSTYPE
from cachefsd.fuse.pump import Pump, polling

log = logging.getLogger(__name__)

MAX_WORKERS = 512
"""Requests that may be in handlers at once. Only one that waits for the backing holds a worker, and one
more than this many would leave hits unread; background requests stop at ``handshake.MAX_BACKGROUND``,
so this needs hundreds of threads in fsync, lookup or buffered misses. A parked worker costs 2.6 KiB."""

_WAITER = "_wait_fuse_readable"
_PYFUSE3 = "3.5."
_DRAIN_S = 5.0


def _loop_problem() -> str | None:
    """Why the waiting of the pyfuse3 that is installed can't be replaced, or None."""
    if not pyfuse3.__version__.startswith(_PYFUSE3):
        return f"pyfuse3 is version {pyfuse3.__version__}, not {_PYFUSE3}x"
    if not hasattr(pyfuse3, _WAITER):
        return f"pyfuse3 has no {_WAITER}"
    return None


class Session:
    """A mounted file system. Made by :func:`mount`; all methods are for the trio thread."""

    def __init__(self, attached: Attached, *, writeback_cache: bool) -> None:
        self.mountpoint = attached.mountpoint
        self.takes_over = attached.takes_over
        """Whether a dead mount was there."""
        self._attached = attached
        self._fd = attached.fd
        self._writeback_cache = writeback_cache
        self._pump: Pump | None = None
        self._stopping = False
        self._closed = False

    @property
    def aborted(self) -> bool:
        """After :meth:`run`: whether somebody has broken the connection, so that the mount is dead."""
        return not self._stopping and self.entry() is not None and takeover.is_dead(self.mountpoint, FSTYPE)

    def uncover(self) -> None:
        """Let users see the new file system instead of the dead mount. May be called again."""
        self._attached.uncover()

    def entry(self) -> mounts.MountEntry | None:
        """Our mount, or None when it is gone or covered by another one."""
        entry = mounts.find_mount(self.mountpoint)
        return entry if entry is not None and entry.fstype == FSTYPE else None

    @property
    def connection(self) -> tuple[int, str]:
        """The descriptor of /dev/fuse, and the connection's name in /sys/fs/fuse/connections; -1 when it is gone."""
        entry = None if self._closed else self.entry()
        return (-1, "") if entry is None else (self._fd, entry.device.partition(":")[2])

    @property
    def requests(self) -> int:
        """How many requests the pump has seen; none without it."""
        return 0 if self._pump is None else self._pump.requests

    async def run(
        self,
        *,
        pump: bool = True,
        completions: Iterable[int] = (),
        working: Callable[[], bool] = lambda: False,
        aio: Aio | None = None,
    ) -> None:
        """Serve until :meth:`request_stop`, or until somebody unmounts or aborts the connection.

        ``completions`` and ``working`` are for the pump, see there; ``aio`` is what handlers read with: the pump tells
        it when to submit. Requests that are in handlers are finished first.
        """
        problem = _loop_problem()
        if problem is not None:
            log.warning("serving with the slower stock request loop: %s", problem)
        with nullcontext() if problem is not None else self._installed(pump, completions, working, aio):
            await pyfuse3.main(min_tasks=1, max_tasks=MAX_WORKERS)

    @contextmanager
    def _installed(
        self, wanted: bool, completions: Iterable[int], working: Callable[[], bool], aio: Aio | None
    ) -> Iterator[None]:
        """Our say in how requests are waited for: in INIT, and after that by the pump where that is ``wanted``."""
        stock = wait = getattr(pyfuse3, _WAITER)
        if wanted:
            self._pump = pump = Pump(self._fd, completions, aio.submit if aio is not None else lambda: None, working)
            wait = pump.wait
            if aio is not None:
                aio.gathers = pump.calls
            if self._stopping:
                pump.stop()
        handshake = Handshake(self._fd) if self._attached.direct else None

        # There is one worker until it has read INIT, and that is answered before any worker waits again.
        async def wait_for_init() -> bool:
            if not await wait():
                return False
            if handshake is not None:
                try:
                    handshake.begin()
                except OSError as error:
                    log.debug("no INIT: %s", error.strerror)
                    setattr(pyfuse3, _WAITER, wait)
                    return True
            setattr(pyfuse3, _WAITER, wait_after_init)
            return True

        async def wait_after_init() -> bool:
            if handshake is not None:
                handshake.finish()
            setattr(pyfuse3, _WAITER, wait)
            self.uncover()
            if (entry := self.entry()) is not None:
                mounts.tune(entry, writeback_cache=self._writeback_cache)
            return bool(await wait())

        setattr(pyfuse3, _WAITER, wait_for_init)
        try:
            yield
        finally:
            setattr(pyfuse3, _WAITER, stock)
            if handshake is not None:
                handshake.close()
            if aio is not None:
                aio.gathers = lambda: False
                aio.submit()
            self._pump = None

    async def drain(self) -> None:
        """Wait until there is a moment without a request to read, but not for long.

        Before Linux 6.16 syncfs(2) returns when the kernel's pages are on their way, and not when they are here.
        """
        poll = polling([self._fd])
        with trio.move_on_after(_DRAIN_S):
            while not self._closed and poll(0):
                await trio.sleep(0.01)

    def request_stop(self) -> None:
        """Make :meth:`run` return as soon as no handler is running; may be called more than once."""
        self._stopping = True
        if self._closed:
            return
        pyfuse3.terminate()
        if self._pump is not None:
            self._pump.stop()

    def close(self, *, unmount: bool = True) -> None:
        """End the session. May be called again.

        ``unmount``: take the mount off if it is still there, lazily: files in use lose their file system. Otherwise it
        stays, and is dead: whoever uses it gets ENOTCONN.
        """
        if self._closed:
            return
        self._closed = True
        pyfuse3.close(unmount=False)
        self._attached.close()
        if unmount:
            # Libfuse knows nothing of the mount. It is dead by now, and so is what was beneath it.
            mounts.detach_all_dead(self.mountpoint, FSTYPE)
            log.debug("%s is unmounted", self.mountpoint)


def mount(
    operations: pyfuse3.Operations,
    mountpoint: str | os.PathLike[str],
    *,
    fsname: str,
    options: Iterable[str] = (),
) -> Session:
    """:func:`attach` and :func:`begin` in one."""
    return begin(operations, attach(mountpoint, fsname=fsname, options=options))


def begin(operations: pyfuse3.Operations, attached: Attached) -> Session:
    """A session of ``operations`` for a mount; nothing is served before :meth:`Session.run`.

    :raises UserError: libfuse cannot serve it. The mount is given up then.
    """
    try:
        pyfuse3.init(operations, f"/dev/fd/{attached.fd}", set())
    except RuntimeError as error:
        attached.abandon()
        raise UserError(f"cannot mount on {attached.mountpoint}: {error}") from None
    except BaseException:
        attached.abandon()
        raise
    return Session(attached, writeback_cache=operations.enable_writeback_cache)
