"""What was lost, as ``status`` lists it: it is computed from the quarantined slots, so what heals leaves the list."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from .cache import Cache
from .slots import NOBODY, SET_ASIDE


class Loss(NamedTuple):
    """Bytes of a file that read as EIO, until they are overwritten by whole blocks, or cut off."""

    path: str
    start: int
    end: int
    """exclusive"""


def losses(cache: Cache) -> Iterator[Loss]:
    """All that is known of, adjacent blocks together, by file and place."""
    found = (
        (cache.slots.owner[slot], cache.slots.block[slot])
        for slot in cache.slots.quarantined()
        if cache.slots.owner[slot] not in (NOBODY, SET_ASIDE)
    )
    open_: tuple[int, int, int] | None = None
    for file_id, block in sorted(found):
        if open_ is not None and open_[0] == file_id and open_[2] == block:
            open_ = (file_id, open_[1], block + 1)
            continue
        if open_ is not None:
            yield _loss(cache, *open_)
        open_ = (file_id, block, block + 1)
    if open_ is not None:
        yield _loss(cache, *open_)


def unknown_losses(cache: Cache) -> int:
    """Slots whose header was damaged: nobody knows of which file, nor whether they held anything."""
    return sum(cache.slots.owner[slot] == NOBODY for slot in cache.slots.quarantined())


def _loss(cache: Cache, file_id: int, first: int, stop: int) -> Loss:
    file = cache.files.by_id.get(file_id)
    start, end = first << cache.shift, stop << cache.shift
    if file is None:
        return Loss(f"file {file_id}, of which the catalog has no record", start, end)
    return Loss(file.label, start, min(end, max(file.size, start + 1)))
