"""The mark on a backing: it says which cache has data that the backing may lack.

It is text for people, in an extended attribute of the root, or in a small file where the file system has none. Who
looks at the bare backing finds it; users of the mount neither see nor change it (:class:`~cachefsd.backing.tree.Tree`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cachefsd.backing import syscalls

ATTRIBUTE: Final = "user.cachefsd"
FILE: Final = b".cachefsd"
_NEW: Final = b".cachefsd.new"
_FIRST_LINE: Final = "cachefsd mark, version 1"
_ADVICE: Final = (
    "The cache may hold data that this directory lacks."
    " Mount this directory with that cache before you use it, and change no file here before."
)
_MAX_BYTES: Final = 3000
"""Extended attributes of an ext4 inode share one block."""
_MAX_PATH: Final = 2000
_NO_ATTRIBUTES: Final = (errno.EOPNOTSUPP, errno.ENOSPC, errno.E2BIG, errno.ERANGE, errno.EPERM, errno.EINVAL)
_UUID: Final = re.compile(r"[0-9a-f]{32}")
_TOKEN: Final = re.compile(r"[0-9a-f]{1,64}")


class DamagedMark(Exception):
    """There is a mark, and it does not say what a mark says."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a mark says."""

    uuid: str
    """of the cache's pool, 32 hexadecimal digits"""
    cache: str
    """where the cache is, for people: one line, without control characters"""
    session: str
    """changes with each start of the cache: a copy of the cache that was taken before does not know it"""
    since: str
    """UTC, for people"""
    boot: str = ""
    """of a cache that a reboot empties: the boot that it was made in"""

    def text(self) -> str:
        """The mark as it is stored."""
        lines = [_FIRST_LINE, f"cache: {self.cache}", f"uuid: {self.uuid}", f"session: {self.session}"]
        lines += [f"since: {self.since}", *([f"until-reboot-of: {self.boot}"] if self.boot else [])]
        lines += [f"advice: {_ADVICE}"]
        return "\n".join(lines) + "\n"


def for_people(path: str) -> str:
    """A path as a mark has it: one line, and not longer than a mark can hold."""
    shown = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in path)
    data = shown.encode("utf-8", "backslashreplace")
    return data[:_MAX_PATH].decode("utf-8", "ignore")


def parse(data: bytes) -> Mark:
    """The inverse of :meth:`Mark.text`.

    :raises DamagedMark: it is not the text of a mark.
    """
    try:
        lines = data.decode("utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise DamagedMark from error
    fields = dict(line.split(": ", 1) for line in lines[1:] if ": " in line)
    try:
        mark = Mark(
            fields["uuid"], fields["cache"], fields["session"], fields["since"], fields.get("until-reboot-of", "")
        )
    except KeyError as error:
        raise DamagedMark from error
    if lines[0] != _FIRST_LINE or not _UUID.fullmatch(mark.uuid) or not _TOKEN.fullmatch(mark.session):
        raise DamagedMark
    return mark


def read(root_fd: int) -> Mark | None:
    """The mark on the directory ``root_fd`` (O_PATH is enough), or None.

    :raises DamagedMark: there is one that says nothing.
    :raises OSError: it can't be read.
    """
    data = _read_attribute(root_fd)
    if data is None:
        data = _read_file(root_fd)
    return parse(data) if data is not None else None


def write(root_fd: int, mark: Mark) -> None:
    """Put the mark there in place of an older one, durably. Blocks.

    :raises OSError: it can't be done; what was there before is there still, or the new one.
    """
    data = mark.text().encode()
    try:
        os.setxattr(syscalls.proc_path(root_fd), ATTRIBUTE, data)
    except OSError as error:
        if error.errno not in _NO_ATTRIBUTES:
            raise
        _write_file(root_fd, data)
        return
    _sync(root_fd)


def remove(root_fd: int) -> None:
    """Take the mark away, durably, if there is one. Blocks.

    :raises OSError: it can't be done.
    """
    if _read_attribute(root_fd) is not None:
        os.removexattr(syscalls.proc_path(root_fd), ATTRIBUTE)
    if _read_file(root_fd) is not None:
        os.unlink(FILE, dir_fd=root_fd)
    _sync(root_fd)


def is_file(root_fd: int) -> bool:
    """Whether the mark is a file: its name then belongs to cachefsd."""
    return _read_file(root_fd) is not None


def _read_attribute(root_fd: int) -> bytes | None:
    try:
        return os.getxattr(syscalls.proc_path(root_fd), ATTRIBUTE)
    except OSError as error:
        if error.errno not in (errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES):
            raise
        return None


def _read_file(root_fd: int) -> bytes | None:
    try:
        fd = os.open(FILE, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=root_fd)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP, errno.EACCES, errno.ENXIO):
            raise
        return None
    try:
        about = os.fstat(fd)
        # In a directory that all may write to, a stranger's file must not keep anybody from mounting.
        trusted = about.st_uid in (0, os.geteuid(), os.fstat(root_fd).st_uid)
        if not stat.S_ISREG(about.st_mode) or not trusted:
            return None
        data = os.read(fd, _MAX_BYTES + 1)
    finally:
        os.close(fd)
    return data if data.startswith(b"cachefsd mark") or not data else None


def _write_file(root_fd: int, data: bytes) -> None:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with suppress(FileNotFoundError):
        os.unlink(_NEW, dir_fd=root_fd)  # of a start that was killed
    fd = os.open(_NEW, flags, 0o644, dir_fd=root_fd)
    try:
        os.write(fd, data)
        os.fsync(fd)
    finally:
        os.close(fd)
    os.rename(_NEW, FILE, src_dir_fd=root_fd, dst_dir_fd=root_fd)
    _sync(root_fd)


def _sync(root_fd: int) -> None:
    fd = os.open(b".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=root_fd)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
