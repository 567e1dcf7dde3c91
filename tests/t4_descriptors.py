"""Few descriptors: the next open fails, and everything goes on working for what is open."""

from __future__ import annotations

import errno
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from support_daemon import Daemon, MakeDaemon, make_daemon, wait_until

__all__ = ["make_daemon"]
LIMIT, FILES = 256, 700


def open_descriptors(daemon: Daemon) -> int:
    return len(os.listdir(f"/proc/{daemon.pid}/fd"))


def test_the_next_open_fails_and_no_fsync(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(options=("dirty_age=0.2",), mount=False)
    daemon.start(before=("prlimit", f"--nofile={LIMIT}:{LIMIT}"))
    wait_until(lambda: daemon.is_served_by(daemon.children[-1]), "a daemon that serves")
    at_first = open_descriptors(daemon)
    refused: set[int] = set()

    def attempt(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            refused.add(error.errno or 0)
            return None

    paths = [daemon.path / f"{number}" for number in range(FILES)]
    opened: dict[Path, int] = {}
    try:
        for path in paths:
            fd = attempt(os.open, path, os.O_RDWR | os.O_CREAT)
            if fd is not None:
                opened[path] = fd
        assert refused == {errno.EMFILE}
        assert len(opened) >= 50
        assert set(os.listdir(daemon.path)) == {path.name for path in opened}  # nothing is left of what was refused
        for round_ in range(3):
            for fd in opened.values():
                assert os.pwrite(fd, bytes([round_ + 1]) * 5000, round_ * 5000) == 5000
            if round_ == 1:
                daemon.ask("flush")
            for fd in opened.values():
                os.fsync(fd)
        again = os.open(paths[0], os.O_RDONLY)  # what is open takes no more
        os.close(again)
        for path, fd in opened.items():
            path.unlink()
            assert os.pread(fd, 5000, 10_000) == b"\3" * 5000
            os.fsync(fd)
        assert open_descriptors(daemon) < LIMIT
    finally:
        for fd in opened.values():
            os.close(fd)
    wait_until(lambda: open_descriptors(daemon) <= at_first + 8, "descriptors that are given back")
    paths[0].write_bytes(b"as before")
    assert daemon.ask("status")["writeback"]["errors"] == 0
    daemon.unmount("--flush")
    assert (daemon.backing / "0").read_bytes() == b"as before"
    assert subprocess.run(["ls", daemon.backing], capture_output=True, text=True, check=True).stdout == "0\n"
