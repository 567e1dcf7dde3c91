"""What a mount stands on: backing, pool, catalog and engine, put together in order and taken apart in the other one."""

from __future__ import annotations

import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass

from cachefsd.backing import syscalls
from cachefsd.backing.aio import Aio
from cachefsd.backing.identity import identify, same
from cachefsd.backing.locate import Locator
from cachefsd.backing.tree import Tree
from cachefsd.backing.treebacking import TreeBacking
from cachefsd.backing.workers import Workers
from cachefsd.core.engine import Engine
from cachefsd.core.recovery import recover
from cachefsd.errors import ConfigError, UserError
from cachefsd.media.catalog import LmdbCatalog, open_catalog
from cachefsd.media.pool import MappedPool, open_pool
from cachefsd.media.ports import CatalogError
from cachefsd.service import caches
from cachefsd.service.binding import Binding, epoch
from cachefsd.service.config import MountConfig
from cachefsd.service.places import bytes_text

log = logging.getLogger(__name__)
# Jobs wait for the backing rather than compute. Metadata has threads of its own, so that a stat never waits
# behind a sync. Data has one for a sync of each of the writeback jobs, and as many again for those of users.
_METADATA_THREADS = 8
_DATA_THREADS = 16


@dataclass(frozen=True)
class Stack:
    """What a mount stands on."""

    engine: Engine
    tree: Tree
    aio: Aio
    completions: list[int]
    """Descriptors that are readable when the backing has answered."""
    working: Callable[[], bool]
    """Whether threads of ours are asking it."""
    notes: list[str]
    """for the user"""
    unbind: Callable[[], None]
    """To be called if nothing was served: the backing is not marked by this start."""


@asynccontextmanager
async def assembled(config: MountConfig, root_fd: int = -1) -> AsyncIterator[Stack]:
    """The engine over cache and backing; left in order it is marked clean. ``root_fd`` as for :class:`Tree`."""
    async with (
        Workers(_METADATA_THREADS, "metadata") as metadata,
        Workers(_DATA_THREADS, "data") as data,
        Aio(data) as aio,
    ):
        with _tree(config, metadata, root_fd) as tree, _pool(config) as pool, _catalog(config, pool) as catalog:
            notes = [*pool.notes, *_places_notes(config, pool, tree)]
            for note in notes:
                log.warning("%s", note)
            binding = Binding(tree.root_fd, config.backing, config.cache, pool, catalog)
            evidence = _check_identity(config, pool, tree)
            binding.check(config.without_cache)
            if not pool.identity:
                pool.bind(evidence, os.fsencode(config.backing))
            # Until there is an engine, only the catalog knows where a file was.
            known = {} if tree.can_reopen else {record.handle: record.path for record in catalog.files()}
            engines: list[Engine] = []

            def path_of(handle: bytes) -> bytes:
                return (engines[0].path_of(handle) if engines else b"") or known.get(handle, b"")

            backing = TreeBacking(tree, aio, data, pool.block_size, Locator(tree, path_of))
            try:
                now = epoch(tree.root_fd, config.backing, config.mountpoint)
                engine = await recover(pool, catalog, backing, config.options.engine(), data.run, epoch=now)
            except OSError as error:
                raise UserError(f"cannot recover {config.cache}: {error.strerror}") from error
            engines.append(engine)
            known.clear()  # the engine says it now
            notes += [*_bind(binding, tree), *engine.notes()]
            syscalls.trim_heap()  # recovery has had 80 bytes for each slot, which glibc would keep
            try:
                completions = [metadata.eventfd, data.eventfd, aio.eventfd]
                yield Stack(
                    engine, tree, aio, completions, lambda: metadata.pending + data.pending > 0, notes, binding.undo
                )
                owed = engine.dirty_bytes
                await engine.shutdown()
                if await engine.is_delivered():
                    binding.release()
                log.info("stopped; %s", f"{owed} bytes are still dirty, and kept" if owed else "all is clean")
            finally:
                engine.close()


@contextmanager
def _tree(config: MountConfig, workers: Workers, root_fd: int) -> Iterator[Tree]:
    tree = Tree(os.fspath(config.backing), workers, root_fd)
    try:
        yield tree
    finally:
        tree.close()


@contextmanager
def _pool(config: MountConfig) -> Iterator[MappedPool]:
    if not caches.exists(config.cache):
        raise ConfigError(f"there is no cache in {config.cache}; make one with `cachefsd format` or --size")
    pool = open_pool(config.cache, volatile=config.volatile)
    try:
        yield pool
    finally:
        pool.close()


@contextmanager
def _catalog(config: MountConfig, pool: MappedPool) -> Iterator[LmdbCatalog]:
    try:
        catalog = open_catalog(config.cache, pool.uuid)
    except CatalogError as error:
        content = caches.contents(pool)
        if content.dirty:
            hint = f"the pool holds {content}: put the catalog back, or give them up with `cachefsd format`"
        else:
            hint = "the pool holds nothing that the backing lacks: make the cache anew with `cachefsd format`"
        raise UserError(f"{error}; {hint}") from error
    try:
        yield catalog
    finally:
        catalog.close()


def _check_identity(config: MountConfig, pool: MappedPool, tree: Tree) -> bytes:
    """What tells the backing from others.

    :raises UserError: the cache belongs to another one.
    """
    evidence = identify(tree)
    if pool.identity and not same(pool.identity, evidence):
        owner = os.fsdecode(pool.path_hint)
        raise UserError(
            f"the cache {config.cache} belongs to another backing ({owner}) than {config.backing} is now;"
            " is its file system mounted?"
        )
    return evidence


def _bind(binding: Binding, tree: Tree) -> list[str]:
    notes = binding.establish()
    for note in notes:
        log.warning("%s", note)
    tree.hide_mark()
    return notes


def _places_notes(config: MountConfig, pool: MappedPool, tree: Tree) -> list[str]:
    notes = []
    if os.stat(pool.place).st_dev == tree.device:
        notes.append(f"the pool {pool.place} is on the same file system as the backing: that gains nothing")
    if config.size is not None and config.size != pool.size:
        notes.append(
            f"the cache {config.cache} has {bytes_text(pool.size)}; --size {bytes_text(config.size)} changes nothing:"
            " another size takes a new cache, see `cachefsd format --help`"
        )
    if is_read_only(tree) and "ro" not in config.fuse:
        notes.append(f"the backing {config.backing} is read-only, and so is the mount")
    return notes


def is_read_only(tree: Tree) -> bool:
    """Whether the file system of the backing takes no changes."""
    return bool(os.statvfs(tree.root_fd).f_flag & os.ST_RDONLY)
