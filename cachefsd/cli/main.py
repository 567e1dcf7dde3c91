"""Commands. Every failure is one line on standard error and an exit status other than 0.

The status is 2 when the command line or what it names is wrong, so that a service manager need not try again; README.md
has all of them.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cachefsd import __version__
from cachefsd.backing import syscalls
from cachefsd.cli import helpers, trouble, users
from cachefsd.errors import ConfigError, ForeignError, NobodyError, SilentError, UserError
from cachefsd.fuse import mounts
from cachefsd.fuse.remount import remount
from cachefsd.media.cachedir import PrivateDirectory
from cachefsd.service import caches, conflicts, control, daemon, overview, process, signals
from cachefsd.service.config import MountConfig, option_help, parse_options, parse_size
from cachefsd.service.places import canonical, default_cache

_BUSY_S = 5.0  # who only looks at the mount point, as another `mount` does, is gone by then
_LAZY_S = 0.5  # for a daemon whose files nobody uses to end
_END_S = 120.0  # for a daemon to end after its file system was unmounted
_CLASSES = """\b
How durable a write is depends on where the cache is, and `status` tells:
  pmem  a DAX file system on persistent memory, or, with format --pool, a
        device of device-dax: a write that returned survives a power cut
  disk  an ordinary disk: a write survives the daemon, and an fsync a power
        cut; with -o sync every write does
  ram   tmpfs, only with --volatile: nothing survives a power cut
"""


if TYPE_CHECKING:
    _ParamType = click.ParamType[Path]
else:
    _ParamType = click.ParamType  # older versions of click know no type arguments


class _Place(_ParamType):
    """A path that is not empty: that would be the current directory. Whatever else is wrong, those who use it tell.

    click's own type looks at the file, and waits for ever where a mount does not answer.
    """

    name = "path"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Path:
        if not os.fspath(value):
            self.fail("the path is empty", param, ctx)
        return Path(value)


_PATH = _Place()


class _Stopped(BaseException):
    """A signal that asks the process to end."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


@contextlib.contextmanager
def _stoppable() -> Iterator[None]:
    """A signal ends the block by an exception, so that what was made in it is taken away."""

    def stop(number: int, _: object) -> None:
        raise _Stopped(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    for number, handler in before.items():
        if handler != signal.SIG_IGN:  # as nohup(1) wants it
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Group(click.Group):
    """Turns errors into one line."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        process.open_standard_descriptors()
        process.print_anything()
        if process.is_background():
            signals.catch_all()
        try:
            # Replaced in place: a daemon in the background is started with the same.
            sys.argv[1:] = helpers.as_command(sys.argv)
            result = super().main(*args, **kwargs | {"prog_name": "cachefsd", "standalone_mode": False})
            if isinstance(result, int):
                sys.exit(result)  # of an Exit that a command has raised
            return result
        except click.exceptions.Exit as request:
            sys.exit(request.exit_code)
        except _Interrupted as error:
            _fail(str(error), error.status)
        except (click.Abort, KeyboardInterrupt):
            _fail("interrupted", 130)
        except _Stopped as stopped:
            _fail("interrupted", 128 + stopped.number)
        except click.UsageError as error:
            context = error.ctx.command_path if error.ctx else "cachefsd"
            _fail(f"{error.format_message()} (see `{context} --help`)", error.exit_code)
        except click.ClickException as error:
            _fail(error.format_message(), error.exit_code)
        except ConfigError as error:
            _fail(str(error), 2)
        except SilentError as error:
            _fail(str(error), trouble.EXIT_SILENT)
        except UserError as error:
            _fail(str(error), 1)
        except BrokenPipeError:
            # The reader of our output has gone; Python would complain about it once more at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            sys.exit(1)
        except OSError as error:
            where = f"{error.filename}: " if error.filename else ""
            _fail(f"{where}{error.strerror or error}", 1)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except signals.Stopped as stopped:
            raise _Interrupted(str(stopped), 128 + stopped.number) from None
        except KeyboardInterrupt:
            # Click would print an empty line for it.
            raise _Interrupted("interrupted", 130) from None


class _Interrupted(Exception):
    def __init__(self, text: str, status: int) -> None:
        super().__init__(text)
        self.status = status


def _fail(message: str, status: int) -> None:
    text = " ".join(message.split())
    process.tell_parent(error=text)
    print(f"cachefsd: {text}", file=sys.stderr)
    sys.exit(status)


_EXITS = """\b
Exit status: 0 done, 1 failed, 2 the command line or what it names is wrong,
3 a daemon does not answer, 4 (status) a daemon has died, 128 + n interrupted
by signal n.
"""


@click.group(
    cls=_Group,
    invoke_without_command=True,
    epilog=_EXITS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="cachefsd")
@click.pass_context
def main(context: click.Context) -> None:
    """A write-back cache in persistent memory, mounted over a directory.

    \b
    cachefsd mount /srv/data --cache /mnt/pmem/cache --size 4G
    cachefsd status /srv/data
    cachefsd unmount /srv/data
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
        context.exit(2)


@contextlib.contextmanager
def _bar(text: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on a terminal, of (done, total) bytes, from the first of them on; nothing elsewhere."""
    with contextlib.ExitStack() as shown:
        update: Callable[[int, int], None] | None = None

        def progress(done: int, total: int) -> None:
            nonlocal update
            if update is None and sys.stderr.isatty():
                from cachefsd.cli import show  # rich takes 40 ms, which a daemon that starts need not wait for

                update = shown.enter_context(show.bar(text))
            if update is not None:
                update(done, total)

        yield progress


# ---- format


@main.command("format")
@click.argument("cache", type=_PATH)
@click.option("--size", metavar="SIZE", help="Size of the pool, e.g. 4G.")
@click.option("--pool", type=_PATH, metavar="DEVICE", help="Put the pool on a device like /dev/dax0.0, not in CACHE.")
@click.option("--block-size", default="4K", show_default=True, help="4K to 1M, a power of two.")
@click.option("--volatile", is_flag=True, help="Allow tmpfs, where nothing survives a power cut.")
@click.option("--discard-dirty", is_flag=True, help="Give up data that the backing still lacks.")
@click.option("--discard-foreign", is_flag=True, help="Give up data on DEVICE that is not a cache.")
@click.option("--yes", is_flag=True, help="Confirm beforehand.")
def format_(
    cache: Path,
    size: str | None,
    pool: Path | None,
    block_size: str,
    volatile: bool,
    discard_dirty: bool,
    discard_foreign: bool,
    yes: bool,
) -> None:
    """Make the directory CACHE a cache: a pool of SIZE, and a catalog.

    The pool is a file in CACHE, or is on DEVICE, a device of device-dax. It takes the whole device unless SIZE is
    less. CACHE then holds the catalog and a record of the device. A cache that exists already is replaced only if you
    confirm it. If it holds dirty data, --discard-dirty is needed as well.
    """
    cache = Path(os.path.realpath(cache))
    if size is None and pool is None:
        raise click.UsageError("Missing option '--size', or '--pool'.")

    def may_replace(place: Path, held: caches.Content | UserError) -> None:
        if isinstance(held, ForeignError):
            held_text, option, given = "something that is not cachefsd's", "--discard-foreign", discard_foreign
        elif isinstance(held, UserError):
            held_text, option, given = f"nobody knows what ({held})", "--discard-dirty", discard_dirty
        else:
            held_text, option, given = str(held), "--discard-dirty", discard_dirty or not held.dirty
        if not given:
            raise UserError(f"{place} holds {held_text}; {option} gives that up")
        if isinstance(held, caches.Content) and not held.dirty:
            question = f"{place} is a cache already, without dirty data. Replace it?"
        else:
            question = f"{place} holds {held_text}. Destroy that for good?"
        if not yes and not _confirmed(question):
            raise UserError(f"{place} was left as it is")

    with _stoppable(), _bar("formatting") as progress:
        info = caches.format_cache(
            cache,
            parse_size(size) if size is not None else None,
            parse_size(block_size),
            device=Path(os.path.realpath(pool)) if pool is not None else None,
            volatile=volatile,
            progress=progress,
            may_replace=may_replace,
        )
    assert info is not None
    click.echo(f"{cache} is a cache of {size or f'{info.size} bytes'}{f' on {info.path}' if pool is not None else ''}")


def _confirmed(question: str) -> bool:
    if not sys.stdin.isatty():
        raise UserError(f"{question} Confirm with --yes")
    return click.confirm(question, err=True)


# ---- mount


_OPTIONS = f"\b\nOptions of -o:\n{option_help()}\nand suid, dev, exec, ro and the like, as for mount(8)."


@main.command(epilog=f"{_CLASSES}\n\n{_OPTIONS}")
@click.argument("backing", type=_PATH)
@click.argument("mountpoint", type=_PATH, required=False)
@click.option("--cache", type=_PATH, help="The cache. The default is named after BACKING.")
@click.option("--size", metavar="SIZE", help="Make the cache, of this size, if there is none.")
@click.option("--block-size", default="4K", show_default=True, help="Of a cache that is made.")
@click.option("--volatile", is_flag=True, help="Allow a cache on tmpfs, which a power cut empties.")
@click.option("--foreground", is_flag=True, help="Stay, and log to standard error.")
@click.option(
    "--without-cache",
    default="",
    metavar="UUID",
    help="Give up all data of BACKING in the cache UUID, and mount without it.",
)
@click.option("-o", "options", multiple=True, metavar="OPTIONS", help="Options, see below.")
def mount(
    backing: Path,
    mountpoint: Path | None,
    cache: Path | None,
    size: str | None,
    block_size: str,
    volatile: bool,
    foreground: bool,
    without_cache: str,
    options: tuple[str, ...],
) -> None:
    """Mount a cache over the directory BACKING.

    With MOUNTPOINT the files are shown there, and BACKING stays visible. The command returns as soon as the mount
    serves. After a crash the same command recovers. With -o remount and words of mount(8) such as ro and rw, it
    changes the mount on MOUNTPOINT (or BACKING) while that serves.

    BACKING is marked while a cache may hold data that BACKING lacks. Then no other cache is accepted for BACKING,
    and no older copy of its cache. The error names the right cache and its UUID. If that cache is lost for good,
    give the UUID to --without-cache.
    """
    if foreground:
        signals.catch_all()
    parsed = parse_options(options)
    if parsed.remount is not None:
        _remount(mountpoint or backing, parsed.remount, parsed.kept)
        return
    size = size or parsed.places.get("size")
    place = canonical(backing)
    named = cache or parsed.places.get("cache")
    config = MountConfig(
        backing=place,
        mountpoint=canonical(mountpoint) if mountpoint is not None else place,
        cache=Path(os.path.realpath(named)) if named else default_cache(place),
        size=parse_size(size) if size else None,
        block_size=parse_size(parsed.places.get("block_size", block_size)),
        volatile=volatile or "volatile" in parsed.places,
        options=parsed.options,
        fuse=parsed.fuse,
        without_cache=without_cache,
    )
    with caches.Provisional(config.cache) as made:
        with _stoppable(), _bar("formatting") as progress:
            daemon.prepare(config, progress)
        if foreground or process.is_background():
            _serve(config, made)
        else:
            process.start_in_background(sys.argv[1:], lambda note: click.echo(f"cachefsd: {note}", err=True))
            made.keep()


def _remount(mountpoint: Path, words: tuple[str, ...], kept: tuple[str, ...]) -> None:
    place = canonical(mountpoint)
    entry = mounts.find_mount(place)
    if entry is None or entry.fstype != mounts.FSTYPE:
        raise UserError(f"cachefsd is not mounted on {place}")
    try:
        remount(entry, words)
    except mounts.BusyError as error:
        raise UserError(f"{error}: {users.text_of(entry)}") from None
    if kept:
        text = ", ".join(sorted(kept))
        click.echo(f"cachefsd: a remount does not change {text}; to change that, unmount and mount", err=True)


def _serve(config: MountConfig, made: caches.Provisional) -> None:
    process.harden()
    background = process.is_background()
    if background and caches.exists(config.cache):
        directory = PrivateDirectory(config.cache)
        process.log_to_file(directory)
    else:
        directory = None
        process.log_to_terminal()

    def ready(notes: list[str]) -> None:
        made.keep()
        if directory is not None:
            process.leave_terminal(directory)
        process.tell_parent(notes=notes)

    daemon.run(config, ready)


# ---- status, flush, unmount


@main.command()
@click.argument("place", type=_PATH, required=False, metavar="[MOUNTPOINT|CACHE]")
@click.option("--json", "as_json", is_flag=True, help="For programs; a list without MOUNTPOINT.")
def status(place: Path | None, as_json: bool) -> None:
    """Show the state of a mount, or of all your mounts.

    Dead mounts and daemons that do not answer come first. For a cache that is not mounted, the command shows what is
    in the cache, and changes nothing. The exit status is 3 if a daemon does not answer, and 4 if one has died.
    """
    if place is None:
        found = overview.all_mounts()
    else:
        one = overview.one_mount(canonical(place))
        if one is None and caches.exists(place):
            one = overview.one_cache(Path(os.path.realpath(place)))
        if one is None:
            raise NobodyError(f"no cachefsd serves {canonical(place)}, and there is no cache in it")
        found = [one]
    if as_json:
        click.echo(json.dumps(found[0] if place is not None else found, indent=2))
    else:
        _show(found)
    if number := trouble.exit_status(found):
        raise click.exceptions.Exit(number)


def _show(found: list[dict[str, Any]]) -> None:
    served = [one for one in found if one["state"] == overview.SERVING]
    for one in found:
        if one["state"] == overview.OFFLINE:
            lines = list(trouble.lines_of_cache(one))
            click.echo("\n".join([one["cache"], *(f"{name:<8}  {value}".rstrip() for name, value in lines)]))
        elif one["state"] != overview.SERVING:
            click.echo(trouble.sentence(one))
    if served:
        from cachefsd.cli import show

        show.show_status(served)
    elif not found:
        click.echo("no cachefsd is running")


@main.command()
@click.argument("path", type=_PATH, required=False)
@click.option(
    "--keep",
    type=click.Choice(["cache", "backing", "both"]),
    help="Which version PATH has from now on; both: each keeps its name.",
)
def resolve(path: Path | None, keep: str | None) -> None:
    """Choose between two versions of a file changed behind the mount.

    A file has two versions after a mount if it was changed or removed in the bare backing while data for it waited in
    the cache. The version of the backing is at PATH. The version of the cache is beside it, and is called
    PATH.cachefsd-conflict-DATE-N. Without --keep the command lists the conflicts: that of PATH, those of the mount
    point PATH, or all.
    """
    if path is None:
        served = [one for one in overview.all_mounts() if one["state"] == overview.SERVING]
        _show_conflicts([each for about in served for each in conflicts.told(about)])
        return
    mountpoint, inside = conflicts.within(path)
    found = conflicts.listed(mountpoint, inside)
    if keep is None:
        _show_conflicts(found)
        return
    if not found:
        raise UserError(f"{path} has no conflict; `cachefsd resolve {mountpoint}` lists those that there are")
    if not inside:
        raise UserError(f"name one file to keep a version of; `cachefsd resolve {mountpoint}` lists them")
    for each in found:
        conflicts.resolve(mountpoint, each, keep)


def _show_conflicts(found: list[conflicts.Listed]) -> None:
    for each in found:
        text = f"{each.path}: {each.why} behind the mount, found {each.since}; the cache's version is {each.copy}"
        click.echo(text.encode("utf-8", "surrogateescape"))
    if not found:
        click.echo("there are no conflicts")


@main.command()
@click.argument("mountpoint", type=_PATH)
def flush(mountpoint: Path) -> None:
    """Write back everything that is dirty now.

    The command returns when all of it is in the backing, and synced.
    """
    _flush(canonical(mountpoint))


def _sync_pages(mountpoint: Path) -> None:
    """Have the kernel hand over what it holds, so that it is written back as well."""
    fd = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY)
    try:
        syscalls.syncfs(fd)
    finally:
        os.close(fd)


def _flush(mountpoint: Path) -> None:
    control.ask(mountpoint, "status")  # where nobody answers, to sync would hang
    _sync_pages(mountpoint)
    about = control.ask(mountpoint, "status")
    total = about["dirty_bytes"]
    with _bar("writing back") as progress:
        control.ask(
            mountpoint,
            "flush",
            lambda blocks: progress(max(0, total - blocks * about["block_size"]), total),
        )


@main.command()
@click.argument("mountpoint", type=_PATH)
@click.option("--flush", "flush_first", is_flag=True, help="Write everything back before.")
@click.option("--lazy", is_flag=True, help="Also while files are in use: they lose their file system.")
def unmount(mountpoint: Path, flush_first: bool, lazy: bool) -> None:
    """Unmount; dirty data stays in the cache.

    The command returns when the daemon has ended. It says which data stays in the cache.
    """
    place = canonical(mountpoint)
    entry = mounts.find_mount(place)
    if entry is None or entry.fstype != mounts.FSTYPE:
        raise UserError(f"cachefsd is not mounted on {place}")
    try:
        about = control.ask(place, "status")
    except SilentError as error:
        if flush_first or not lazy:
            raise SilentError(f"{error}; `umount -f -l {place}` takes it off all the same") from None
        _unmount_dead(place)
        return
    except UserError:
        if flush_first:
            raise
        _unmount_dead(place)  # whatever is there, nobody serves it
        mounts.detach_all_dead(place, mounts.FSTYPE)
        return
    if flush_first:
        _flush(place)
    pid = about["pid"]
    try:
        process_fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    deadline = time.monotonic() + _BUSY_S
    while True:
        try:
            mounts.detach(place, lazy=lazy)
            break
        except mounts.BusyError as error:
            if time.monotonic() > deadline:
                raise UserError(f"{error}: {users.text_of(entry)}") from None
        time.sleep(0.05)
    if not lazy and not select.select([process_fd], [], [], _END_S)[0]:
        raise UserError(f"{place} is unmounted, but its daemon (process {pid}) has not ended yet")
    if lazy and not select.select([process_fd], [], [], _LAZY_S)[0]:
        click.echo(f"{place} is unmounted; its daemon (process {pid}) ends when the last file is closed")
        return
    click.echo(trouble.left_behind(about, overview.left_in(place, Path(about["cache"]))))


def _unmount_dead(place: Path) -> None:
    about = overview.one_mount(place) or {"mountpoint": os.fspath(place)}
    mounts.detach_dead(place)
    left = overview.left_in(place, Path(about["cache"])) if "cache" in about else None
    click.echo(trouble.left_behind(about, left))
