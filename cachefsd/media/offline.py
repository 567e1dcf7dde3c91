"""A look at a cache that changes nothing: no lock, no mode, no repair. A daemon may use it meanwhile.

What a daemon is changing at that moment may be seen half done: the numbers are then of about now.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from cachefsd.errors import UserError
from cachefsd.media.catalog import peek_paths
from cachefsd.media.poolfile import POOL
from cachefsd.media.poolreader import Counts, open_readonly
from cachefsd.media.ports import CatalogError
from cachefsd.media.superblock import Superblock


@dataclass(slots=True)
class Look:
    """What a cache holds, and who uses it."""

    pool: Path
    """the file, or the device"""
    superblock: Superblock
    slots: Counts
    used_by: int | None = None
    """the process that has locked the pool"""


def look(cache: Path, deadline: float | None = None) -> Look:
    """Look at the cache in the directory ``cache``; not longer than until ``deadline``, of ``time.monotonic``.

    :raises UserError: there is none, or it cannot be read.
    """
    with open_readonly(cache) as pool:
        try:
            used_by = _locked_by(cache / POOL)
            return Look(Path(pool.place), pool.superblock, pool.count(deadline), used_by)
        except OSError as error:
            raise UserError(f"{cache / POOL}: can't read the pool: {error.strerror}") from error


def paths_of(cache: Path, found: Look) -> dict[int, bytes]:
    """The paths of the files with dirty slots, as the catalog knows them; none of it while a daemon uses it."""
    if found.used_by is not None:
        return {}
    with suppress(CatalogError):
        return peek_paths(cache, found.superblock.pool_uuid, set(found.slots.dirty_files))
    return {}


def _locked_by(path: Path) -> int | None:
    """The process that has locked the pool. To try the lock would keep a daemon from it that starts right now."""
    status = path.lstat()
    place = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    with suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            _, kind, _, access, pid, where, *_ = line.replace("->", "").split()
            if (kind, access, where) == ("FLOCK", "WRITE", place):
                return int(pid)
    return None
