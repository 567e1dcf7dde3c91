"""What a daemon does to its own process: limits, log, and leaving the terminal."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import json
import logging
import logging.handlers
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from typing import Any

from cachefsd import reaper
from cachefsd.backing import syscalls
from cachefsd.errors import UserError
from cachefsd.media.cachedir import PrivateDirectory
from cachefsd.service.signals import stopping_raises

log = logging.getLogger(__name__)
LOG = "cachefsd.log"
_LOG_BYTES = 1 << 20
_SIGNAL_STACK = 1 << 20  # 64 signals
_FORMAT = "%(asctime)s %(levelname)s %(message)s"


def open_standard_descriptors() -> None:
    """Open those of the descriptors 0, 1 and 2 that are closed, on /dev/null; before anything else is opened.

    What is opened later would get their numbers, and then what is meant for a terminal.
    """
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        try:
            os.fstat(number)
        except OSError:
            fd = os.open(os.devnull, os.O_RDWR)
            if fd != number:  # a thread has opened something meanwhile
                os.dup2(fd, number)
                os.close(fd)
            os.set_inheritable(number, True)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115


def print_anything() -> None:
    """Let standard output and standard error take any text: what they cannot encode is shown as escapes."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def harden() -> None:
    """Be fit to serve a file system: enough descriptors, memory when it is short, no umask, no directory.

    What takes privileges that the user has not got is left as it is.
    """
    faulthandler.enable()  # stacks to standard error: the watchdog of a service manager sends SIGABRT
    # Handlers run on a stack that faulthandler has made small. Signals that come together interrupt each other's
    # handlers, at 3 to 12 KiB each: 13 of them ended the process.
    syscalls.set_signal_stack(_SIGNAL_STACK)
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    reaper.protect_from_oom_killer()
    with contextlib.suppress(OSError):
        syscalls.set_io_flusher()
    os.umask(0)
    os.chdir("/")


def log_to_terminal() -> None:
    """Log to standard error."""
    logging.basicConfig(level=logging.INFO, format=_FORMAT)


class _PrivateLog(logging.handlers.RotatingFileHandler):
    """A log of bounded size in a directory that stays open."""

    def __init__(self, directory: PrivateDirectory) -> None:
        self._directory = directory
        super().__init__(directory.within(LOG), maxBytes=_LOG_BYTES, backupCount=1)

    def _open(self) -> io.TextIOWrapper:
        return open(_open_log(self._directory), "a", encoding="utf-8", errors="backslashreplace")


def _open_log(directory: PrivateDirectory) -> int:
    return directory.open_file(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


def log_to_file(directory: PrivateDirectory) -> None:
    """Log to a file of bounded size in that directory, which stays open."""
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=[_PrivateLog(directory)])


def leave_terminal(directory: PrivateDirectory) -> None:
    """Send to the log what libraries and the interpreter say from now on."""
    fd = _open_log(directory)
    for number in (1, 2):
        os.dup2(fd, number)
    os.close(fd)


def is_background() -> bool:
    """Whether :func:`start_in_background` has started this process."""
    return reaper.READY_FD in os.environ


def tell_parent(**message: Any) -> None:
    """Report to the process that has started this one in the background; once."""
    fd = os.environ.pop(reaper.READY_FD, "")
    if fd.isdigit():
        with contextlib.suppress(OSError), os.fdopen(int(fd), "w") as pipe:
            json.dump(message, pipe)


def start_in_background(arguments: list[str], show: Callable[[str], None]) -> None:
    """Run ``cachefsd`` with ``arguments`` apart from this terminal; return once it says that it serves.

    ``show`` is given lines for the user.

    :raises UserError: what the daemon says has gone wrong; it is then gone.
    """
    reader, writer = os.pipe()
    daemon: subprocess.Popen[str] | None = None
    with os.fdopen(reader) as pipe, stopping_raises():
        # An exception within Popen would leave a daemon that nobody knows. `reaper.stay_behind` lets the daemon hear
        # the signals again.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, reaper.INTERRUPTS)
        try:
            try:
                daemon = subprocess.Popen(
                    # -P: whatever is called cachefsd in the current directory is not run.
                    [sys.executable, "-P", "-m", "cachefsd", *arguments],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    env=os.environ | {reaper.READY_FD: str(writer)},
                    pass_fds=[writer],
                    start_new_session=True,
                    text=True,
                    errors="backslashreplace",
                )
            finally:
                os.close(writer)
                signal.pthread_sigmask(signal.SIG_SETMASK, before)  # raises what has come meanwhile
            said = pipe.read()
            message = json.loads(said) if said else None
            serves = message is not None and "error" not in message
            if serves:
                # It serves: to interrupt what is left of the command would leave a mount behind a failure.
                signal.pthread_sigmask(signal.SIG_BLOCK, reaper.INTERRUPTS)
        except BaseException:
            if daemon is not None:
                _give_up(daemon)
            raise
    if message is not None:
        for note in message.get("notes", []):
            show(note)
        if serves:
            assert daemon.stderr is not None
            daemon.stderr.close()
            return
        daemon.communicate()
        raise UserError(message["error"])
    _, errors = daemon.communicate()
    last = errors.strip().splitlines()[-1:] or ["it said nothing"]
    raise UserError(f"the daemon has ended with status {daemon.returncode}: {last[0]}")


def _give_up(daemon: subprocess.Popen[str]) -> None:
    """End a daemon that nobody waits for any more: in order, or, if that is interrupted as well, at once.

    ``daemon`` is its parent (:mod:`cachefsd.reaper`), which hands on SIGTERM. Both are a group of processes.
    """
    daemon.terminate()
    try:
        daemon.communicate()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(daemon.pid, signal.SIGKILL)
        daemon.communicate()
