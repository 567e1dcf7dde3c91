"""What threads do with the descriptors of a file: I/O through the page cache, and syncs. All of it blocks."""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import Final

from cachefsd.backing import syscalls
from cachefsd.backing.ports import BackingStat, Run

MAX_VECTORS: Final = 1024  # UIO_MAXIOV


def stat(fd: int) -> BackingStat:
    """What the engine needs of a stat."""
    status = os.fstat(fd)
    return BackingStat.of(status)


def truncate(fd: int, size: int) -> BackingStat:
    """Cut or extend, and what the file is then."""
    os.ftruncate(fd, size)
    return stat(fd)


def sync(main: int, tail: int, in_page_cache: bool) -> None:
    """fsync the descriptors written through (-1: none): the kernel tells an error to each of them, once."""
    failure: OSError | None = None
    for fd in (main, tail):
        if fd >= 0:
            try:
                os.fsync(fd)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure
    if in_page_cache:
        os.posix_fadvise(main, 0, 0, os.POSIX_FADV_DONTNEED)


def sync_files(opened: Sequence[tuple[int, int]], synced: bool) -> list[BackingStat | OSError]:
    """The job of :meth:`~cachefsd.backing.ports.Backing.finish_files`, for files with the descriptors that each was
    written through (-1: none). Nothing stays in the page cache."""
    results: list[BackingStat | OSError] = []
    for main, tail in opened:
        try:
            if synced:
                for fd in (main, tail):
                    if fd >= 0:
                        syscalls.writeback_error(fd)
                os.posix_fadvise(main, 0, 0, os.POSIX_FADV_DONTNEED)
            else:
                sync(main, tail, in_page_cache=True)
            results.append(stat(main))
        except OSError as error:
            results.append(OSError(error.errno, error.strerror))
    return results


def write_runs_buffered(fd: int, memory: memoryview, size: int, runs: Sequence[Run]) -> list[int]:
    """Write blocks of ``size`` bytes of ``memory``: of each run the number of bytes, or minus the errno."""
    counts = []
    for offset, places in runs:
        views = [memory[place * size : (place + 1) * size] for place in places[:MAX_VECTORS].tolist()]
        try:
            counts.append(os.pwritev(fd, views, offset))
        except OSError as error:
            counts.append(-(error.errno or errno.EIO))
    return counts


def write_buffered(fd: int, offset: int, data: memoryview) -> None:
    """Write all of ``data`` from ``offset`` on."""
    done = 0
    while done < data.nbytes:
        done += os.pwrite(fd, data[done:], offset + done)


def read_buffered(fd: int, offset: int, views: Sequence[memoryview]) -> int:
    """Read from ``offset`` on into ``views``; the number of bytes, which may be less."""
    count = os.preadv(fd, views, offset)
    os.posix_fadvise(fd, offset, count, os.POSIX_FADV_DONTNEED)  # it goes to a cache already
    return count
