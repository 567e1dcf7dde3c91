"""Ending a conflict: what a person has chosen is done through the mount, durably, and then the daemon forgets it.

Whatever comes in between, the conflict stays listed until the end, and the same choice can be made again.
"""

from __future__ import annotations

import errno
import os
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from cachefsd.backing import syscalls
from cachefsd.errors import UserError
from cachefsd.fuse import mounts
from cachefsd.service import control
from cachefsd.service.places import canonical

# Users of the mount may put links in our way: none is followed, and no other file system entered.
_BENEATH: Final = syscalls.OpenHow(
    os.O_RDONLY | os.O_DIRECTORY,
    syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS | syscalls.RESOLVE_NO_XDEV,
)


@dataclass(frozen=True, slots=True)
class Listed:
    """A conflict as the daemon tells it; paths are from the mount point."""

    id: int
    path: str
    copy: str
    since: str
    why: str


def within(path: Path) -> tuple[Path, str]:
    """The mount point that ``path`` is below, and where it is from there: empty for the mount point itself.

    :raises UserError: it is below none.
    """
    place = canonical(path.parent) / path.name if path.name not in ("", "..") else canonical(path)
    for above in (place, *place.parents):
        entry = mounts.find_mount(above)
        if entry is not None and entry.fstype == mounts.FSTYPE:
            return above, os.fspath(place.relative_to(above)) if place != above else ""
    raise UserError(f"{path} is not on a mount of cachefsd")


def listed(mountpoint: Path, inside: str) -> list[Listed]:
    """The conflicts of a mount, or those of one of its files, named by its own path or by that of its other version.

    :raises UserError: the daemon does not answer.
    """
    found = told(control.ask(mountpoint, "status"))
    return [each for each in found if inside in ("", each.path, each.copy)]


def told(status: dict[str, Any]) -> list[Listed]:
    """The conflicts that a status tells of; an older daemon tells of none."""
    names = ("id", "path", "copy", "since", "why")
    return [Listed(*(each[name] for name in names)) for each in status.get("conflicts", ())]


def resolve(mountpoint: Path, conflict: Listed, keep: str) -> None:
    """Keep the ``cache``'s version, the ``backing``'s, or ``both``.

    :raises UserError: it can't be done; the conflict stays.
    """
    try:
        with ExitStack() as undo:
            root = os.open(mountpoint, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, root)
            copy_in, copy = _opened(root, conflict.copy, undo)
            if keep == "backing":
                with suppress(FileNotFoundError):  # an earlier try has removed it
                    os.unlink(copy, dir_fd=copy_in)
                os.fsync(copy_in)
            elif keep == "cache":
                path_in, name = _opened(root, conflict.path, undo)
                _replace(copy_in, copy, path_in, name)
    except OSError as error:
        if error.errno == errno.ENOENT:
            raise UserError(
                f"{mountpoint / conflict.copy} or {mountpoint / conflict.path} has moved: put things right by hand,"
                " and end the conflict with --keep both"
            ) from error
        raise UserError(f"cannot resolve the conflict of {conflict.path}: {error.strerror}") from error
    control.ask(mountpoint, "forget-conflict", arguments={"id": conflict.id})


def _opened(root: int, path: str, undo: ExitStack) -> tuple[int, str]:
    """The directory of a path, opened, and the last name."""
    directory, _, name = path.rpartition("/")
    fd = _BENEATH.openat2(root, os.fsencode(directory or "."))
    undo.callback(os.close, fd)
    return fd, name


def _replace(copy_in: int, copy: str, path_in: int, name: str) -> None:
    fd = os.open(copy, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=copy_in)
    try:
        os.rename(copy, name, src_dir_fd=copy_in, dst_dir_fd=path_in)
        os.fsync(fd)
    finally:
        os.close(fd)
    for directory in (copy_in, path_in):
        os.fsync(directory)
