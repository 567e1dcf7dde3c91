"""The life of one mount: checks, start, service, and the end in order; `service/stack` has what it stands on."""

from __future__ import annotations

import errno
import gc
import logging
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import trio

from cachefsd import __version__
from cachefsd.backing.tree import Tree
from cachefsd.errors import ConfigError, UserError
from cachefsd.fuse import mounting, mounts, session, takeover
from cachefsd.fuse.operations import Operations
from cachefsd.fuse.replies import FAULTS
from cachefsd.media.poolfile import Progress
from cachefsd.service import caches
from cachefsd.service.binding import require_unmarked
from cachefsd.service.config import MountConfig
from cachefsd.service.control import ControlServer
from cachefsd.service.control import Progress as Report
from cachefsd.service.notify import feed_watchdog, notify
from cachefsd.service.places import kernels_own
from cachefsd.service.signals import Signals, Stopped, in_loop
from cachefsd.service.stack import Stack, assembled, is_read_only

log = logging.getLogger(__name__)
_ABORT_S = 0.5  # between the abort of a connection and its unmount, for `umount --force`, which does both


def prepare(config: MountConfig, progress: Progress | None) -> None:
    """Check the places, and make the cache if it is to be made. A dead mount stays: :func:`run` replaces it.

    :raises UserError: nothing has been changed but this.
    """
    _check_not_served(config.mountpoint)
    _check_places(config)
    mounting.require_helper()
    caches.refuse_foreign_pool(config.cache)
    if config.size is not None and not caches.exists(config.cache):
        require_unmarked(config.backing, config.cache, config.without_cache)
        caches.format_cache(
            config.cache,
            config.size,
            config.block_size,
            volatile=config.volatile,
            progress=progress,
            may_replace=None,
        )


def run(config: MountConfig, on_ready: Callable[[list[str]], None]) -> None:
    """Mount what :func:`prepare` has prepared, and serve until unmounted, SIGTERM, SIGINT or SIGQUIT.

    ``on_ready`` is called once with lines for the user as soon as the mount serves.

    :raises UserError: it can't be mounted, or the daemon has failed; nothing is lost. A mount that has been in use, or
        that would uncover what is older than the cache, stays and is dead.
    :raises Stopped: a signal came before it served.
    """
    try:
        with in_loop():
            trio.run(_run, config, on_ready, strict_exception_groups=True)
    except Exception as error:
        for leaf in _leaves(error):
            if isinstance(leaf, UserError):
                raise leaf from None
        log.critical("the daemon ends, after an exception that nobody expected", exc_info=error)
        first = _leaves(error)[0]
        raise UserError(
            f"the daemon of {config.mountpoint} has failed ({type(first).__name__}: {first}); what was acknowledged is"
            " in the cache: mount again"
        ) from None


def _leaves(error: BaseException) -> list[BaseException]:
    """The exceptions of a group, of groups in it, and so on."""
    if isinstance(error, BaseExceptionGroup):
        return [leaf for each in error.exceptions for leaf in _leaves(each)]
    return [error]


async def _run(config: MountConfig, on_ready: Callable[[list[str]], None]) -> None:
    signals = Signals()
    served = False
    async with trio.open_nursery() as nursery:
        await nursery.start(signals.obey)
        with signals.scope:
            served = await _start(config, signals, on_ready)
        nursery.cancel_scope.cancel()
    if not served and signals.stopped_by:
        raise Stopped(signals.stopped_by)


async def _start(config: MountConfig, signals: Signals, on_ready: Callable[[list[str]], None]) -> bool:
    """Recover, mount and serve; whether it has served.

    A dead mount is there until the new one serves. Only root can open the backing beneath it. Others take it off, and
    mount at once, but for a moment: who uses the mount waits for the recovery.
    """
    root_fd, attached = -1, None
    over = {"fsname": os.fspath(config.backing)}
    if takeover.is_dead(config.mountpoint, mounts.FSTYPE):
        if os.geteuid() == 0:
            # Not where it can be reached by its path: what leads beneath is a mount of its own, which stays as it is
            # when somebody mounts the backing's file system anew with other options.
            if covers_backing(config):
                root_fd = takeover.open_beneath(config.mountpoint, mounts.FSTYPE, os.fspath(config.backing))
        else:
            mounts.detach_all_dead(config.mountpoint, mounts.FSTYPE)
            log.warning("took the dead mount off %s", config.mountpoint)
            try:
                root_fd = os.open(config.backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"cannot open the backing {config.backing}: {error.strerror}") from error
            try:
                attached = mounting.attach(config.mountpoint, options=config.fuse, **over)
                attached.takes_over = True
            except BaseException:
                os.close(root_fd)
                raise
    try:
        async with assembled(config, root_fd) as stack:
            # 52,000 objects of modules and start-up: a full collection would stop the loop for 40 ms to look at them.
            gc.freeze()
            tree = stack.tree
            operations = Operations(
                stack.engine, tree, writeback_cache=config.options.writeback_cache, noatime="noatime" in config.fuse
            )
            try:
                if attached is None:
                    attached = mounting.attach(config.mountpoint, options=[*_inherited(tree), *config.fuse], **over)
                begun, attached = attached, None
                return await _serve_or_leave(
                    config, stack, session.begin(operations, begun), operations, signals, on_ready
                )
            except BaseException:
                if not operations.serving.is_set():
                    stack.unbind()
                raise
    finally:
        if attached is not None:
            attached.abandon()


async def _serve_or_leave(
    config: MountConfig,
    stack: Stack,
    mounted: session.Session,
    operations: Operations,
    signals: Signals,
    on_ready: Callable[[list[str]], None],
) -> bool:
    """Serve, and unmount after an end in order, but only then: what is beneath may be older than the cache.

    After any other end the mount is dead until the next start. So it is after SIGQUIT, where SIGTERM would uncover what
    is older.
    """
    in_order = False
    try:
        operations.attach(*mounted.connection)
        await _serve(config, stack, mounted, operations.serving, signals, lambda: on_ready(stack.notes))
        if mounted.aborted:
            await trio.sleep(_ABORT_S)
        in_order = not mounted.aborted
    finally:
        with suppress(Exception):  # whatever it is, the mount must be closed
            notify(STOPPING=1)
            operations.detach()
        owed = stack.engine.dirty_bytes
        older = covers_backing(config) and owed > 0
        # One that has not served restores what was there.
        restores = not mounted.takes_over and (in_order or not older)
        unmount = in_order if operations.serving.is_set() else restores
        if signals.stopped_by == signal.SIGQUIT and older:
            unmount = False
        mounted.close(unmount=unmount)
        if not unmount:
            log.error("%s is left as a dead mount, until the next start of cachefsd", config.mountpoint)
        elif older:
            log.warning(
                "%d bytes stay in the cache %s; until the next mount %s shows the older content of the backing",
                owed,
                config.cache,
                config.mountpoint,
            )
        operations.close()
    if not in_order:
        raise UserError(f"the connection of {config.mountpoint} was aborted; mount again to use it")
    return operations.serving.is_set()


def covers_backing(config: MountConfig) -> bool:
    """Whether the mount hides the backing itself, which can be seen once it is unmounted."""
    return config.mountpoint == config.backing


async def _serve(
    config: MountConfig,
    stack: Stack,
    mounted: session.Session,
    serving: trio.Event,
    signals: Signals,
    on_ready: Callable[[], None],
) -> None:
    began = time.monotonic()
    engine = stack.engine
    engine.writeback.requests = lambda: mounted.requests

    async def status(_: Report) -> dict[str, Any]:
        about = {
            "mountpoint": mounted.mountpoint,
            "backing": os.fspath(config.backing),
            "covers_backing": covers_backing(config),
            "cache": os.fspath(config.cache),
            "pid": os.getpid(),
            "version": __version__,
            "uptime_s": round(time.monotonic() - began, 1),
            "acknowledged": "at fsync" if config.options.writeback_cache else "at write",
        }
        of_engine = engine.status()
        of_engine["faults"] += FAULTS.listed()
        return about | of_engine

    async def flush(report: Report) -> dict[str, int]:
        await mounted.drain()  # what the command has had the kernel hand over
        await engine.flush(report)
        return {"dirty_bytes": engine.dirty_bytes}

    async def forget_conflict(_: Report, arguments: dict[str, Any]) -> None:
        file_id = arguments.get("id")
        if not isinstance(file_id, int):
            raise OSError(errno.EINVAL, "the conflict is not named")
        await engine.forget_conflict(file_id)

    note = {
        "mountpoint": mounted.mountpoint,
        "backing": os.fspath(config.backing),
        "cache": os.fspath(config.cache),
        "pid": os.getpid(),
    }
    control = ControlServer(
        Path(mounted.mountpoint), {"status": status, "flush": flush}, {"forget-conflict": forget_conflict}, note
    )
    with control.listening() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(engine.run)
            nursery.start_soon(control.serve, listener)
            nursery.start_soon(feed_watchdog)
            nursery.start_soon(_obey, signals, mounted, nursery.cancel_scope)
            nursery.start_soon(_tell_when, serving, mounted, on_ready)
            await mounted.run(
                pump=not config.options.stock_loop,
                completions=stack.completions,
                working=stack.working,
                aio=stack.aio,
            )
            log.info("%s is no longer served", mounted.mountpoint)
            nursery.cancel_scope.cancel()


async def _tell_when(serving: trio.Event, mounted: session.Session, on_ready: Callable[[], None]) -> None:
    """Report that the mount serves. To ask the mount itself for something would do as well, but for a kill in
    between: a thread that waits for an answer of its own process keeps that from dying, and the pool locked."""
    await serving.wait()
    mounted.uncover()
    log.info("serving %s", mounted.mountpoint)
    # Users have the mount already: a report that fails is no reason to take it away.
    try:
        on_ready()
    except Exception:
        log.exception("whoever has started the daemon could not be told that it serves")
    try:
        notify(READY=1, STATUS=f"serving {mounted.mountpoint}")
    except Exception:
        log.exception("the service manager could not be told that the mount serves")


async def _obey(signals: Signals, mounted: session.Session, scope: trio.CancelScope) -> None:
    await signals.wait_for_stop(scope)
    await _stop(mounted)


async def _stop(mounted: session.Session) -> None:
    """End the session, once the kernel has handed over what it holds: pages written to through maps, and with
    ``writeback_cache`` all that was not synced. A process of its own waits for that: a thread of this one would
    keep it from dying (see :func:`_tell_when`)."""
    entry = mounts.find_mount(mounted.mountpoint)
    if entry is not None and entry.fstype == mounts.FSTYPE:
        done = await trio.run_process(
            ["sync", "--file-system", mounted.mountpoint], check=False, capture_stderr=True, stdin=subprocess.DEVNULL
        )
        if done.returncode:
            log.warning("the page cache was not written: %s", done.stderr.decode(errors="replace").strip())
        await mounted.drain()
    mounted.request_stop()


# ---- checks before anything is touched


def _check_not_served(mountpoint: Path) -> None:
    """
    :raises UserError: a mount is there that is alive.
    """
    entry = mounts.find_mount(mountpoint)
    if entry is not None and entry.fstype == mounts.FSTYPE and not takeover.is_dead(mountpoint, mounts.FSTYPE):
        raise UserError(f"{mountpoint} is busy: cachefsd is mounted there already")


def _check_places(config: MountConfig) -> None:
    dead = takeover.is_dead(config.mountpoint, mounts.FSTYPE)
    for path, what in ((config.backing, "backing"), (config.mountpoint, "mount point")):
        if dead and path == config.mountpoint:
            continue  # it was a directory when it was mounted, and is opened beneath the dead mount
        try:
            if not path.is_dir():
                problem = "is not a directory" if path.exists() else "does not exist"
                raise ConfigError(f"the {what} {path} {problem}")
        except OSError as error:
            raise UserError(f"cannot use the {what} {path}: {error.strerror}") from error
    for path, what in ((config.backing, "backing"), (config.mountpoint, "mount point")):
        if kind := kernels_own(path):
            raise ConfigError(f"the {what} {path} is on {kind}, which belongs to the kernel; give a directory of files")
        if _is_inside(config.cache, path):
            raise ConfigError(f"the cache {config.cache} must not be inside the {what} {path}")
    if _is_inside(config.backing, config.cache):
        raise ConfigError(f"the backing {config.backing} must not be inside the cache {config.cache}")
    if _is_inside(config.mountpoint, config.cache):
        raise ConfigError(f"the mount point {config.mountpoint} must not be inside the cache {config.cache}")
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


def _inherited(tree: Tree) -> list[str]:
    """Mount options that hold beneath, and so above: what was forbidden stays so, and nothing else."""
    read_only = ["ro"] if is_read_only(tree) else []
    if os.geteuid() != 0:
        return read_only
    flags = os.statvfs(tree.root_fd).f_flag
    return [
        *read_only,
        "nosuid" if flags & os.ST_NOSUID else "suid",
        "nodev" if flags & os.ST_NODEV else "dev",
        "noexec" if flags & os.ST_NOEXEC else "exec",
    ]
