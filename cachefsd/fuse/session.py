"""A FUSE session: mount, serve, unmount; and the pump that makes serving fast.

pyfuse3 keeps its session in module globals, so a process has one at a time.

pyfuse3's worker tasks each loop over *wait until the descriptor is readable, read a request, handle
it*. The wait is the module-level coroutine ``pyfuse3._wait_fuse_readable``, and with trio's bookkeeping
(a lock, an epoll registration, a task switch or two) it costs several times what a cached request
does. :class:`Pump` takes its place. That name is private: where it is missing, or pyfuse3 is of another
version than the one this was written for, the session serves with the stock wait and says so.
"""

from __future__ import annotations

import logging
import os
import select
import shutil
import socket
import subprocess
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass

import pyfuse3
import trio

from cachefsd.backing import syscalls
from cachefsd.backing.aio import Aio
from cachefsd.errors import UserError
from cachefsd.fuse import mounts, takeover
from cachefsd.fuse.handshake import Handshake

log = logging.getLogger(__name__)

SUBTYPE = "cachefsd"
FSTYPE = f"fuse.{SUBTYPE}"

MAX_WORKERS = 512
"""Requests that may be in handlers at once. Only one that waits for the backing holds a worker, and one
more than this many would leave hits unread; background requests stop at ``handshake.MAX_BACKGROUND``,
so this needs hundreds of threads in fsync, lookup or buffered misses. A parked worker costs 2.6 KiB."""

_WAITER = "_wait_fuse_readable"
_PYFUSE3 = "3.5."

_DRAIN_NS = 500_000
"""How long requests are served before trio gets a turn: the delay of every other task under full load.
Throughput is the same from 0.25 to 2 ms, within the noise."""
_SPIN_START_NS = 20_000
_SPIN_MAX_NS = 100_000
"""About what it costs to sleep and be woken: longer spinning would cost more than it could save."""


_DRAIN_S = 5.0


class Pump:
    """Decides which worker reads the next request, and when trio may run something else.

    At most one worker, the *leader*, is suspended here on behalf of the descriptor; the others are
    parked. A worker that leaves with a request has *called* a successor: scheduled a parked one (or
    pyfuse3 starts a new worker, as it does after every request until there are ``MAX_WORKERS``).
    A handler that never suspends comes back before the successor runs, so that a stream of hits
    costs one poll each and no task switch; when a handler does suspend, the successor runs and leads.
    What handlers have asked of the backing by then is submitted together, at the latest when nobody is called.

    Invariants: ``leading`` is true only while the leader is suspended; ``called`` only while a task that
    was taken from ``parked`` has not run yet; while there are parked workers and neither is true,
    a worker is running between two awaits.
    """

    def __init__(
        self,
        fd: int,
        completions: Iterable[int] = (),
        submit: Callable[[], None] = lambda: None,
        working: Callable[[], bool] = lambda: False,
    ) -> None:
        """
        :param completions: descriptors that are readable when some handler can go on
        :param submit: lets what handlers wait for begin, if that has been put off while :meth:`calls` was true
        :param working: whether threads of ours have work
        """
        self._fd = fd
        self._submit = submit
        self._working = working
        # 0.4 µs; an epoll object takes 0.3 µs to find nothing and 0.6 µs to find a request.
        self._poll = _polling([fd])
        self._poll_all = _polling([fd, *completions])
        self._clock = time.perf_counter_ns
        self._yield_at = 0
        self._spin_ns = 0
        self._leading = False
        self._called = False
        self._stopped = False
        self.requests = 0
        """How many there have been."""
        # A stack: the workers that ran last have their buffers in the CPU's caches, and the others'
        # buffers (1 MiB each) are never touched at all. pyfuse3 goes on to start workers, as none is waiting where
        # it could see it: those are put beneath, or hundreds of them would run once, and keep a buffer for good.
        self._parked: deque[trio.lowlevel.Task] = deque()
        self._used: set[trio.lowlevel.Task] = set()

    def calls(self) -> bool:
        """Whether there will be another look for requests without waiting for one, and ``submit`` after it."""
        # With a leader suspended the one that was called only parks again.
        return self._called and not self._leading

    async def wait(self) -> bool:
        """Return True when a request (or the end of the connection) can be read, False to end the worker."""
        # A worker that pyfuse3 has just started leaves the request to the one that was called.
        while (
            self._leading or (self._called and trio.lowlevel.current_task() not in self._used)
        ) and not self._stopped:
            await self._park()
        if self._stopped:
            self._submit()
            return False
        if (self._clock() >= self._yield_at or not self._poll(0)) and not await self._lead():
            return False
        self.requests += 1
        if self._called:
            return True
        if self._parked:
            self._called = True
            successor = self._parked.pop()
            self._used.add(successor)
            trio.lowlevel.reschedule(successor)
        else:
            self._submit()
        return True

    def stop(self) -> None:
        """End all workers that are parked; the leader is woken by ``pyfuse3.terminate``."""
        self._stopped = True
        while self._parked:
            trio.lowlevel.reschedule(self._parked.pop())

    async def _park(self) -> None:
        task = trio.lowlevel.current_task()
        if task in self._used:
            self._parked.append(task)
        else:
            self._parked.appendleft(task)

        def abort(_: object) -> trio.lowlevel.Abort:
            self._parked.remove(task)
            return trio.lowlevel.Abort.SUCCEEDED

        await trio.lowlevel.wait_task_rescheduled(abort)
        self._called = False

    async def _lead(self) -> bool:
        """Let trio run the other tasks, then wait for a request by spinning and by sleeping."""
        self._leading = True
        self._used.add(trio.lowlevel.current_task())
        try:
            self._submit()
            while not self._stopped:
                if self._clock() >= self._yield_at:
                    await trio.lowlevel.checkpoint()
                    self._yield_at = self._clock() + _DRAIN_NS
                    if self._stopped:
                        break
                if self._poll(0) or self._spin():
                    return True
                await self._sleep()
        except trio.ClosedResourceError:
            # What pyfuse3.terminate does to a task that waits for the descriptor.
            pass
        finally:
            self._leading = False
        return False

    def _spin(self) -> bool:
        """Wait for a request, but not while the loop could go on with another one: a client that is alone sends
        none before that is answered. Nor while threads of ours have work: each poll gives the interpreter up, but for
        less time than it takes to wake one of them, and so wakes them in vain."""
        if self._working():
            return False
        deadline = self._clock() + self._spin_ns
        while self._clock() < deadline:
            if self._poll_all(0):
                return bool(self._poll(0))
        return False

    async def _sleep(self) -> None:
        """Sleep until there is a request, and learn from it how long to spin the next time.

        As KVM does for idle CPUs: a sleep so short that spinning would have met its end doubles the
        time, any other halves it, down to none at all.
        """
        asleep_at = self._clock()
        await trio.lowlevel.wait_readable(self._fd)
        now = self._clock()
        if now - asleep_at < _SPIN_MAX_NS:
            self._spin_ns = min(max(2 * self._spin_ns, _SPIN_START_NS), _SPIN_MAX_NS)
        else:
            self._spin_ns = self._spin_ns // 2 if self._spin_ns > _SPIN_START_NS else 0
        self._yield_at = now + _DRAIN_NS


def _polling(fds: Iterable[int]) -> Callable[[int], list[tuple[int, int]]]:
    """A function that waits for so many milliseconds, and tells which can be read."""
    poll = select.poll()
    for fd in fds:
        poll.register(fd, select.POLLIN)
    return poll.poll


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
        poll = _polling([self._fd])
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


@dataclass(slots=True)
class Attached:
    """A mount that nobody serves yet: who uses it waits. Made by :func:`attach`."""

    mountpoint: str
    fd: int
    """of the connection; the mount is dead once it is closed"""
    direct: bool
    """Mounted without fusermount3."""
    dead: int = -1
    """a descriptor of the root of the dead mount that was there"""
    covered: bool = False
    """The dead mount is above the new one."""
    takes_over: bool = False

    def uncover(self) -> None:
        """See :meth:`Session.uncover`."""
        if not self.covered:
            return
        self.covered = False
        with suppress(OSError):  # somebody else was faster
            syscalls.unmount(syscalls.proc_path(self.dead))
        log.warning("took the dead mount off %s", self.mountpoint)
        self.close()

    def close(self) -> None:
        """Forget the dead mount. May be called again."""
        if self.dead >= 0:
            os.close(self.dead)
            self.dead = -1

    def abandon(self) -> None:
        """Give up a mount before it has a session: it is dead, and taken off unless there was a dead one already."""
        os.close(self.fd)
        self.close()
        if not self.takes_over:
            mounts.detach_all_dead(self.mountpoint, FSTYPE)


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


def attach(mountpoint: str | os.PathLike[str], *, fsname: str, options: Iterable[str] = ()) -> Attached:
    """Mount over the directory ``mountpoint``; users of it wait until a session serves.

    A dead mount of ours there is replaced. As root that is done without a moment at which the directory beneath can be
    seen. ``fsname`` is shown as the source of the mount. ``options`` are mount options of mount(8) beyond
    ``default_permissions`` and, as root, ``allow_other``.

    :raises UserError: it can't be mounted; nothing has been.
    """
    path = os.path.abspath(mountpoint)
    _check_mountpoint(path)
    if os.geteuid() == 0:
        takeover.reduce_stack(path, FSTYPE)
        return _attach_directly(_real(path), fsname, options)
    require_helper()
    took_off = mounts.detach_all_dead(path, FSTYPE)
    if took_off:
        log.warning("took the dead mount off %s", path)
    attached = _attach_by_fusermount(_real(path), fsname, options)
    attached.takes_over = took_off
    return attached


def _real(path: str) -> str:
    """``path`` without links. A mount of ours is not asked, it might not answer."""
    entry = mounts.find_mount(path)
    return entry.mountpoint if entry is not None else os.path.realpath(path)


def require_helper() -> None:
    """See that what mounts and unmounts for ordinary users is there; root needs no help.

    :raises UserError: it is not.
    """
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise UserError("fusermount3 is not installed (Debian: apt install fuse3)")


_MS_POSIXACL = 1 << 16
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "dirsync": 128, "noatime": 1024}
_DEFAULTS = {"suid", "dev", "exec"}


def _attach_directly(path: str, fsname: str, options: Iterable[str]) -> Attached:
    """Mount without libfuse, which cannot pass MS_POSIXACL on.

    With it the kernel leaves the umask to us, and that is right only here: where a directory has a default ACL,
    there is no umask.
    """
    flags = _MS_POSIXACL
    for option in options:
        if option not in _DEFAULTS:
            flags |= _FLAGS[option]
    with ExitStack() as undo:
        fd = _open_device()
        undo.callback(os.close, fd)
        data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
        try:
            # The path has been looked at without links: one that has come since then must not lead the mount elsewhere.
            place = takeover.ROOT.openat2(-1, os.fsencode(path))
            undo.callback(os.close, place)
            below = mounts.mount_of(place)
            attached = Attached(path, fd, direct=True)
            if below is not None and below.fstype == FSTYPE and below.mountpoint == path:
                if not mounts.is_dead(place):
                    raise _busy(path)
                attached.dead, attached.takes_over = place, True
            syscalls.mount(os.fsencode(fsname), syscalls.proc_path(place), FSTYPE.encode(), flags, data.encode())
            if attached.takes_over:
                attached.covered = takeover.slip_beneath(path, place)
        except OSError as error:
            hint = "; is CAP_SYS_ADMIN missing?" if isinstance(error, PermissionError) else ""
            raise UserError(f"cannot mount on {path}: {error.strerror}{hint}") from None
        undo.pop_all()
    if not attached.takes_over:
        os.close(place)
    elif not attached.covered:
        log.info("the dead mount on %s stays beneath the new one until that is unmounted", path)
    return attached


def _attach_by_fusermount(path: str, fsname: str, options: Iterable[str]) -> Attached:
    """Mount with fusermount3, which is setuid. It sends the connection's descriptor through a socket."""
    _check_device()
    wanted = ["default_permissions", f"fsname={_escape(fsname)}", f"subtype={SUBTYPE}", *options]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(wanted), "--", path],
                env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            raise UserError(
                f"cannot mount on {path}: fusermount3 is not installed (Debian: apt install fuse3)"
            ) from None
        if done.returncode:
            said = os.fsdecode(done.stderr).strip().replace("\n", "; ") or f"fusermount3 said {done.returncode}"
            raise UserError(f"cannot mount on {path}: {said}")
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if len(fds) != 1:
        raise UserError(f"cannot mount on {path}: fusermount3 sent no descriptor")
    os.set_inheritable(fds[0], False)
    return Attached(path, fds[0], direct=False)


def _busy(path: str) -> UserError:
    return UserError(f"{path} is busy: cachefsd is mounted there already")


def _check_mountpoint(path: str) -> None:
    # First by the mount table: an unserved mount would block the stat below, perhaps for ever.
    entry = mounts.find_mount(path)
    if entry is not None and entry.fstype == FSTYPE:
        if takeover.is_dead(path, FSTYPE):
            return
        raise _busy(path)
    try:
        if not os.path.isdir(os.path.realpath(path, strict=True)):
            raise UserError(f"{path} is not a directory")
    except OSError as error:
        raise UserError(f"cannot mount on {path}: {error.strerror}") from None


def _check_device() -> None:
    os.close(_open_device())


def _open_device() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "" if isinstance(error, PermissionError) else " (is the fuse module loaded?)"
        raise UserError(f"cannot open /dev/fuse: {error.strerror}{hint}") from None


def _escape(fsname: str) -> str:
    """``fsname`` for an option list of libfuse, which splits at commas, and pyfuse3, which wants ASCII."""
    printable = fsname.encode("ascii", "replace").decode()
    return printable.replace("\\", "\\\\").replace(",", "\\,")
