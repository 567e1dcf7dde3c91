"""The directory of a cache: held by descriptor, private to its owner, and locked."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path
from typing import Self

from cachefsd.errors import ForeignError, InUseError, UserError

LOCK_NOTE = "lock"
"""Says who the owner is, for messages only."""
READ_ONLY = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
"""How a file of a cache is opened to be looked at. O_NONBLOCK: a FIFO must not make us wait for its other end."""
_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


class PrivateDirectory:
    """A directory in which nobody but its owner, who is us, may write.

    It is held by its descriptor: what is found in it stays found, wherever somebody who may write to a directory
    above makes its path lead. What others may read is made private on opening.
    """

    def __init__(self, path: Path, above: PrivateDirectory | None = None) -> None:
        """Open ``path``, or the directory of its name in ``above``.

        :raises OSError: it cannot be opened; a symbolic link is not followed.
        :raises UserError: others can change what is in it.
        """
        self.path = path
        self.fd = os.open(above.within(path.name) if above else path, _DIRECTORY)
        try:
            make_private(self.fd, path)
        except BaseException:
            self.close()
            raise

    @classmethod
    def create(cls, path: Path) -> Self:
        """Make the directory if there is none, and open it."""
        _make_parents(path.parent)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        return cls(path)

    def close(self) -> None:
        """Close it, which unlocks it."""
        os.close(self.fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def within(self, name: str) -> Path:
        """A path that leads to ``name`` in this very directory, for those who take nothing but paths."""
        return Path(f"/proc/self/fd/{self.fd}") / name

    def has(self, name: str) -> bool:
        """Whether there is something of this name."""
        return os.path.lexists(self.within(name))

    def open_file(self, name: str, flags: int) -> int:
        """Open, or with O_CREAT create, a regular file that is as private as the directory.

        :raises OSError: it cannot be opened; a symbolic link is not followed.
        :raises UserError: it is something else, or others can change it.
        """
        # O_NONBLOCK: a FIFO must not make us wait for its other end.
        fd = os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600, dir_fd=self.fd)
        try:
            path = self.path / name
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise ForeignError(f"{path}: not a regular file")
            make_private(fd, path)
        except BaseException:
            os.close(fd)
            raise
        return fd

    def sync(self) -> None:
        """Make the names in it durable."""
        os.fsync(self.fd)

    def lock(self, *, shared: bool = False) -> None:
        """Keep others from replacing what is in the directory; ``shared``: let it be used by others meanwhile.

        :raises InUseError: somebody uses it.
        """
        lock(self.fd, self, shared=shared)

    def sign(self) -> None:
        """Note that this process owns the cache, unless there is no space for the note."""
        try:
            with open(self.open_file(LOCK_NOTE, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
                file.write(f"{os.getpid()}\n")
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise

    def holder(self) -> str:
        """Who owns the cache, as far as it is known: a text to be appended to others."""
        try:
            with open(self.open_file(LOCK_NOTE, os.O_RDONLY)) as file:
                return f" (process {int(file.read(32))})"
        except (OSError, ValueError, UserError):
            return ""


def lock(fd: int, directory: PrivateDirectory, *, shared: bool = False) -> None:
    """Lock the open file ``fd`` of a cache, or its directory, until it is closed.

    :raises InUseError: somebody else has.
    """
    try:
        fcntl.flock(fd, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        holder = directory.holder()
        raise InUseError(f"{directory.path}: the cache is in use by another daemon{holder}") from error


def make_private(fd: int, path: Path) -> None:
    """Take from others what rights they have to the open file or directory ``fd``.

    :raises UserError: it is not ours, or they had the right to write: who knows what they have done with it.
    """
    status = os.fstat(fd)
    if status.st_uid != os.geteuid():
        raise UserError(f"{path}: belongs to another user (id {status.st_uid}), who could change what is in it")
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o022:  # an access control list that lets anybody write shows in the bits of the group
        raise UserError(f"{path}: others may write to it (mode {mode:04o}); if you trust what is in it, chmod go-w")
    if mode & 0o077:
        os.fchmod(fd, mode & ~0o077)


def sync_directory(path: Path) -> None:
    """Make the names in the directory ``path`` durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _make_parents(path: Path) -> None:
    """Make missing directories, writable by us alone whatever the umask is."""
    if not path.is_dir():
        _make_parents(path.parent)
        path.mkdir(mode=0o755, exist_ok=True)
