"""Making a cache, and what must be known before one is thrown away."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from cachefsd.errors import ConfigError, ForeignError, InUseError, UnfinishedError, UserError
from cachefsd.media.cachedir import LOCK_NOTE, PrivateDirectory
from cachefsd.media.catalog import CATALOG, CATALOG_FILES, create_catalog, open_catalog, remove_catalog
from cachefsd.media.medium import DeviceMedium, FileMedium
from cachefsd.media.pool import MappedPool, attach, open_pool
from cachefsd.media.poolfile import (
    POOL,
    PoolInfo,
    Progress,
    create_pool,
    erase,
    is_unused,
    may_be_pool,
    open_locked,
    plan_pool,
)
from cachefsd.media.poolreader import PoolReader
from cachefsd.media.poolrecord import RECORD_MAGIC, RECORD_SIZE
from cachefsd.media.ports import CatalogError
from cachefsd.media.superblock import DATA_ALIGNMENT
from cachefsd.service.process import LOG

_LOGS = (LOG, f"{LOG}.1")
_OWN = (POOL, CATALOG, LOCK_NOTE, *_LOGS)
_NOBODYS = "lost+found"  # mkfs makes it


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


def refuse_foreign_pool(cache: Path) -> None:
    """See that what is called a pool in ``cache`` may be one, before even modes are changed. There may be none.

    :raises ForeignError: it is something else.
    """
    if exists(cache) and not may_be_pool(cache / POOL):
        raise ForeignError(f"{cache / POOL}: this is not a pool of cachefsd")


def contents(pool: PoolReader) -> Content:
    """Count what the headers of a pool say."""
    found = pool.count()
    backing = os.fsdecode(pool.path_hint) or "a backing without a name"
    return Content(found.dirty + found.lost + found.unknown, found.clean, pool.block_size, backing)


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
    _require_own(cache)
    try:
        with _new_directories(cache), PrivateDirectory.create(cache) as directory:
            directory.lock()  # all the time: of two that format at once, one would remove what the other has made
            if directory.has(POOL):
                if may_replace is None:
                    return None
                _remove(directory, may_replace)
            if device is not None and may_replace is not None:
                _clear(device, may_replace)
            with _new_files(directory):
                info = create_pool(cache, size, block_size, device=device, volatile=volatile, progress=progress)
                create_catalog(cache, info.uuid, info.slots)
            return info
    except CatalogError as error:
        raise UserError(str(error)) from error
    except OSError as error:
        raise UserError(f"{cache}: can't make the cache: {error.strerror}") from error


def _require_own(cache: Path) -> None:
    """See that the directory holds nothing but a cache, before even its mode is changed. It need not exist.

    :raises ConfigError: there is something else in it.
    """
    try:
        names = sorted(os.listdir(cache))
    except FileNotFoundError:
        return
    except OSError as error:
        raise ConfigError(f"{cache}: cannot make a cache of it: {error.strerror}") from error
    refuse_foreign_pool(cache)
    foreign = [name for name in names if not _is_own(cache, name)]
    if foreign:
        more = f" and {len(foreign) - 1:,} more" if len(foreign) > 1 else ""
        raise ConfigError(
            f"{cache} holds something that is not a cache's ({foreign[0]}{more}); give a new or empty directory"
        )


def _is_own(cache: Path, name: str) -> bool:
    """Whether a name in ``cache`` is one that cachefsd may have made. Of a pool that is looked at later."""
    path = cache / name
    try:
        mode = path.lstat().st_mode
        if name == CATALOG and stat.S_ISDIR(mode):
            return set(os.listdir(path)) <= set(CATALOG_FILES) and all(map(_is_regular, path.iterdir()))
        if name == _NOBODYS and stat.S_ISDIR(mode):
            return not os.listdir(path)
        if name == LOCK_NOTE and stat.S_ISREG(mode):
            text = path.read_bytes()[:32].strip()
            return not text or text.isdigit()
    except OSError:
        return False
    return name == POOL or (name in _LOGS and stat.S_ISREG(mode))


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


@contextlib.contextmanager
def _new_directories(path: Path) -> Iterator[None]:
    """Those of ``path`` and above that do not exist are gone again if the block fails, unless others use them."""
    missing = _missing(path)
    try:
        yield
    except BaseException:
        _remove_empty(missing)
        raise


def _missing(path: Path) -> list[Path]:
    """``path`` and the directories above as far as they do not exist, the innermost first."""
    found: list[Path] = []
    while not os.path.lexists(path):
        found.append(path)
        path = path.parent
    return found


def _remove_empty(directories: list[Path]) -> None:
    for path in directories:
        with contextlib.suppress(OSError):
            path.rmdir()


@contextlib.contextmanager
def _new_files(directory: PrivateDirectory) -> Iterator[None]:
    """What the block makes in a locked directory that holds no pool is gone again if it fails."""
    before = {name for name in _OWN if directory.has(name)}
    try:
        yield
    except BaseException:
        _take_away(directory, [name for name in _OWN if name not in before])
        raise


def _take_away(directory: PrivateDirectory, names: list[str]) -> None:
    """Remove files of a cache. What cannot be removed stays: another error is on its way already."""
    for name in names:
        with contextlib.suppress(OSError, UserError):
            if name == CATALOG:
                remove_catalog(directory)
                os.rmdir(CATALOG, dir_fd=directory.fd)
            else:
                os.unlink(name, dir_fd=directory.fd)


class Provisional:
    """A cache that is perhaps made for one mount. Unless that succeeds, it is taken away again.

    A context manager: what was made since its begin is gone at its end unless :meth:`keep` was called. A cache that has
    been used meanwhile, or is in use, stays.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache
        self._missing = _missing(cache)
        self._existed = exists(cache)
        self._before: set[str] = set()
        with contextlib.suppress(OSError):
            self._before = set(os.listdir(cache))
        self._kept = False

    def keep(self) -> None:
        """The mount serves: the cache stays."""
        self._kept = True

    def __enter__(self) -> Provisional:
        return self

    def __exit__(self, *_: object) -> None:
        if self._kept or self._existed or not exists(self._cache):
            return
        with contextlib.suppress(OSError, UserError, CatalogError):
            with PrivateDirectory(self._cache) as directory:
                directory.lock()
                with open_pool(self._cache, volatile=True, replacing=True) as pool:
                    if not self._is_empty(pool):
                        return
                    _take_away(directory, [name for name in _OWN if name not in self._before])
            _remove_empty(self._missing)

    def _is_empty(self, pool: MappedPool) -> bool:
        found = contents(pool)
        with contextlib.closing(open_catalog(self._cache, pool.uuid)) as catalog:
            return not (found.dirty or found.clean or any(True for _ in catalog.files()) or catalog.intents())


def _remove(directory: PrivateDirectory, may_replace: MayReplace) -> None:
    """Remove the cache, if it may be.

    The pool goes first, and while its lock is held: a catalog alone is nothing, wherever a crash comes.
    """
    try:
        pool = open_pool(directory.path, volatile=True, replacing=True)
    except (InUseError, ForeignError):
        raise
    except UnfinishedError:
        # A file is of zeros alone then, not only where the superblocks would be. A record names a device.
        with contextlib.closing(FileMedium(open_locked(directory), directory.path / POOL)) as file:
            start = bytearray(RECORD_SIZE)
            file.read(start, 0)
            if not start.startswith(RECORD_MAGIC) and not is_unused(file, file.size):
                raise ForeignError(f"{file.path}: this is not a pool of cachefsd") from None
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
