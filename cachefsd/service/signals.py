"""What signals ask of the daemon.

SIGTERM, SIGINT and SIGQUIT stop it in order. SIGQUIT leaves the mount, dead, where an unmount would show what is older
than the cache. SIGUSR1 writes to the log what every thread and every task is doing.
SIGHUP and SIGUSR2 are reserved, and only leave a line in the log. SIGABRT, from the watchdog of a service manager, and
faults of the processor end the daemon with the stacks of its threads. Every other signal that can be caught is
ignored: a file system must not end because of a timer or a pipe.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from threading import Thread
from types import FrameType
from typing import Final

import trio

log = logging.getLogger(__name__)

STOP: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGQUIT})
NOTED: Final = frozenset({signal.SIGHUP, signal.SIGUSR2})
_DEFAULT: Final = frozenset(
    {
        *(signal.SIGKILL, signal.SIGSTOP),  # cannot be caught
        *(signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGILL, signal.SIGFPE),  # faulthandler's
        # These do not end a process.
        *(signal.SIGCHLD, signal.SIGCONT, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU, signal.SIGURG),
        signal.SIGWINCH,
    }
)


class Stopped(KeyboardInterrupt):
    """A signal has asked the process to stop before it serves."""

    def __init__(self, number: int) -> None:
        super().__init__(f"interrupted by {signal.Signals(number).name}")
        self.number = number


class _Early:
    """What has come before the loop runs."""

    raises = True
    """Only until the loop begins: an exception in the middle of its own code would break it."""
    stop = 0
    """the last signal of ``STOP``; 0: none has come"""


def _ignore(number: int, frame: FrameType | None) -> None:
    # A handler, and not SIG_IGN, which a process that we start would inherit.
    pass


def _stop(number: int, frame: FrameType | None) -> None:
    if _Early.raises:
        raise Stopped(number)
    _Early.stop = number


def catch_all() -> None:
    """Let no signal end this process but those that have to; for the main thread, as early as possible.

    From now on a signal of ``STOP`` raises :class:`Stopped`.
    """
    for number in signal.valid_signals() - _DEFAULT:
        with contextlib.suppress(OSError, ValueError):  # the C library keeps some for itself
            signal.signal(number, _stop if number in STOP else _ignore)
    # A thread of its own waits for it, so no other one may get it: those that come inherit this.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})


@contextlib.contextmanager
def stopping_raises() -> Iterator[None]:
    """Until the end of the block SIGTERM raises :class:`Stopped`, as SIGINT raises KeyboardInterrupt."""

    def stop(number: int, frame: FrameType | None) -> None:
        raise Stopped(number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def in_loop() -> Iterator[None]:
    """Around the event loop, which hears of signals itself: from now on none of them raises an exception."""
    _Early.raises = False
    try:
        yield
    finally:
        _Early.stop = 0


class Signals:
    """Signals as long as the event loop runs. Make it in :func:`in_loop`."""

    def __init__(self) -> None:
        self.scope: Final = trio.CancelScope()
        """for the start: a signal of ``STOP`` cancels it"""
        self.stopped_by = 0
        """the first signal of ``STOP``; 0: none has come"""
        self._asked: Final = trio.Event()
        self._serving: trio.CancelScope | None = None

    async def obey(self, *, task_status: trio.TaskStatus[None]) -> None:
        """Hear of signals until cancelled."""
        Thread(target=_tell_stacks, args=(trio.lowlevel.current_trio_token(),), name="SIGUSR1", daemon=True).start()
        with trio.open_signal_receiver(*STOP, *NOTED) as received:
            task_status.started()
            if _Early.stop:
                self._stop(_Early.stop)
            async for number in received:
                if number in STOP:
                    self._stop(number)
                else:
                    log.info("%s is ignored: there is nothing to reload", signal.Signals(number).name)

    def _stop(self, number: int) -> None:
        if self._serving is None:
            self.scope.cancel()
        elif self.stopped_by:
            self._serving.cancel()  # the second one: a handler waits for a backing that does not answer
        self.stopped_by = self.stopped_by or number
        self._asked.set()

    async def wait_for_stop(self, serving: trio.CancelScope) -> None:
        """Wait for a signal of ``STOP``, which the caller obeys. Another one cancels ``serving``."""
        self._serving = serving
        await self._asked.wait()


def _tell_stacks(token: trio.lowlevel.TrioToken) -> None:
    """Write what all threads are doing whenever SIGUSR1 comes, also while the loop hangs, and then what its tasks do.

    Not by ``faulthandler.register``: it looks at the frames of threads that run meanwhile, which has ended in SIGSEGV.
    """
    while True:
        signal.sigwait({signal.SIGUSR1})
        names = {thread.ident: thread.name for thread in threading.enumerate()}
        lines = ["threads, asked for by SIGUSR1:\n"]
        for ident, frame in sys._current_frames().items():
            lines += [f"Thread {names.get(ident, ident)}:\n", *traceback.format_stack(frame)]
        with contextlib.suppress(OSError):  # not by the log: a thread that hangs may have its lock
            os.write(2, "".join(lines).encode(errors="backslashreplace"))
        try:
            token.run_sync_soon(lambda: log.info("tasks, asked for by SIGUSR1:\n%s", stacks()))
        except trio.RunFinishedError:
            return


def stacks() -> str:
    """What every task of the event loop is waiting for."""
    lines: list[str] = []
    tasks = [trio.lowlevel.current_root_task()]
    while tasks:
        task = tasks.pop()
        if task is None:
            continue
        lines.append(f"task {task.name}:\n")
        lines += traceback.StackSummary.extract(task.iter_await_frames()).format()
        tasks += [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return "".join(lines).rstrip()
