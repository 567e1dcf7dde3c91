"""An ordinary user mounts over a directory of theirs: without privileges, and without handles that can be opened."""

from __future__ import annotations

import os
import pwd
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyfuse3
import pytest
from support_daemon import public_directory, wait_until
from support_posix import as_user, attempt

import cachefsd.cli.main  # all of it: a user might not be able to read the project's directory
from cachefsd.fuse import mounts, session
from cachefsd.service.control import ask

USER = pwd.getpwnam("nobody").pw_uid  # fusermount3 wants to know its user by name
OTHER = 1001
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user needs root")


class UsersDaemon:
    """A daemon in a process of the user; it sees no other users' things, nor do others see its."""

    def __init__(self, base: Path) -> None:
        self.backing, self.mountpoint, self.home = base / "backing", base / "mnt", base / "home"
        for path in (self.backing, self.mountpoint, self.home):
            path.mkdir()
            os.chown(path, USER, USER)
        self.pid = 0

    def do(self, call: Callable[..., Any], *arguments: Any) -> Any:
        return as_user(USER, USER, [], call, *arguments)

    def mount(self, *, size: bool = True) -> None:
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.setgroups([])
                os.setresgid(USER, USER, USER)
                os.setresuid(USER, USER, USER)
                for name in ("XDG_RUNTIME_DIR", "XDG_STATE_HOME"):
                    os.environ[name] = os.fspath(self.home)
                places = [os.fspath(self.backing), os.fspath(self.mountpoint)]
                sys.argv[1:] = ["mount", *places, "--foreground", "-o", "dirty_age=3600"]
                sys.argv += ["--size", "16M"] * size
                cachefsd.cli.main.main()
                os._exit(0)
            except SystemExit as ended:
                os._exit(ended.code if isinstance(ended.code, int) else 1)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        wait_until(lambda: isinstance(self.control("status"), dict) or self.ended(), "the mount")
        assert self.pid, "the daemon has ended, see its standard error"

    def control(self, command: str) -> Any:
        def call() -> Any:
            os.environ["XDG_RUNTIME_DIR"] = os.fspath(self.home)
            try:
                return ask(self.mountpoint, command)
            except cachefsd.errors.UserError as error:
                return str(error)

        return self.do(call)

    def ended(self) -> bool:
        if os.waitpid(self.pid, os.WNOHANG)[0]:
            self.pid = 0
        return not self.pid

    def kill(self, number: int) -> int:
        os.kill(self.pid, number)
        _, status = os.waitpid(self.pid, 0)
        self.pid = 0
        return status


@pytest.fixture(autouse=True)
def device_for_everybody() -> Iterator[None]:
    """As udev's rules have it; a machine without udev may have it for root only."""
    device = Path("/dev/fuse")
    mode = device.stat().st_mode
    device.chmod(0o666)
    yield
    device.chmod(mode)


@pytest.fixture
def daemon() -> Iterator[UsersDaemon]:
    with public_directory() as base:
        result = UsersDaemon(base)
        try:
            yield result
        finally:
            if result.pid:
                result.kill(signal.SIGKILL)
            while (entry := mounts.find_mount(result.mountpoint)) and entry.fstype == mounts.FSTYPE:
                mounts.detach_dead(result.mountpoint)


def test_a_users_mount(daemon: UsersDaemon) -> None:
    daemon.mount()
    status = daemon.control("status")
    assert status["durability"] == "disk"
    assert status["cache"].startswith(f"{daemon.home}/cachefsd/")

    def work() -> list[Any]:
        root = daemon.mountpoint
        (root / "d").mkdir()
        (root / "d" / "file").write_bytes(b"x" * 100_000)
        (root / "read-only").write_bytes(b"r" * 5000)
        (root / "read-only").chmod(0o400)
        (root / "setuid").write_bytes(b"s" * 5000)
        (root / "setuid").chmod(0o4711)
        (root / "renamed").write_bytes(b"n" * 5000)
        (root / "renamed").rename(root / "d" / "new")
        fd = os.open(root / "created read-only", os.O_RDWR | os.O_CREAT, 0o444)
        os.write(fd, b"c" * 5000)
        os.fsync(fd)
        os.unlink(root / "created read-only")
        os.pwrite(fd, b"C", 0)
        seen = [os.pread(fd, 2, 0), attempt(os.chown, root / "d", 0, 0), attempt(os.mknod, root / "x", 0o60600, 1)]
        os.close(fd)
        return seen

    assert daemon.do(work) == [b"Cc", "EPERM", "EPERM"]
    # Nobody else gets in, root included.
    assert attempt(os.listdir, daemon.mountpoint) == "EACCES"
    assert as_user(OTHER, OTHER, [], lambda: attempt(os.listdir, daemon.mountpoint)) == "EACCES"

    def content(root: Path) -> dict[str, tuple[int, bytes]]:
        files = [path for path in root.rglob("*") if path.is_file()]
        return {os.fspath(path.relative_to(root)): (path.stat().st_mode & 0o7777, path.read_bytes()) for path in files}

    expected = {
        "d/file": (0o644, b"x" * 100_000),
        "d/new": (0o644, b"n" * 5000),
        "read-only": (0o400, b"r" * 5000),
        "setuid": (0o4711, b"s" * 5000),
    }
    assert daemon.do(content, daemon.mountpoint) == expected
    daemon.kill(signal.SIGKILL)
    # Renamed beneath while nobody looked: without handles it is found by looking everywhere.
    subprocess.run(["fusermount3", "-u", "-z", daemon.mountpoint], check=True)
    (daemon.backing / "d").rename(daemon.backing / "e")
    expected = {name.replace("d/", "e/"): value for name, value in expected.items()}
    daemon.mount()
    assert daemon.control("status")["recovery"]["blocks"] > 0
    assert daemon.do(content, daemon.mountpoint) == expected
    assert daemon.control("flush") == {"dirty_bytes": 0}
    assert content(daemon.backing) == expected
    assert daemon.kill(signal.SIGTERM) == 0
    assert mounts.find_mount(daemon.mountpoint) is None
    assert {path.stat().st_uid for path in daemon.backing.rglob("*")} == {USER}


def failure_of_mount(path: Path, programs: str) -> str:
    os.environ["PATH"] = programs
    try:
        session.mount(pyfuse3.Operations(), path, fsname="test")
    except cachefsd.errors.UserError as error:
        return str(error)
    return "mounted"


def test_why_a_mount_fails_is_told_in_the_words_of_fusermount3(daemon: UsersDaemon) -> None:
    os.chown(daemon.mountpoint, 0, 0)
    said = daemon.do(failure_of_mount, daemon.mountpoint, os.environ["PATH"])
    assert said.startswith(f"cannot mount on {daemon.mountpoint}: fusermount3: ")
    assert "access" in said
    assert "\n" not in said


def test_that_fusermount3_is_missing_is_said_before_mounting(daemon: UsersDaemon) -> None:
    said = daemon.do(failure_of_mount, daemon.mountpoint, os.fspath(daemon.home))
    assert said == "fusermount3 is not installed (Debian: apt install fuse3)"


def test_files_of_others_in_a_users_mount(daemon: UsersDaemon) -> None:
    (daemon.backing / "readable").write_bytes(b"root's")
    (daemon.backing / "secret").write_bytes(b"root's")
    (daemon.backing / "secret").chmod(0o600)
    daemon.mount()

    def work() -> list[Any]:
        root = daemon.mountpoint
        return [
            (root / "readable").read_bytes(),
            attempt((root / "readable").write_bytes, b"mine"),
            attempt((root / "secret").read_bytes),
            attempt(os.chmod, root / "secret", 0o666),
        ]

    assert daemon.do(work) == [b"root's", "EACCES", "EACCES", "EPERM"]
    assert daemon.kill(signal.SIGTERM) == 0
    assert (daemon.backing / "readable").read_bytes() == b"root's"


def test_a_killed_mount_over_itself_is_replaced(daemon: UsersDaemon) -> None:
    """Users cannot mount above a dead mount. Theirs is taken off, and the new one is there before the recovery."""
    daemon.mountpoint = daemon.backing
    daemon.mount()
    daemon.do((daemon.backing / "doc").write_text, "newer")
    for _ in range(2):
        daemon.kill(signal.SIGKILL)
        assert daemon.do(attempt, os.listdir, daemon.backing) == "ENOTCONN"
        daemon.mount()
        assert daemon.do((daemon.backing / "doc").read_text) == "newer"
        assert sum(entry.mountpoint == os.fspath(daemon.backing) for entry in mounts.mounts()) == 1
    assert os.WEXITSTATUS(daemon.kill(signal.SIGTERM)) == 0
    assert mounts.find_mount(daemon.backing) is None


def test_a_start_that_fails_leaves_the_dead_mount(daemon: UsersDaemon) -> None:
    daemon.mountpoint = daemon.backing
    daemon.mount()
    daemon.do((daemon.backing / "doc").write_text, "newer")
    daemon.kill(signal.SIGKILL)
    (pool,) = daemon.home.rglob("pool")
    pool.rename(pool.with_name("away"))
    with pytest.raises(AssertionError, match="the daemon has ended"):
        daemon.mount(size=False)
    assert daemon.do(attempt, os.listdir, daemon.backing) == "ENOTCONN"
    pool.with_name("away").rename(pool)
    daemon.mount()
    assert daemon.do((daemon.backing / "doc").read_text) == "newer"
