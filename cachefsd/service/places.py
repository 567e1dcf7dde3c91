"""Where things are: caches without a name of their own, and the sockets of running daemons."""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from cachefsd.fuse import mounts


def default_cache(backing: Path) -> Path:
    """The cache of a backing for which none was named: the same one every time."""
    digest = hashlib.blake2b(os.fsencode(backing), digest_size=4).hexdigest()
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", os.fspath(backing)).strip("-.")[-64:] or "root"
    return _state_directory() / f"{name}-{digest}"


def _state_directory() -> Path:
    if os.geteuid() == 0:
        return Path("/var/lib/cachefsd")
    state = os.environ.get("XDG_STATE_HOME", "")
    return (Path(state) if state.startswith("/") else Path.home() / ".local/state") / "cachefsd"


def runtime_directory() -> Path:
    """Where the control sockets are."""
    if os.geteuid() == 0:
        return Path("/run/cachefsd")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime) / "cachefsd" if runtime.startswith("/") else _state_directory() / "run"


def socket_path(mountpoint: Path) -> Path:
    """The control socket of the daemon that serves ``mountpoint``, an absolute path without links."""
    digest = hashlib.blake2b(os.fsencode(mountpoint), digest_size=8).hexdigest()
    return runtime_directory() / f"{digest}.sock"


def note_path(mountpoint: Path) -> Path:
    """Where the daemon of ``mountpoint`` notes what it serves. The note is still there when the daemon has died."""
    return socket_path(mountpoint).with_suffix(".json")


def canonical(path: str | os.PathLike[str]) -> Path:
    """``path`` absolute and without links; a mount of ours is not asked, it might not answer."""
    entry = mounts.find_mount(path)
    return Path(entry.mountpoint) if entry is not None else Path(os.path.realpath(path))


_KERNELS_OWN = {
    *("proc", "sysfs", "devtmpfs", "devpts", "cgroup", "cgroup2", "debugfs", "tracefs", "securityfs", "configfs"),
    *("bpf", "pstore", "efivarfs", "mqueue", "binfmt_misc", "fusectl", "nsfs", "rpc_pipefs", "selinuxfs"),
}
"""Types of file systems whose files are not data."""


def kernels_own(path: Path) -> str | None:
    """The type of the file system of ``path`` where that is an interface of the kernel or holds devices, or None."""
    try:
        fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return None  # those who use it tell why
    try:
        about = Path(f"/proc/self/fdinfo/{fd}").read_text()
    finally:
        os.close(fd)
    wanted = re.search(r"^mnt_id:\s*(\d+)$", about, re.MULTILINE)
    entry = next((entry for entry in mounts.mounts() if wanted and entry.mount_id == int(wanted[1])), None)
    if entry is None:
        return None
    # In containers it is an ordinary tmpfs.
    return entry.fstype if entry.fstype in _KERNELS_OWN or entry.mountpoint == "/dev" else None


def bytes_text(count: float) -> str:
    """``12.5 MiB``."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
