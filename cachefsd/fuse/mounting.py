"""Mounting: a connection to the kernel over a directory, which nobody serves yet."""

from __future__ import annotations

import logging
import os
import shutil
import socket
import subprocess
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from dataclasses import dataclass

from cachefsd.backing import mountcalls, syscalls
from cachefsd.errors import UserError
from cachefsd.fuse import mounts, takeover
from cachefsd.fuse.mounts import FSTYPE, SUBTYPE

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Attached:
    """A mount that nobody serves yet: who uses it waits. Made by :func:`attach`."""

    mountpoint: str
    fd: int
    """of the connection; the mount is dead once it is closed"""
    direct: bool
    """Mounted without fusermount3."""
    dead: int = -1
    """a descriptor of the root of the dead mount that was there"""
    covered: bool = False
    """The dead mount is above the new one."""
    takes_over: bool = False

    def uncover(self) -> None:
        """See :meth:`Session.uncover`."""
        if not self.covered:
            return
        self.covered = False
        with suppress(OSError):  # somebody else was faster
            mountcalls.unmount(syscalls.proc_path(self.dead))
        log.warning("took the dead mount off %s", self.mountpoint)
        self.close()

    def close(self) -> None:
        """Forget the dead mount. May be called again."""
        if self.dead >= 0:
            os.close(self.dead)
            self.dead = -1

    def abandon(self) -> None:
        """Give up a mount before it has a session: it is dead, and taken off unless there was a dead one already."""
        os.close(self.fd)
        self.close()
        if not self.takes_over:
            mounts.detach_all_dead(self.mountpoint, FSTYPE)


def attach(mountpoint: str | os.PathLike[str], *, fsname: str, options: Iterable[str] = ()) -> Attached:
    """Mount over the directory ``mountpoint``; users of it wait until a session serves.

    A dead mount of ours there is replaced. As root that is done without a moment at which the directory beneath can be
    seen. ``fsname`` is shown as the source of the mount. ``options`` are mount options of mount(8) beyond
    ``default_permissions`` and, as root, ``allow_other``.

    :raises UserError: it can't be mounted; nothing has been.
    """
    path = os.path.abspath(mountpoint)
    _check_mountpoint(path)
    if os.geteuid() == 0:
        takeover.reduce_stack(path, FSTYPE)
        return _attach_directly(_real(path), fsname, options)
    require_helper()
    took_off = mounts.detach_all_dead(path, FSTYPE)
    if took_off:
        log.warning("took the dead mount off %s", path)
    attached = _attach_by_fusermount(_real(path), fsname, options)
    attached.takes_over = took_off
    return attached


def _real(path: str) -> str:
    """``path`` without links. A mount of ours is not asked, it might not answer."""
    entry = mounts.find_mount(path)
    return entry.mountpoint if entry is not None else os.path.realpath(path)


def require_helper() -> None:
    """See that what mounts and unmounts for ordinary users is there; root needs no help.

    :raises UserError: it is not.
    """
    if os.geteuid() != 0 and shutil.which("fusermount3") is None:
        raise UserError("fusermount3 is not installed (Debian: apt install fuse3)")


_MS_POSIXACL = 1 << 16
_FLAGS = {"ro": 1, "nosuid": 2, "nodev": 4, "noexec": 8, "dirsync": 128, "noatime": 1024}
_DEFAULTS = {"suid", "dev", "exec"}


def _attach_directly(path: str, fsname: str, options: Iterable[str]) -> Attached:
    """Mount without libfuse, which cannot pass MS_POSIXACL on.

    With it the kernel leaves the umask to us, and that is right only here: where a directory has a default ACL,
    there is no umask.
    """
    flags = _MS_POSIXACL
    for option in options:
        if option not in _DEFAULTS:
            flags |= _FLAGS[option]
    with ExitStack() as undo:
        fd = _open_device()
        undo.callback(os.close, fd)
        data = f"fd={fd},rootmode=40000,user_id=0,group_id=0,default_permissions,allow_other"
        try:
            # The path has been looked at without links: one that has come since then must not lead the mount elsewhere.
            place = takeover.ROOT.openat2(-1, os.fsencode(path))
            undo.callback(os.close, place)
            below = mounts.mount_of(place)
            attached = Attached(path, fd, direct=True)
            if below is not None and below.fstype == FSTYPE and below.mountpoint == path:
                if not mounts.is_dead(place):
                    raise _busy(path)
                attached.dead, attached.takes_over = place, True
            mountcalls.mount(os.fsencode(fsname), syscalls.proc_path(place), FSTYPE.encode(), flags, data.encode())
            if attached.takes_over:
                attached.covered = takeover.slip_beneath(path, place)
        except OSError as error:
            hint = "; is CAP_SYS_ADMIN missing?" if isinstance(error, PermissionError) else ""
            raise UserError(f"cannot mount on {path}: {error.strerror}{hint}") from None
        undo.pop_all()
    if not attached.takes_over:
        os.close(place)
    elif not attached.covered:
        log.info("the dead mount on %s stays beneath the new one until that is unmounted", path)
    return attached


def _attach_by_fusermount(path: str, fsname: str, options: Iterable[str]) -> Attached:
    """Mount with fusermount3, which is setuid. It sends the connection's descriptor through a socket."""
    _check_device()
    wanted = ["default_permissions", f"fsname={_escape(fsname)}", f"subtype={SUBTYPE}", *options]
    ours, theirs = socket.socketpair()
    with ours, theirs:
        try:
            done = subprocess.run(
                ["fusermount3", "-o", ",".join(wanted), "--", path],
                env=os.environ | {"_FUSE_COMMFD": str(theirs.fileno())},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                check=False,
            )
        except FileNotFoundError:
            raise UserError(
                f"cannot mount on {path}: fusermount3 is not installed (Debian: apt install fuse3)"
            ) from None
        if done.returncode:
            said = os.fsdecode(done.stderr).strip().replace("\n", "; ") or f"fusermount3 said {done.returncode}"
            raise UserError(f"cannot mount on {path}: {said}")
        theirs.close()
        _, fds, _, _ = socket.recv_fds(ours, 1, 1)
    if len(fds) != 1:
        raise UserError(f"cannot mount on {path}: fusermount3 sent no descriptor")
    os.set_inheritable(fds[0], False)
    return Attached(path, fds[0], direct=False)


def _busy(path: str) -> UserError:
    return UserError(f"{path} is busy: cachefsd is mounted there already")


def _check_mountpoint(path: str) -> None:
    # First by the mount table: an unserved mount would block the stat below, perhaps for ever.
    entry = mounts.find_mount(path)
    if entry is not None and entry.fstype == FSTYPE:
        if takeover.is_dead(path, FSTYPE):
            return
        raise _busy(path)
    try:
        if not os.path.isdir(os.path.realpath(path, strict=True)):
            raise UserError(f"{path} is not a directory")
    except OSError as error:
        raise UserError(f"cannot mount on {path}: {error.strerror}") from None


def _check_device() -> None:
    os.close(_open_device())


def _open_device() -> int:
    try:
        return os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        hint = "" if isinstance(error, PermissionError) else " (is the fuse module loaded?)"
        raise UserError(f"cannot open /dev/fuse: {error.strerror}{hint}") from None


def _escape(fsname: str) -> str:
    """``fsname`` for an option list of libfuse, which splits at commas, and pyfuse3, which wants ASCII."""
    printable = fsname.encode("ascii", "replace").decode()
    return printable.replace("\\", "\\\\").replace(",", "\\,")
