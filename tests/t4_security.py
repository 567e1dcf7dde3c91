"""Privileges that go before a write is acknowledged, files of others, and who may touch what belongs to a cache."""

from __future__ import annotations

import contextlib
import mmap
import os
import shutil
import socket
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support_daemon import Daemon, MakeDaemon, cachefsd, daemons, make_daemon, public_directory
from support_fs import loop_mounted, run
from support_posix import as_user, attempt

from cachefsd.errors import UserError
from cachefsd.fuse import mounting, mounts, session
from cachefsd.fuse.operations import Operations
from cachefsd.media.catalog import create_catalog, open_catalog
from cachefsd.media.pool import open_pool
from cachefsd.media.poolfile import create_pool
from cachefsd.service import places
from cachefsd.service.control import ControlServer

__all__ = ["make_daemon"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming other users needs root")

OWNER, OTHER = 1001, 1002
CAPABILITY = "security.capability"
CAP_NET_RAW = bytes.fromhex("0100000200200000000000000000000000000000")
SIZE = 16 << 20


# ---- setuid, setgid and capabilities (O10)


class Disk:
    """An ext4 of which a copy can be made at any time, as a power cut would leave it."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "ext4"
        self._image = directory / "ext4.img"
        self._copy = directory / "copy.img"
        self._aside = directory / "copy"
        self._aside.mkdir()

    @contextlib.contextmanager
    def after_power_cut(self) -> Iterator[Path]:
        run("cp", "--sparse=always", self._image, self._copy)
        run("mount", "-o", "loop", self._copy, self._aside)
        try:
            yield self._aside
        finally:
            run("umount", self._aside)
            self._copy.unlink()

    def modes(self) -> dict[str, int]:
        """The permissions of all files, after a power cut now."""
        with self.after_power_cut() as root:
            return {path.name: stat.S_IMODE(path.stat().st_mode) for path in (root / "backing").iterdir()}

    def privileges(self, name: str) -> tuple[int, bool]:
        """The setuid and setgid bits, and whether there are capabilities, after a power cut now."""
        with self.after_power_cut() as root:
            mode = (root / "backing" / name).stat().st_mode
            return mode & (stat.S_ISUID | stat.S_ISGID), CAPABILITY in os.listxattr(root / "backing" / name)


@pytest.fixture(scope="module")
def disk_and_daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Disk, Daemon]]:
    directory = tmp_path_factory.mktemp("disk")
    with loop_mounted("ext4", directory, size_mib=16), public_directory() as base, daemons(base) as make:
        (directory / "ext4" / "backing").mkdir(mode=0o755)
        for above in base.rglob("*"):
            above.chmod(0o755)
        daemon = make(directory / "ext4" / "backing", options=("dirty_age=3600",))
        daemon.mountpoint.parent.chmod(0o755)
        yield Disk(directory), daemon


def opened_with_truncation(path: Path) -> None:
    os.close(os.open(path, os.O_WRONLY | os.O_TRUNC))


def written(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x")
    os.close(fd)


def written_whole_blocks(path: Path) -> None:
    fd = os.open(path, os.O_WRONLY)
    os.write(fd, b"x" * 8192)
    os.close(fd)


def truncated(path: Path) -> None:
    os.truncate(path, 100)


def given_away(path: Path) -> None:
    os.chown(path, -1, OWNER)


CHANGES = [opened_with_truncation, written, written_whole_blocks, truncated, given_away]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("uid", [OWNER, OTHER, 0], ids=["owner", "other", "root"])
def test_privileges_are_durably_gone_when_a_change_is_acknowledged(
    disk_and_daemon: tuple[Disk, Daemon], uid: int
) -> None:
    disk, daemon = disk_and_daemon
    names = {change: f"{change.__name__}-{uid}" for change in CHANGES}
    for name in names.values():
        (daemon.path / name).write_bytes(b"program" * 1000)
        os.chown(daemon.path / name, OWNER, OWNER)
        os.chmod(daemon.path / name, 0o6777)
        os.setxattr(daemon.path / name, CAPABILITY, CAP_NET_RAW)
    if uid == OWNER:
        daemon.remount()  # nothing is known of the files
    run("sync", "--file-system", disk.path)
    for change, name in names.items():
        assert disk.privileges(name) == (stat.S_ISUID | stat.S_ISGID, True)
        done = as_user(uid, uid, [], lambda: attempt(change, daemon.path / name))  # noqa: B023
        kept: tuple[int, bool] = (0, False)
        if change is given_away and uid == OTHER:
            assert done == "EPERM"
            kept = (stat.S_ISUID | stat.S_ISGID, True)
        else:
            assert done is None
            if change is not given_away and uid == 0:
                kept = (stat.S_ISUID | stat.S_ISGID, False)  # as Linux does when root writes
        mode, names_of_xattrs = (daemon.path / name).stat().st_mode, os.listxattr(daemon.path / name)
        assert (mode & (stat.S_ISUID | stat.S_ISGID), CAPABILITY in names_of_xattrs) == kept
        assert disk.privileges(name) == kept, change.__name__


def written_through_a_map(path: Path) -> None:
    fd = os.open(path, os.O_RDWR)
    with mmap.mmap(fd, 4096) as memory:
        memory[:1] = b"x"
        memory.flush()
    os.close(fd)


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "left"), [(0o4766, 0o766), (0o2776, 0o776), (0o2766, 0o2766), (0o6766, 0o2766)])
@pytest.mark.parametrize("link", [False, True], ids=["name", "second-name"])
def test_setgid_without_execution_stays(disk_and_daemon: tuple[Disk, Daemon], mode: int, left: int, link: bool) -> None:
    """It means mandatory locks then, and gives nobody any rights."""
    disk, daemon = disk_and_daemon
    changes = {
        f"{change.__name__}-{mode:o}-{link}": change
        for change in (opened_with_truncation, written, written_whole_blocks, truncated, written_through_a_map)
    }
    for name in changes:
        (daemon.path / name).write_bytes(b"program" * 1000)
        os.chown(daemon.path / name, OWNER, OWNER)
        os.chmod(daemon.path / name, mode)
        if link:
            os.link(daemon.path / name, daemon.path / f"{name}-link")
    run("sync", "--file-system", disk.path)
    assert {disk.modes()[name] for name in changes} == {mode}
    for name, change in changes.items():
        as_user(OTHER, OTHER, [], change, daemon.path / (f"{name}-link" if link else name))
    after = disk.modes()
    for name in changes:
        assert (name, after[name]) == (name, left)
        assert stat.S_IMODE((daemon.path / name).stat().st_mode) == left
        for path in (daemon.path / name, daemon.path / f"{name}-link"):
            path.unlink(missing_ok=True)


def test_what_was_set_after_the_open_goes_with_the_next_write(disk_and_daemon: tuple[Disk, Daemon]) -> None:
    disk, daemon = disk_and_daemon
    path = daemon.path / "set-later"
    path.write_bytes(b"program" * 1000)
    path.chmod(0o777)
    fd = os.open(path, os.O_WRONLY)
    try:
        for number in range(3):
            os.pwrite(fd, b"dirty" * 1000, 0)
            os.chmod(path, 0o6777)
            os.setxattr(path, CAPABILITY, CAP_NET_RAW)
            run("sync", "--file-system", disk.path)
            assert disk.privileges(path.name) == (stat.S_ISUID | stat.S_ISGID, True)
            assert as_user(OTHER, OTHER, [], os.pwrite, fd, b"other" * 1000, number) == 5000
            assert disk.privileges(path.name) == (0, False)
            assert (path.stat().st_mode & 0o7000, os.listxattr(path)) == (0, [])
    finally:
        os.close(fd)


def overwritten(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    assert os.pwrite(fd, data, 0) == len(data)
    os.close(fd)


def truncated_and_written(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_TRUNC)
    assert os.write(fd, data) == len(data)
    os.close(fd)


def cut_and_written(path: Path, data: bytes) -> None:
    os.truncate(path, 0)
    fd = os.open(path, os.O_WRONLY)
    assert os.pwrite(fd, data, 0) == len(data)
    os.close(fd)


@pytest.mark.parametrize("change", [overwritten, truncated_and_written, cut_and_written])
def test_a_program_that_another_user_has_changed_runs_without_its_owners_rights(
    shared: Daemon, change: Callable[[Path, bytes], None]
) -> None:
    """The kernel goes by the mode it has in memory, and asks for no other before it runs a program."""
    program = Path(shutil.which("id") or "/usr/bin/id").read_bytes()
    path = shared.path / "program"
    path.write_bytes(program)
    os.chown(path, OWNER, OWNER)
    path.chmod(0o4777)

    def whose() -> int:
        return int(subprocess.run([path, "-u"], capture_output=True, check=True).stdout)

    assert as_user(OTHER, OTHER, [], whose) == OWNER
    as_user(OTHER, OTHER, [], change, path, program)
    assert as_user(OTHER, OTHER, [], whose) == OTHER
    assert path.stat().st_mode & 0o7000 == 0


def test_only_its_owner_takes_setuid_away_by_giving_a_file_to_nobody_else(shared: Daemon) -> None:
    path = shared.path / "program"
    path.write_bytes(b"program" * 1000)
    os.chown(path, OWNER, OWNER)
    path.chmod(0o4777)
    as_user(OTHER, OTHER, [], lambda: attempt(os.chown, path, -1, -1))
    assert stat.S_IMODE(path.stat().st_mode) == 0o4777
    as_user(OWNER, OWNER, [], os.chown, path, -1, -1)
    assert stat.S_IMODE(path.stat().st_mode) == 0o777


def test_privileges_set_after_a_write_survive_its_writeback(disk_and_daemon: tuple[Disk, Daemon]) -> None:
    disk, daemon = disk_and_daemon
    path = daemon.path / "installed"
    path.write_bytes(b"program" * 1000)
    os.chown(path, OWNER, OWNER)
    os.chmod(path, 0o6755)
    os.setxattr(path, CAPABILITY, CAP_NET_RAW)
    daemon.flush()
    assert (disk.path / "backing" / "installed").read_bytes() == b"program" * 1000
    assert disk.privileges("installed") == (stat.S_ISUID | stat.S_ISGID, True)
    assert os.getxattr(disk.path / "backing" / "installed", CAPABILITY) == CAP_NET_RAW


# ---- files of others


@pytest.fixture
def shared() -> Iterator[Daemon]:
    """A mount that every user can reach, on ext4, which gives numbers of inodes away again."""
    with public_directory() as base, loop_mounted("ext4", base), daemons(base) as make:
        (base / "ext4").chmod(0o755)
        backing = base / "ext4" / "backing"
        backing.mkdir()
        backing.chmod(0o1777)
        daemon = make(backing, options=("dirty_age=3600",))
        daemon.mountpoint.parent.chmod(0o755)
        yield daemon


def test_what_was_cached_cannot_be_read_once_it_is_forbidden(shared: Daemon) -> None:
    secret = shared.path / "secret"
    secret.write_bytes(b"for all at first" * 1000)
    os.chown(secret, OWNER, OWNER)
    secret.chmod(0o644)
    assert as_user(OTHER, OTHER, [], secret.read_bytes) == b"for all at first" * 1000
    as_user(OWNER, OWNER, [], secret.chmod, 0o600)
    as_user(OWNER, OWNER, [], secret.write_bytes, b"for nobody else" * 1000)
    assert as_user(OTHER, OTHER, [], lambda: attempt(secret.read_bytes)) == "EACCES"
    assert as_user(OTHER, OTHER, [], lambda: attempt(secret.write_bytes, b"")) == "EACCES"
    assert as_user(OTHER, OTHER, [], lambda: attempt(os.truncate, secret, 0)) == "EACCES"
    secret.chmod(0o640)
    os.chown(secret, OWNER, 2000)
    assert as_user(OTHER, OTHER, [2000], secret.read_bytes) == b"for nobody else" * 1000
    shared.kill_and_mount()
    assert as_user(OTHER, OTHER, [], lambda: attempt(secret.read_bytes)) == "EACCES"
    assert as_user(OTHER, OTHER, [2000], secret.read_bytes) == b"for nobody else" * 1000


def test_a_directory_that_is_closed_hides_what_is_cached(shared: Daemon) -> None:
    home = shared.path / "home"
    home.mkdir()
    (home / "file").write_bytes(b"cached" * 1000)
    home.chmod(0o755)
    assert as_user(OTHER, OTHER, [], (home / "file").read_bytes) == b"cached" * 1000
    home.chmod(0o700)
    for call in (lambda: (home / "file").read_bytes(), lambda: os.listdir(home), lambda: os.stat(home / "file")):
        assert as_user(OTHER, OTHER, [], lambda call=call: attempt(call)) == "EACCES"


def test_a_new_file_never_shows_what_an_earlier_one_held(shared: Daemon) -> None:
    """The same number of inode, the same slots: another user extends an empty file over where secrets were."""

    def look(path: Path) -> tuple[int, bytes]:
        with open(path, "w+b") as file:
            file.write(b"mine")
            file.seek(10_000)
            file.write(b"end")
            file.truncate(60_000)
            file.seek(0)
            return os.fstat(file.fileno()).st_ino, file.read()

    numbers: list[int] = []
    seen: list[int] = []
    expected = (b"mine".ljust(10_000, b"\0") + b"end").ljust(60_000, b"\0")
    for number in range(20):
        secret = shared.path / f"secret-{number}"
        secret.write_bytes(b"secret" * 10_000)
        secret.chmod(0o600)
        numbers.append(secret.stat().st_ino)
        if number % 3 == 1:
            shared.flush()
        secret.unlink()
        if number % 5 == 4:
            shared.kill_and_mount()
        inode, found = as_user(OTHER, OTHER, [], look, shared.path / f"new-{number}")
        seen.append(inode)
        assert found == expected
    shared.flush()
    for number in range(20):
        assert (shared.backing / f"new-{number}").read_bytes() == expected
    assert set(numbers) & set(seen), "no number was used again: this has shown nothing"


def test_a_file_without_a_name_stays_its_owners(shared: Daemon) -> None:
    path = shared.path / "file"
    path.write_bytes(b"secret" * 2000)
    path.chmod(0o600)
    fd = os.open(path, os.O_RDWR)
    try:
        path.unlink()
        as_user(OTHER, OTHER, [], path.write_bytes, b"of another" * 2000)
        os.pwrite(fd, b"SECRET", 0)
        assert os.pread(fd, 12_000, 0) == b"SECRET" + (b"secret" * 2000)[6:]
        assert as_user(OTHER, OTHER, [], path.read_bytes) == b"of another" * 2000
        shared.flush()
        assert (shared.backing / "file").read_bytes() == b"of another" * 2000
    finally:
        os.close(fd)


# ---- files of the cache


def modes(top: Path) -> dict[str, int]:
    found = {".": stat.S_IMODE(top.stat().st_mode)}
    return found | {os.fspath(path.relative_to(top)): stat.S_IMODE(path.stat().st_mode) for path in top.rglob("*")}


def test_cache_files_are_private_whatever_the_umask(make_daemon: MakeDaemon, tmp_path: Path) -> None:
    daemon = make_daemon(mount=False)
    daemon.cache = tmp_path / "made" / "for" / "it" / "cache"
    before = os.umask(0)
    try:
        daemon.mount()
    finally:
        os.umask(before)
    (daemon.path / "file").write_bytes(b"x")
    private = {".": 0o700, "catalog": 0o700}
    files = ("pool", "lock", "cachefsd.log", "catalog/data.mdb", "catalog/lock.mdb")
    assert modes(daemon.cache) == private | dict.fromkeys(files, 0o600)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "made", tmp_path / "made" / "for")} == {0o755}
    path = places.socket_path(daemon.mountpoint)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_what_others_may_only_read_becomes_private(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    daemon.cache.mkdir(mode=0o755)
    daemon.mount()
    assert modes(daemon.cache)["."] == 0o700
    daemon.unmount()
    for name in (".", "catalog"):
        (daemon.cache / name).chmod(0o755)
    for name in ("pool", "catalog/data.mdb"):
        (daemon.cache / name).chmod(0o644)
    daemon.mount()
    assert set(modes(daemon.cache).values()) == {0o700, 0o600}


def refused(daemon: Daemon) -> str:
    words = ["--cache", daemon.cache, "--size", "16M", "--volatile"]
    done = cachefsd("mount", daemon.backing, daemon.mountpoint, *words, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1, done.stderr
    assert mounts.find_mount(daemon.mountpoint) is None
    return done.stderr


@pytest.mark.parametrize("name", [".", "pool", "catalog", "catalog/data.mdb", "catalog/lock.mdb"])
def test_what_others_could_have_changed_is_refused(make_daemon: MakeDaemon, name: str) -> None:
    daemon = make_daemon()
    daemon.unmount()
    path = daemon.cache / name
    mode = stat.S_IMODE(path.stat().st_mode)
    content = (daemon.cache / "pool").read_bytes()
    for bits in (0o020, 0o002):
        path.chmod(mode | bits)
        assert "others may write to it" in refused(daemon)
    path.chmod(mode)
    os.chown(path, OTHER, OTHER)
    assert "belongs to another user" in refused(daemon)
    os.chown(path, 0, 0)
    assert (daemon.cache / "pool").read_bytes() == content
    daemon.mount()


@pytest.mark.parametrize("name", ["pool", "lock", "catalog", "catalog/data.mdb", "catalog/lock.mdb", "cachefsd.log"])
def test_a_link_in_the_cache_is_not_followed(make_daemon: MakeDaemon, tmp_path: Path, name: str) -> None:
    daemon = make_daemon()
    daemon.unmount()
    path, aside = daemon.cache / name, tmp_path / "aside"
    shutil.move(path, aside)
    before = aside.read_bytes() if aside.is_file() else sorted(os.listdir(aside))
    path.symlink_to(aside)
    refused(daemon)
    assert (aside.read_bytes() if aside.is_file() else sorted(os.listdir(aside))) == before
    path.unlink()
    shutil.move(aside, path)
    daemon.mount()


def test_format_refuses_a_directory_that_others_may_write_to(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for change, words in (
        (lambda: cache.chmod(0o777), "others may write to it"),
        (lambda: os.chown(cache, OTHER, OTHER), "belongs to another user"),
    ):
        change()
        done = cachefsd("format", cache, "--size", "16M", check=False)
        assert done.returncode == 1
        assert words in done.stderr
        assert done.stderr.count("\n") == 1
        assert os.listdir(cache) == []


def test_what_a_cache_is_opened_as_stays_what_it_is(tmp_path: Path) -> None:
    """Somebody who may write to the directory above puts another one in its place."""
    cache, other = tmp_path / "cache", tmp_path / "other"
    for path in (cache, other):
        info = create_pool(path, SIZE, volatile=True)
        create_catalog(path, info.uuid, info.slots)
    with open_pool(cache, volatile=True) as pool:
        cache.rename(tmp_path / "moved")
        other.rename(cache)
        with pytest.raises(Exception, match="belongs to another pool"):
            open_catalog(cache, pool.uuid)
        pool.mark_open()  # its directory, and nothing else's
    with open_pool(cache, volatile=True) as pool:
        assert pool.was_clean
    with open_pool(tmp_path / "moved", volatile=True) as pool:
        assert not pool.was_clean


# ---- the control socket


def test_others_cannot_reach_the_control_socket(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    path = places.socket_path(daemon.mountpoint)

    def connect() -> Any:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as client:
            return attempt(client.connect, os.fspath(path))

    assert as_user(OTHER, OTHER, [], connect) == "EACCES"
    assert connect() is None


@pytest.fixture
def runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "run"
    monkeypatch.setattr(places, "runtime_directory", lambda: directory)
    return directory


async def test_a_link_at_the_sockets_place_is_replaced(runtime: Path, tmp_path: Path) -> None:
    runtime.mkdir(mode=0o700)
    target = tmp_path / "target"
    target.write_text("kept")
    path = places.socket_path(tmp_path)
    path.symlink_to(target)
    with ControlServer(tmp_path, {}).listening():
        assert stat.S_ISSOCK(path.lstat().st_mode)
    assert target.read_text() == "kept"
    assert not os.path.lexists(path)


@pytest.mark.parametrize("how", ["link", "writable", "foreign"])
async def test_a_socket_directory_of_others_is_refused(runtime: Path, tmp_path: Path, how: str) -> None:
    real = tmp_path / "real"
    real.mkdir(mode=0o700)
    if how == "link":
        runtime.symlink_to(real)
    else:
        real.rename(runtime)
        runtime.chmod(0o777) if how == "writable" else os.chown(runtime, OTHER, OTHER)
    with pytest.raises(UserError), ControlServer(tmp_path, {}).listening():
        pass
    assert os.listdir(runtime) == []


# ---- the mount point


def test_a_mount_point_exchanged_for_a_link_leads_nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the mount point and the mount."""
    above, target = tmp_path / "above", tmp_path / "target"
    (above / "mnt").mkdir(parents=True)
    (target / "mnt").mkdir(parents=True)
    open_device = mounting._open_device

    def exchange() -> int:
        above.rename(tmp_path / "moved")
        above.symlink_to(target)
        return open_device()

    monkeypatch.setattr(mounting, "_open_device", exchange)
    with pytest.raises(UserError, match=r"cannot mount on .*/above/mnt: Too many levels of symbolic links"):
        session.mount(Operations.__new__(Operations), above / "mnt", fsname="test")
    assert not [entry for entry in mounts.mounts() if entry.mountpoint.startswith(os.fspath(tmp_path))]
