"""Making a cache, and what must be known before one is thrown away."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cachefsd.errors import ForeignError, InUseError, UnfinishedError, UserError
from cachefsd.media.cachedir import PrivateDirectory
from cachefsd.media.catalog import create_catalog, remove_catalog
from cachefsd.media.medium import DeviceMedium
from cachefsd.media.pool import MappedPool, attach, open_pool
from cachefsd.media.poolfile import POOL, PoolInfo, Progress, create_pool, erase, is_unused, plan_pool
from cachefsd.media.ports import CatalogError, SlotState
from cachefsd.media.superblock import DATA_ALIGNMENT

_SCAN_SLOTS = 1 << 18


@dataclass(frozen=True, slots=True)
class Content:
    """What an existing cache holds."""

    dirty: int
    """blocks that only the cache has, and blocks of which nobody knows"""
    clean: int
    block_size: int
    backing: str

    def __str__(self) -> str:
        size = self.dirty * self.block_size / 2**20
        return f"{self.dirty} dirty blocks ({size:,.1f} MiB) of {self.backing}"


MayReplace = Callable[[Path, Content | UserError], None]
"""Called with a place, a cache's directory or a device, and what it holds, or else why nobody can tell; raises an
exception to keep that. A :class:`ForeignError`: it is nothing of cachefsd's."""


def exists(cache: Path) -> bool:
    """Whether there is a pool in the directory ``cache``, be it one that was never finished."""
    return os.path.lexists(cache / POOL)


def contents(pool: MappedPool) -> Content:
    """Count what the headers of a pool say."""
    dirty = clean = 0
    for first in range(0, pool.slots, _SCAN_SLOTS):
        headers = pool.scan(first, min(_SCAN_SLOTS, pool.slots - first))
        doubtful = headers.malformed | headers.unreadable
        kept = (headers.state == SlotState.DIRTY) | (headers.state == SlotState.QUARANTINED)
        dirty += int(np.count_nonzero(doubtful | kept))
        clean += int(np.count_nonzero((headers.state == SlotState.CLEAN) & ~doubtful))
    backing = os.fsdecode(pool.path_hint) or "a backing without a name"
    return Content(dirty, clean, pool.block_size, backing)


def format_cache(
    cache: Path,
    size: int | None,
    block_size: int,
    *,
    device: Path | None = None,
    volatile: bool,
    progress: Progress | None,
    may_replace: MayReplace | None,
) -> PoolInfo | None:
    """Make the directory ``cache`` a cache of ``size`` bytes, with its pool in it or on ``device``.

    ``may_replace`` decides about what is there already, in the directory and on the device. Without it, a cache that is
    there is left as it is, and None returned.

    :raises UserError: it can't be done. An older cache is unharmed unless ``may_replace`` has agreed.
    """
    plan_pool(size, block_size, device)  # before anything is removed for it
    try:
        with PrivateDirectory.create(cache) as directory:
            directory.lock()  # all the time: of two that format at once, one would remove what the other has made
            if directory.has(POOL):
                if may_replace is None:
                    return None
                _remove(directory, may_replace)
            if device is not None and may_replace is not None:
                _clear(device, may_replace)
            info = create_pool(cache, size, block_size, device=device, volatile=volatile, progress=progress)
            create_catalog(cache, info.uuid, info.slots)
            return info
    except CatalogError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{cache}: can't make the cache: {error.strerror}") from error


def _remove(directory: PrivateDirectory, may_replace: MayReplace) -> None:
    """Remove the cache, if it may be.

    The pool goes first, and while its lock is held: a catalog alone is nothing, wherever a crash comes.
    """
    try:
        pool = open_pool(directory.path, volatile=True, replacing=True)
    except (InUseError, ForeignError):
        raise
    except UnfinishedError:
        os.unlink(POOL, dir_fd=directory.fd)
    except UserError as error:
        may_replace(directory.path, error)
        os.unlink(POOL, dir_fd=directory.fd)
    else:
        with pool:
            may_replace(directory.path, contents(pool))
            pool.abandon()
            os.unlink(POOL, dir_fd=directory.fd)
    remove_catalog(directory)
    directory.sync()


def _clear(device: Path, may_replace: MayReplace) -> None:
    """Remove what is on a device, if it may be: a pool whose cache is elsewhere or lost, or something else."""
    with contextlib.ExitStack() as undo:
        medium = undo.enter_context(contextlib.closing(DeviceMedium(device)))
        try:
            pool = attach(medium, undo)
        except UnfinishedError:
            if is_unused(medium, DATA_ALIGNMENT):
                return
            may_replace(device, ForeignError(f"{device}: this is not a pool of cachefsd"))
        except UserError as error:
            may_replace(device, error)
        else:
            with pool:
                may_replace(device, contents(pool))
                pool.abandon()
            return
        erase(medium)
