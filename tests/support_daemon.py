"""Real daemons for tests: started by the command line, killed, started again, and gone in every outcome."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cachefsd.errors import UserError
from cachefsd.fuse import mounts
from cachefsd.service import control

ROOT = Path(__file__).parent.parent
PATIENCE_S = float(os.environ.get("CACHEFSD_PATIENCE_S") or 180)
"""for what takes a second, on a machine that does much else"""


def cachefsd(*arguments: str | os.PathLike[str], check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user does."""
    done = subprocess.run(
        [sys.executable, "-m", "cachefsd", *arguments],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def mounts_at(mountpoint: Path) -> list[mounts.MountEntry]:
    """All mounts there, also those beneath others."""
    return [entry for entry in mounts.mounts() if entry.mountpoint == os.fspath(mountpoint)]


@contextlib.contextmanager
def watched(read: Callable[[], object]) -> Iterator[set[object]]:
    """What a program sees that reads all the time: what ``read`` returns, and errnos."""
    found: set[object] = set()
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            try:
                found.add(read())
            except OSError as error:
                found.add(error.errno)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join(PATIENCE_S)


def wait_until(condition: Callable[[], bool], what: str, *, pause_s: float = 0.01) -> None:
    """Poll, for things that only other processes can tell."""
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {PATIENCE_S} s"
        time.sleep(pause_s)


def is_gone(pid: int) -> bool:
    """Whether a process has ended, with all its threads and descriptors; one that nobody has waited for, too."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state == "Z" and len(os.listdir(f"/proc/{pid}/task")) == 1
    except (FileNotFoundError, ProcessLookupError):
        return True


class Daemon:
    """One backing, one cache, and at most one daemon over them."""

    def __init__(
        self, backing: Path, cache: Path, mountpoint: Path, size: str, options: tuple[str, ...], volatile: bool
    ) -> None:
        self.backing = backing
        self.cache = cache
        self.mountpoint = mountpoint
        self.options = options
        self._size = size
        self._volatile = volatile
        self.pid = 0
        self.children: list[subprocess.Popen[bytes]] = []

    @property
    def path(self) -> Path:
        """Where the files are seen through the cache."""
        return self.mountpoint

    def mount(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Mount in the background; returns when it serves."""
        done = cachefsd(*self.mount_words(), *arguments)
        self.pid = self.status()["pid"]
        return done

    def mount_words(self) -> list[str]:
        words = ["mount", os.fspath(self.backing), os.fspath(self.mountpoint)]
        words += ["--cache", os.fspath(self.cache), "--size", self._size]
        words += [word for option in self.options for word in ("-o", option)]
        return words + ["--volatile"] * self._volatile

    # ---- as a child of this process: a third of the time, and it can be killed before it serves

    def start(self, *, before: tuple[str, ...] = ()) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground, and do not wait; ``before`` are words of a command that runs it."""
        return self.run([*before, sys.executable, "-m", "cachefsd", *self.words()])

    def words(self) -> list[str]:
        """What a daemon in the foreground is started with."""
        return [*map(str, self.mount_words()), "--foreground"]

    def run(self, command: list[str]) -> subprocess.Popen[bytes]:
        """Run a command that becomes this daemon, and do not wait."""
        with self.stderr.open("ab") as log:
            child = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | {"PYTHONPATH": str(ROOT)},
            )
        self.children.append(child)
        self.pid = child.pid
        return child

    @property
    def stderr(self) -> Path:
        """What daemons said that :meth:`start` has started."""
        return self.cache.parent / "stderr"

    def ask(self, command: str) -> Any:
        """Send ``status`` or ``flush`` to the daemon, without the command line."""
        return control.ask(self.mountpoint, command)

    def is_served_by(self, child: subprocess.Popen[bytes]) -> bool:
        """Whether this child of :meth:`start` serves by now."""
        try:
            return bool(self.ask("status")["pid"] == child.pid)
        except UserError:
            return False

    def start_and_wait(self) -> subprocess.Popen[bytes]:
        """Start a daemon in the foreground; returns when it serves."""
        child = self.start()

        def serves() -> bool:
            assert child.poll() is None, f"the daemon has ended: {self.stderr.read_text()[-4000:]}"
            return self.is_served_by(child)

        wait_until(serves, "a daemon that serves")
        return child

    def status(self) -> dict[str, Any]:
        result: dict[str, Any] = json.loads(cachefsd("status", self.mountpoint, "--json").stdout)
        return result

    def flush(self) -> None:
        cachefsd("flush", self.mountpoint)

    def unmount(self, *arguments: str) -> None:
        cachefsd("unmount", *arguments, self.mountpoint)
        self.pid = 0

    def kill(self) -> None:
        """kill -9, and wait until it is dead. The dead mount stays."""
        os.kill(self.pid, signal.SIGKILL)
        wait_until(lambda: is_gone(self.pid), "the daemon's death")
        self.pid = 0

    def kill_and_mount(self) -> None:
        """A crash of the daemon, and its next start."""
        self.kill()
        self.mount()

    def remount(self) -> None:
        """An orderly end, and the next start."""
        self.unmount()
        self.mount()

    def log(self) -> str:
        path = self.cache / "cachefsd.log"
        return path.read_text() if path.exists() else ""

    def is_mounted(self) -> bool:
        """Whether there is a FUSE file system on the mount point, dead or alive."""
        entry = mounts.find_mount(self.mountpoint)
        return entry is not None and entry.fstype.startswith("fuse")

    def abort(self) -> None:
        """Break the connection of the mount, if there is one: who waits for an answer gets an error."""
        if self.is_mounted():
            # What writing to /sys/fs/fuse/connections/N/abort does, also where that is not mounted.
            force = ["umount", "--force", "--lazy", "--internal-only", "--no-canonicalize", self.mountpoint]
            subprocess.run(force, check=False, capture_output=True)

    def destroy(self) -> None:
        """End the daemon and take the mount off, whatever state they are in."""
        if self.pid:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            # A thread that waits for the backing keeps a killed process; the connection goes now.
            self.abort()
            wait_until(lambda: is_gone(self.pid), "the daemon's death")
        for child in self.children:
            child.kill()
            child.wait()
        while self.is_mounted():
            mounts.detach_dead(self.mountpoint)


MakeDaemon = Callable[..., Daemon]


@contextlib.contextmanager
def daemons(base: Path) -> Iterator[MakeDaemon]:
    """A function that makes daemons with their directories below ``base``; all are gone afterwards.

    By default they are mounted, with a cache of class ram. ``backing``: a directory (default: a new one); ``over``:
    mount over the backing itself; ``disk``: a cache of class disk; ``size``; ``options``: for -o; ``mount``: False to
    leave it unmounted.
    """
    with contextlib.ExitStack() as undo:

        def make(
            backing: Path | None = None,
            *,
            over: bool = False,
            disk: bool = False,
            size: str = "64M",
            options: tuple[str, ...] = (),
            mount: bool = True,
        ) -> Daemon:
            place = base / f"daemon-{len(list(base.iterdir()))}"
            place.mkdir()
            if backing is None:
                backing = place / "backing"
                backing.mkdir()
            mountpoint = backing if over else place / "mnt"
            mountpoint.mkdir(exist_ok=True)
            cache = place / "cache"
            if not disk:
                cache = Path(undo.enter_context(tempfile.TemporaryDirectory(dir="/dev/shm"))) / "cache"
            daemon = Daemon(backing, cache, mountpoint, size, options, not disk)
            undo.callback(daemon.destroy)
            if mount:
                daemon.mount()
            return daemon

        yield make


@pytest.fixture
def make_daemon(tmp_path: Path) -> Iterator[MakeDaemon]:
    """See :func:`daemons`."""
    with daemons(tmp_path) as make:
        yield make


@contextlib.contextmanager
def public_directory() -> Iterator[Path]:
    """A temporary directory that every user can reach, unlike those of pytest."""
    with tempfile.TemporaryDirectory(prefix="cachefsd-test-") as name:
        os.chmod(name, 0o755)
        yield Path(name)
