"""A memory cgroup of a test's own, of either version."""

from __future__ import annotations

import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path("/sys/fs/cgroup")
PATIENCE_S = 180


class MemoryCgroup:
    """A limit on the memory of the processes in it, page cache included. Sizes are in bytes."""

    def __init__(self, path: Path) -> None:
        self._path = path
        v2 = (path / "memory.max").exists()
        self._limit = path / ("memory.max" if v2 else "memory.limit_in_bytes")
        self._usage = path / ("memory.current" if v2 else "memory.usage_in_bytes")
        self._events = path / ("memory.events" if v2 else "memory.oom_control")

    @property
    def entering(self) -> tuple[str, ...]:
        """Words before a command that runs it in the cgroup."""
        return ("/bin/sh", "-c", f'echo $$ > {self._path}/cgroup.procs && exec "$@"', "sh")

    @property
    def usage(self) -> int:
        return int(self._usage.read_text())

    @property
    def anonymous(self) -> int:
        """What cannot be dropped or written to a file."""
        stat = dict(line.split() for line in (self._path / "memory.stat").read_text().splitlines())
        return int(stat.get("anon", stat.get("rss", 0)))

    @property
    def oom_kills(self) -> int:
        events = dict(line.split() for line in self._events.read_text().splitlines())
        return int(events["oom_kill"])

    def limit(self, size: int) -> None:
        self._limit.write_text(f"{size}")


def _parent() -> Path | None:
    """A directory in which memory cgroups can be made."""
    v1 = ROOT / "memory"
    if v1.is_dir():
        return v1
    if "memory" in (ROOT / "cgroup.subtree_control").read_text().split():
        return ROOT
    return None


@contextmanager
def memory_cgroup() -> Iterator[MemoryCgroup]:
    """A new cgroup; its processes must have ended at the end of the block."""
    try:
        parent = _parent()
    except OSError as error:
        pytest.skip(f"no memory cgroups: {error}")
    if parent is None:
        pytest.skip("the memory controller is not available")
    path = parent / f"cachefsd-test-{os.getpid()}"
    try:
        path.mkdir()
    except OSError as error:
        pytest.skip(f"no cgroup can be made: {error}")
    try:
        cgroup = MemoryCgroup(path)
        if subprocess.run([*cgroup.entering, "true"], check=False).returncode != 0:
            pytest.skip("no process can be put into a memory cgroup")
        yield cgroup
    finally:
        deadline = time.monotonic() + PATIENCE_S
        while True:  # a process that has ended leaves its cgroup a little later
            with contextlib.suppress(OSError):
                path.rmdir()
            if not path.exists() or time.monotonic() > deadline:
                break
            time.sleep(0.05)
