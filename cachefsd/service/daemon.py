"""The composition root: everything that one mount is made of, put together and taken apart in order."""

from __future__ import annotations

import gc
import logging
import os
import signal
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import trio

from cachefsd import __version__
from cachefsd.backing import syscalls
from cachefsd.backing.aio import Aio
from cachefsd.backing.directory import Directory
from cachefsd.backing.identity import identify, same
from cachefsd.backing.locate import Locator
from cachefsd.backing.tree import Tree
from cachefsd.backing.workers import Workers
from cachefsd.core.engine import Engine
from cachefsd.core.recovery import recover
from cachefsd.errors import ConfigError, UserError
from cachefsd.fuse import mounts, session
from cachefsd.fuse.operations import Operations
from cachefsd.media.catalog import LmdbCatalog, open_catalog
from cachefsd.media.pool import MappedPool, open_pool
from cachefsd.media.poolfile import Progress
from cachefsd.media.ports import CatalogError
from cachefsd.service import caches
from cachefsd.service.config import MountConfig
from cachefsd.service.control import ControlServer
from cachefsd.service.control import Progress as Report
from cachefsd.service.notify import feed_watchdog, notify

log = logging.getLogger(__name__)
# Jobs wait for the backing rather than compute. Metadata has threads of its own, so that a stat never waits
# behind a sync. Data has one for a sync of each of the writeback jobs, and as many again for those of users.
_METADATA_THREADS = 8
_DATA_THREADS = 16


def prepare(config: MountConfig, progress: Progress | None) -> None:
    """Check the places, take a dead mount off, and make the cache if it is to be made.

    :raises UserError: nothing has been changed but these.
    """
    _detach_dead(config.mountpoint)
    _check_places(config)
    if config.size is not None and not caches.exists(config.cache):
        caches.format_cache(
            config.cache,
            config.size,
            config.block_size,
            volatile=config.volatile,
            progress=progress,
            may_replace=None,
        )


def run(config: MountConfig, on_ready: Callable[[list[str]], None]) -> None:
    """Mount what :func:`prepare` has prepared, and serve until unmounted, SIGTERM or SIGINT.

    ``on_ready`` is called once with lines for the user as soon as the mount serves.

    :raises UserError: it can't be mounted; nothing is lost.
    """
    trio.run(_run, config, on_ready, strict_exception_groups=True)


async def _run(config: MountConfig, on_ready: Callable[[list[str]], None]) -> None:
    async with _engine(config) as beneath:
        # 52,000 objects of modules and start-up: a full collection would stop the loop for 40 ms to look at them.
        gc.freeze()
        tree = beneath.tree
        operations = Operations(
            beneath.engine, tree, writeback_cache=config.options.writeback_cache, noatime="noatime" in config.fuse
        )
        mounted = session.mount(
            operations,
            config.mountpoint,
            fsname=os.fspath(config.backing),
            options=[*_inherited(tree), *config.fuse],
        )
        operations.attach(*mounted.connection)
        try:
            await _serve(config, beneath, mounted, operations.serving, lambda: on_ready(beneath.notes))
        finally:
            notify(STOPPING=1)
            operations.detach()
            mounted.close()
            operations.close()


async def _serve(
    config: MountConfig,
    beneath: Beneath,
    mounted: session.Session,
    serving: trio.Event,
    on_ready: Callable[[], None],
) -> None:
    began = time.monotonic()
    engine = beneath.engine
    engine.writeback.requests = lambda: mounted.requests

    async def status(_: Report) -> dict[str, Any]:
        about = {
            "mountpoint": mounted.mountpoint,
            "backing": os.fspath(config.backing),
            "cache": os.fspath(config.cache),
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(time.monotonic() - began, 1),
            "acknowledged": "at fsync" if config.options.writeback_cache else "at write",
        }
        return about | engine.status()

    async def flush(report: Report) -> dict[str, int]:
        await mounted.drain()  # what the command has had the kernel hand over
        await engine.flush(report)
        return {"dirty_bytes": engine.dirty_bytes}

    control = ControlServer(Path(mounted.mountpoint), {"status": status, "flush": flush})
    with control.listening() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            nursery.start_soon(control.serve, listener)
            nursery.start_soon(feed_watchdog)
            await nursery.start(_obey_signals, mounted, nursery.cancel_scope)
            nursery.start_soon(_tell_when, serving, mounted, on_ready)
            await mounted.run(
                pump=not config.options.stock_loop,
                completions=beneath.completions,
                working=beneath.working,
                aio=beneath.aio,
            )
            log.info("%s is no longer served", mounted.mountpoint)
            nursery.cancel_scope.cancel()


async def _tell_when(serving: trio.Event, mounted: session.Session, on_ready: Callable[[], None]) -> None:
    """Report that the mount serves. To ask the mount itself for something would do as well, but for a kill in
    between: a thread that waits for an answer of its own process keeps that from dying, and the pool locked."""
    await serving.wait()
    log.info("serving %s", mounted.mountpoint)
    notify(READY=1, STATUS=f"serving {mounted.mountpoint}")
    on_ready()


async def _obey_signals(
    mounted: session.Session, scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]
) -> None:
    async with trio.open_nursery() as nursery:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
            task_status.started()
            stopping = False
            async for _ in signals:
                if stopping:
                    scope.cancel()  # a handler waits for a backing that does not answer
                else:
                    stopping = True
                    nursery.start_soon(_stop, mounted)


async def _stop(mounted: session.Session) -> None:
    """End the session, once the kernel has handed over what it holds: pages written to through maps, and with
    ``writeback_cache`` all that was not synced. A process of its own waits for that: a thread of this one would
    keep it from dying (see :func:`_tell_when`)."""
    entry = mounts.find_mount(mounted.mountpoint)
    if entry is not None and entry.fstype == session.FSTYPE:
        done = await trio.run_process(
            ["sync", "--file-system", mounted.mountpoint], check=False, capture_stderr=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            log.warning("the page cache was not written: %s", done.stderr.decode(errors="replace").strip())
        await mounted.drain()
    mounted.request_stop()


# ---- what is beneath the mount


@dataclass(frozen=True)
class Beneath:
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


@asynccontextmanager
async def _engine(config: MountConfig) -> AsyncIterator[Beneath]:
    """The engine over cache and backing; left in order it is marked clean."""
    async with (
        Workers(_METADATA_THREADS, "metadata") as metadata,
        Workers(_DATA_THREADS, "data") as data,
        Aio(data) as aio,
    ):
        with _tree(config, metadata) as tree, _pool(config) as pool, _catalog(config, pool) as catalog:
            notes = [*pool.notes, *_places_notes(pool, tree)]
            for note in notes:
                log.warning("%s", note)
            _check_identity(config, pool, tree)
            # Until there is an engine, only the catalog knows where a file was.
            known = {} if tree.can_reopen else {record.handle: record.path for record in catalog.files()}
            engines: list[Engine] = []

            def path_of(handle: bytes) -> bytes:
                return (engines[0].path_of(handle) if engines else b"") or known.get(handle, b"")

            backing = Directory(tree, aio, data, pool.block_size, Locator(tree, path_of))
            try:
                engine = await recover(pool, catalog, backing, config.options.engine(), data.run)
            except OSError as error:
                raise UserError(f"cannot recover {config.cache}: {error.strerror}") from error
            engines.append(engine)
            syscalls.trim_heap()  # recovery has had 80 bytes for each slot, which glibc would keep
            try:
                completions = [metadata.eventfd, data.eventfd, aio.eventfd]
                yield Beneath(engine, tree, aio, completions, lambda: metadata.pending + data.pending > 0, notes)
                owed = engine.dirty_bytes
                await engine.shutdown()
                log.info("stopped; %s", f"{owed} bytes are still dirty, and kept" if owed else "all is clean")
            finally:
                engine.close()


@contextmanager
def _tree(config: MountConfig, workers: Workers) -> Iterator[Tree]:
    tree = Tree(os.fspath(config.backing), workers)
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


# ---- checks before anything is touched


def _detach_dead(mountpoint: Path) -> None:
    """Take off what a daemon has left there that was killed.

    :raises UserError: it is alive.
    """
    if mounts.detach_if_dead(mountpoint, session.FSTYPE):
        log.warning("took the dead mount off %s", mountpoint)
    entry = mounts.find_mount(mountpoint)
    if entry is not None and entry.fstype == session.FSTYPE:
        raise UserError(f"{mountpoint} is busy: cachefsd is mounted there already")


def _check_places(config: MountConfig) -> None:
    for path, what in ((config.backing, "backing"), (config.mountpoint, "mount point")):
        try:
            if not path.is_dir():
                problem = "is not a directory" if path.exists() else "does not exist"
                raise ConfigError(f"the {what} {path} {problem}")
        except OSError as error:
            raise UserError(f"cannot use the {what} {path}: {error.strerror}") from error
    for path, what in ((config.backing, "backing"), (config.mountpoint, "mount point")):
        if _is_inside(config.cache, path):
            raise ConfigError(f"the cache {config.cache} must not be inside the {what} {path}")
    if _is_inside(config.backing, config.cache):
        raise ConfigError(f"the backing {config.backing} must not be inside the cache {config.cache}")
    if config.mountpoint != config.backing and _is_inside(config.mountpoint, config.backing):
        raise ConfigError(f"the mount point {config.mountpoint} must not be inside the backing")


def _is_inside(path: Path, directory: Path) -> bool:
    """Whether ``path``, which need not exist, is ``directory`` or in it, by whatever name."""
    try:
        wanted = directory.stat()
    except OSError:
        return False
    for ancestor in (path, *path.parents):
        try:
            if os.path.samestat(ancestor.stat(), wanted):
                return True
        except OSError:
            continue
    return False


def _check_identity(config: MountConfig, pool: MappedPool, tree: Tree) -> None:
    evidence = identify(tree)
    if not pool.identity:
        pool.bind(evidence, os.fsencode(config.backing))
    elif not same(pool.identity, evidence):
        owner = os.fsdecode(pool.path_hint)
        raise UserError(
            f"the cache {config.cache} belongs to another backing ({owner}) than {config.backing} is now;"
            " is its file system mounted?"
        )


def _places_notes(pool: MappedPool, tree: Tree) -> list[str]:
    if os.stat(pool.place).st_dev == tree.device:
        return [f"the pool {pool.place} is on the same file system as the backing: that gains nothing"]
    return []


def _inherited(tree: Tree) -> list[str]:
    """Mount options that hold beneath, and so above: what was forbidden stays so, and nothing else."""
    if os.geteuid() != 0:
        return []
    flags = os.statvfs(tree.root_fd).f_flag
    return [
        "nosuid" if flags & os.ST_NOSUID else "suid",
        "nodev" if flags & os.ST_NODEV else "dev",
        "noexec" if flags & os.ST_NOEXEC else "exec",
    ]
