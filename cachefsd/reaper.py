"""The parent of a daemon in the background: it waits for the daemon, and does nothing else.

Without it, a daemon that was killed stays a zombie until process 1 collects it. Some of those that run as process 1 in
a container do that late, or never. Whoever looks at the daemon's pid would take it for alive.

It imports only what the interpreter has loaded anyway, and forks before the daemon imports anything: it stays small.
"""

from __future__ import annotations

import contextlib
import os
import signal
from typing import Final

READY_FD: Final = "CACHEFSD_READY_FD"
"""The environment variable that is set for a daemon in the background: the descriptor to report readiness to."""
INTERRUPTS: Final = {signal.SIGINT, signal.SIGTERM}
"""What interrupts a command. They are blocked when it starts the daemon."""
OOM_SCORE: Final = -900
"""For the daemon and its parent: dirty data is lost only with the media, but a killed daemon is a dead mount."""


def stay_behind() -> None:
    """Fork. The child returns, and is the daemon. The parent ends when the child has, with the same exit status.

    A child that was ended by signal n gives 128 + n. Where there can be no other process, the only one returns.
    """
    starter = os.getppid()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
    try:
        child = os.fork()
    except OSError:
        child = 0
    if child:
        status = 1
        try:
            status = _wait(child, starter)
        finally:
            os._exit(status)
    signal.pthread_sigmask(signal.SIG_SETMASK, before - INTERRUPTS)


def protect_from_oom_killer() -> None:
    """Be among the last that the kernel kills for memory, if the user may ask for that."""
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/oom_score_adj", os.O_WRONLY)
        try:
            os.write(fd, b"%d\n" % OOM_SCORE)
        finally:
            os.close(fd)


def _wait(child: int, starter: int) -> int:
    """Wait for the child to end; its exit status. All signals are blocked."""
    _keep_nothing_busy()
    protect_from_oom_killer()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # if it was ignored, there would be no status
    awaited = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT}
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        got = signal.sigwaitinfo(awaited)
        # Only the command that has started us, and only while it waits. What is meant for a group of processes reaches
        # the daemon by itself, and a second SIGTERM would cut its orderly end short.
        if got.si_signo != signal.SIGCHLD and got.si_pid == starter == os.getppid():
            os.kill(child, got.si_signo)


def _keep_nothing_busy() -> None:
    """Let go of the terminal, of pipes, and of the file system of the current directory."""
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    os.chdir("/")
    with contextlib.suppress(OSError):
        fd = os.open("/proc/self/comm", os.O_WRONLY)
        os.write(fd, b"cachefsd-parent")  # at most 15 bytes
        os.close(fd)
