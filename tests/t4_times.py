"""Times on real file systems: what a mount says at once is what it says after a remount, and what the backing has."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cffi
import pytest
from support_daemon import MakeDaemon, make_daemon
from support_fs import loop_mounted

__all__ = ["make_daemon"]
NS = 10**9
YEARS = {  # seconds since the epoch
    1850: -3_786_825_600,
    1901: -(1 << 31),
    1901.5: -(1 << 31) - 1,
    1969: -1,
    1970: 0,
    1999: 923_456_789,
    2038: (1 << 31) - 1,
    2039: 1 << 31,
    2262: 9_223_372_036,
    2263: 9_223_372_037,
    2300: 10_413_792_000,
    2446: 15_032_385_535,
    2447: 15_032_385_536,
    2486: 16_299_260_425,
    2500: 16_725_225_600,
}
FRACTION_NS = 123_456_789
SYSTEMS = {
    "ext4": ("ext4", ()),
    "ext4 with small inodes": ("ext4", ("-I", "128")),
    "xfs": ("xfs", ()),
    "xfs up to 2038": ("xfs", ("-m", "bigtime=0")),
    "btrfs": ("btrfs", ()),
}


@pytest.mark.parametrize("system", SYSTEMS)
def test_what_is_seen_at_once_stays(make_daemon: MakeDaemon, tmp_path: Path, system: str) -> None:
    kind, mkfs = SYSTEMS[system]
    with ExitStack() as undo:
        backing = undo.enter_context(loop_mounted(kind, tmp_path, options=mkfs))
        daemon = make_daemon(backing, options=("dirty_age=3600",))
        undo.callback(daemon.unmount)
        seen: dict[str, int] = {}
        for year, seconds in YEARS.items():
            for state in ("dirty", "clean", "dirty, with atime", "new"):
                path = daemon.path / f"{year} {state}"
                path.write_bytes(b"x" * 5000)
                if state == "clean":
                    with path.open("rb") as file:
                        os.fsync(file.fileno())
                    os.truncate(path, 0)
                ns = seconds * NS + FRACTION_NS
                if state == "dirty, with atime":
                    os.utime(path, ns=(ns, ns))
                elif state != "new":
                    set_mtime_only(path, ns)
                seen[path.name] = path.stat().st_mtime_ns
        daemon.unmount()
        daemon.mount()
        assert {name: (daemon.path / name).stat().st_mtime_ns for name in seen} == seen
        daemon.flush()
        assert {name: (daemon.path / name).stat().st_mtime_ns for name in seen} == seen
        daemon.unmount()
        assert {name: (backing / name).stat().st_mtime_ns for name in seen} == seen
        daemon.mount()
        assert {name: (daemon.path / name).stat().st_mtime_ns for name in seen} == seen
        assert all((daemon.path / name).read_bytes()[:1] in (b"x", b"") for name in seen)


def set_mtime_only(path: Path, ns: int) -> None:
    """utimensat with UTIME_OMIT for the access time, as ``touch -m`` does it."""
    ffi = cffi.FFI()
    ffi.cdef(
        "struct timespec { long sec; long nsec; }; "
        "int utimensat(int dir, const char *path, const struct timespec times[2], int flags);"
    )
    times = ffi.new("struct timespec[2]", [(0, (1 << 30) - 2), divmod(ns, NS)])
    libc: Any = ffi.dlopen(None)
    if libc.utimensat(-100, os.fsencode(path), times, 0):
        raise OSError(ffi.errno, os.strerror(ffi.errno))
