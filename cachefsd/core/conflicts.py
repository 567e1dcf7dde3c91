"""Files that were changed in the backing while their dirty data waited in the cache.

Neither version is destroyed: the backing's keeps its name, and the cache's becomes a file of its own beside it. Here is
the list of those that a person has yet to choose from. Each entry is durable in the catalog, together with the change
that it tells of.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from datetime import UTC, datetime

from ..media.ports import Catalog, CatalogError

PREFIX = "conflict/"
_NAME_MAX = 255
_MARK = b".cachefsd-conflict-"


@dataclass(frozen=True, slots=True)
class Conflict:
    """One file of which there are two versions."""

    file_id: int
    """of the cache's version"""
    path: str
    """where the backing's version is or was, from the root, as far as known"""
    copy: str
    """where the cache's version is"""
    since: str
    """UTC"""
    why: str
    """``changed`` or ``removed``"""
    handle: str
    """of the backing's version, in hexadecimal digits"""
    size: int
    """in bytes, of the cache's version when the two were parted"""

    @property
    def key(self) -> str:
        """Its setting in the catalog."""
        return f"{PREFIX}{self.file_id}"

    def encode(self) -> bytes:
        """The value of that setting."""
        return json.dumps(asdict(self)).encode()


def load(catalog: Catalog) -> dict[int, Conflict]:
    """All conflicts of a catalog, by file id.

    :raises CatalogError: the catalog can't be read, or one of them.
    """
    found = {}
    for name, value in catalog.settings(PREFIX).items():
        try:
            conflict = Conflict(**json.loads(value))
            bytes.fromhex(conflict.handle)
            numbers = int(conflict.file_id), int(conflict.size)
        except (ValueError, TypeError) as error:
            raise CatalogError(f"the conflict {name!r} in the catalog is damaged") from error
        if name != conflict.key or min(numbers) < 0:
            raise CatalogError(f"the conflict {name!r} in the catalog is damaged")
        found[conflict.file_id] = conflict
    return found


def copy_name(name: bytes, now_ns: int) -> bytes:
    """What the cache's version of the file ``name`` is called, before a number is put behind it."""
    day = datetime.fromtimestamp(now_ns / 1e9, UTC).strftime("%Y%m%d").encode()
    return name[: _NAME_MAX - len(_MARK) - len(day) - 12] + _MARK + day


def when(now_ns: int) -> str:
    """The time, for people."""
    return datetime.fromtimestamp(now_ns / 1e9, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def same_file(size: int, mtime_ns: int, seen_size: int, seen_mtime_ns: int) -> bool:
    """Whether a backing file was left alone: it was left with the first size and time, and is seen with the second.

    File systems may keep times less exactly than they tell them while the inode is in memory.
    """
    if size != seen_size:
        return False
    return any(mtime_ns - mtime_ns % grain == seen_mtime_ns for grain in (1, 100, 1000, 10**6, 10**7, 10**9, 2 * 10**9))
