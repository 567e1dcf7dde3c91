"""What is measured: file systems, each served by a command, on a disk of its own."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from bench.disks import Absent, Disk, loop_disk, machine_disk, memory
from cachefsd.fuse import mounts
from cachefsd.service import control

BENCH = Path(__file__).parent
MOUNT_TIMEOUT_S = 120
STOP_TIMEOUT_S = 120
NULL_MIB = 2048
"""of the one file that the null file system has"""


@dataclass(frozen=True)
class Candidate:
    """A command that stays in the foreground and serves a file system; no command: a directory as it is.

    In ``command``, ``{mnt}``, ``{disk}`` and ``{memory}`` stand for empty directories: to mount on, on the
    disk, and on tmpfs. ``loop_mib``: the disk is a loop device of that size, else it is the machine's.
    """

    name: str
    command: tuple[str, ...] = ()
    loop_mib: int | None = None
    direct: bool = True
    """whether it takes O_DIRECT"""
    checks: str | None = None
    """for cachefsd: which are on"""

    def on_loop(self, size_mib: int, suffix: str = "") -> Candidate:
        """The same on a loop device, which can be made slow."""
        return replace(self, name=self.name + suffix, loop_mib=size_mib)

    @property
    def is_own(self) -> bool:
        return self.checks is not None


NATIVE = Candidate("native")
"""ext4, or whatever the disk has"""


def null(loop: str) -> Candidate:
    """The null file system with one of the two request loops."""
    words = (sys.executable, str(BENCH / "nullfs.py"), "--loop", loop, "--size-mib", str(NULL_MIB), "{mnt}")
    return Candidate(f"null+{loop}", words)


CEILING = null("pump")


PATCHES = {
    None: "checksums on",
    "no-checksums": "checksums off",
    "pmem": "checksums on; memory of this machine with the primitives of that class",
}
"""What bench/patched.py can do to cachefsd, and how the report calls it."""


def own(name: str = "cachefsd", *, size_mib: int = 1024, options: str = "", patch: str | None = None) -> Candidate:
    """cachefsd, its cache on tmpfs, so that no disk is in the figure."""
    start = ("-m", "bench.patched", patch) if patch else ("-m", "cachefsd")
    words = (sys.executable, *start, "mount", "{disk}", "{mnt}", "--foreground")
    words += ("--cache", "{memory}/cache", "--size", f"{size_mib}M", "--volatile")
    words += ("-o", options) if options else ()
    return Candidate(name, words, checks=PATCHES[patch])


# Without the option it drops O_DIRECT.
BINDFS = Candidate("bindfs", ("bindfs", "-f", "--forward-odirect=4096", "{disk}", "{mnt}"))
# Its buffers are not aligned: beneath a write with O_DIRECT is refused.
MERGERFS = Candidate("mergerfs", ("mergerfs", "-f", "{disk}", "{mnt}"), direct=False)
RCLONE = Candidate(
    "rclone",
    (
        *("rclone", "mount", "{disk}", "{mnt}", "--vfs-cache-mode", "full", "--cache-dir", "{memory}/cache"),
        *("--config", "{memory}/none"),
    ),
)


@dataclass
class Served:
    """A candidate that is served: where its files are, what is beneath, and who serves."""

    candidate: Candidate
    directory: Path
    """where its files are"""
    disk: Disk
    memory: Path
    mountpoint: Path
    daemon: subprocess.Popen[bytes] | None

    def file(self, size_mib: int, name: str = "file") -> Path:
        """A file of that size at least, written from beginning to end if it is not there, and settled.

        Extending a file is another question, and the kernel does that one by one.
        """
        path = self.directory / name
        if not path.exists() or path.stat().st_size < size_mib << 20:
            piece = os.urandom(1 << 20)
            with path.open("wb", buffering=0) as output:
                for _ in range(size_mib):
                    output.write(piece)
            self.settle()
        return path

    def settle(self) -> None:
        """Everything that is dirty to the disk: so that it is not written while something is measured."""
        if self.candidate.is_own:
            subprocess.run(["sync", "--file-system", self.mountpoint], check=True)
            control.ask(self.mountpoint, "flush")
        self.disk.sync()

    @property
    def status(self) -> dict[str, Any]:
        """Of a cachefsd."""
        answer: dict[str, Any] = control.ask(self.mountpoint, "status")
        return answer

    @cached_property
    def about(self) -> str:
        """What it promises, for the report."""
        if not self.candidate.is_own:
            return ""
        return f"class {self.status['durability']}, {self.candidate.checks}"


def anonymous_bytes(pid: int) -> int:
    """Memory of a process in which no file is mapped."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssAnon:")[2].split()[0]) << 10


def require(candidate: Candidate) -> None:
    """:raises Absent: its program is not installed."""
    if candidate.command and shutil.which(candidate.command[0]) is None:
        raise Absent(f"{candidate.command[0]} is not installed")


@contextlib.contextmanager
def served(candidate: Candidate, base: Path) -> Iterator[Served]:
    """Serve ``candidate`` afresh, on a disk of its own in ``base``; nothing of it is left afterwards."""
    require(candidate)
    with contextlib.ExitStack() as undo:
        size = candidate.loop_mib
        disk = undo.enter_context(machine_disk(base) if size is None else loop_disk(base, size))
        mountpoint = undo.enter_context(tempfile.TemporaryDirectory(prefix="bench-mnt-", dir=base))
        places = {"disk": disk.directory, "mnt": Path(mountpoint), "memory": undo.enter_context(memory(base))}
        if candidate.command:
            command = [part.format_map(places) for part in candidate.command]
            daemon = undo.enter_context(running(command, places["mnt"]))
            yield Served(candidate, places["mnt"], disk, places["memory"], places["mnt"], daemon)
        else:
            yield Served(candidate, disk.directory, disk, places["memory"], places["mnt"], None)


@contextlib.contextmanager
def running(command: list[str], mountpoint: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run a command that mounts, from when it has until the end of the block; its mount goes with it."""
    with tempfile.TemporaryFile() as output:
        # As it starts everywhere else: from modules that are compiled already.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        daemon = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, cwd=BENCH.parent, env=environment
        )
        try:
            deadline = time.monotonic() + MOUNT_TIMEOUT_S
            while not _answers(mountpoint):
                if daemon.poll() is not None or time.monotonic() > deadline:
                    output.seek(0)
                    raise RuntimeError(f"{command} did not mount: {output.read().decode(errors='replace')}")
                time.sleep(0.002)
            yield daemon
        finally:
            daemon.terminate()
            try:
                daemon.wait(STOP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
            while mounts.find_mount(mountpoint) is not None:
                mounts.detach_dead(mountpoint)


def _answers(mountpoint: Path) -> bool:
    """Whether there is a mount, and somebody serves it."""
    if mounts.find_mount(mountpoint) is None:
        return False
    try:
        (mountpoint / f"no-such-name-{time.monotonic_ns()}").stat()  # of others the kernel may know
    except FileNotFoundError:
        return mounts.find_mount(mountpoint) is not None  # what there was may have been taken off meanwhile
    except OSError as error:
        if error.errno != errno.ENOTCONN:  # that of a daemon that was killed before
            raise
    return False
