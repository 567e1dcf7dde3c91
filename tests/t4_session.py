"""A session on a real mount, with the pump and with pyfuse3's stock loop."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support_daemon import mounts_at, watched

from cachefsd.errors import UserError
from cachefsd.fuse import handshake, mounting, mounts, session, takeover

SERVER = Path(__file__).parent / "session_server.py"
PATIENCE_S = 180

pytestmark = pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse here")

Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def mountpoint(tmp_path: Path) -> Path:
    path = tmp_path / "mnt"
    path.mkdir()
    return path


@pytest.fixture
def start() -> Iterator[Start]:
    """``start(mountpoint, *arguments)`` runs a server and returns when it is mounted."""
    started: list[tuple[Path, subprocess.Popen[str]]] = []

    def start(where: Path, *arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(SERVER), os.fspath(where), *arguments]
        environment = os.environ | {"PYTHONPATH": str(SERVER.parent.parent)}
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        started.append((where, server))
        assert server.stdout is not None
        assert server.stdout.readline() == "ready\n", server.communicate()[1]
        return server

    yield start
    for where, server in started:
        server.kill()
        server.communicate()
        while mounts.find_mount(where) is not None:
            mounts.detach_dead(where)


@pytest.fixture(params=["pump", "stock"])
def loop(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def fuse_control(tmp_path: Path) -> Iterator[Path]:
    """The directory of FUSE connections, in a place of its own: a test beside this one may unmount the usual one."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    path = tmp_path / "connections"
    path.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def finish(server: subprocess.Popen[str]) -> tuple[int, str]:
    """(exit status, standard error) of a server that ends by itself."""
    _, errors = server.communicate(timeout=PATIENCE_S)
    return server.returncode, errors


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def read(mountpoint: Path, name: str) -> bytes:
    return (mountpoint / name).read_bytes()


def test_requests_are_served(mountpoint: Path, start: Start, loop: str) -> None:
    start(mountpoint, "--loop", loop)
    for _ in range(2000):
        assert read(mountpoint, "fast") == b"fast"
    with pytest.raises(FileNotFoundError):
        read(mountpoint, "nothing")


def test_handlers_that_wait_do_not_stop_others(mountpoint: Path, start: Start, loop: str) -> None:
    server = start(mountpoint, "--loop", loop)
    answers: list[bytes] = []
    clients = [
        threading.Thread(target=lambda: answers.append(read(mountpoint, "slow")), daemon=True) for _ in range(150)
    ]
    try:
        for client in clients:
            client.start()
        wait_until(lambda: int(read(mountpoint, "waiting")) == len(clients))
        for _ in range(500):
            assert read(mountpoint, "fast") == b"fast"
        assert answers == []
        (mountpoint / "gate").write_bytes(b"open")
    except BaseException:
        # Free the clients, which nothing else would.
        server.kill()
        raise
    for client in clients:
        client.join(PATIENCE_S)
    assert answers == [b"slow"] * len(clients)
    assert read(mountpoint, "fast") == b"fast"


def test_many_clients_at_once(mountpoint: Path, start: Start, loop: str) -> None:
    start(mountpoint, "--loop", loop)
    answers: list[bytes] = []

    def client() -> None:
        for _ in range(200):
            answers.append(read(mountpoint, "fast"))

    clients = [threading.Thread(target=client, daemon=True) for _ in range(8)]
    for each in clients:
        each.start()
    for each in clients:
        each.join(PATIENCE_S)
    assert answers == [b"fast"] * 1600


@pytest.mark.parametrize("busy_first", [False, True])
def test_stop_ends_the_session_and_unmounts(mountpoint: Path, start: Start, loop: str, busy_first: bool) -> None:
    server = start(mountpoint, "--loop", loop)
    for _ in range(1500 if busy_first else 1):
        read(mountpoint, "fast")
    server.terminate()
    assert finish(server) == (0, "")
    assert mounts.find_mount(mountpoint) is None


def test_stop_waits_for_handlers(mountpoint: Path, start: Start, loop: str) -> None:
    server = start(mountpoint, "--loop", loop)
    answers: list[bytes] = []

    def client() -> None:
        fd = os.open(mountpoint / "slow", os.O_RDONLY)
        answers.append(os.pread(fd, 100, 0))
        # Nobody answers the flush any more.
        with contextlib.suppress(OSError):
            os.close(fd)

    thread = threading.Thread(target=client, daemon=True)
    thread.start()
    wait_until(lambda: read(mountpoint, "waiting") == b"1")
    server.terminate()
    with pytest.raises(subprocess.TimeoutExpired):
        server.wait(0.2)
    server.send_signal(signal.SIGUSR1)
    assert finish(server) == (0, "")
    thread.join(PATIENCE_S)
    assert answers == [b"slow"]


def test_an_aborted_connection_is_unmounted(mountpoint: Path, start: Start, loop: str, fuse_control: Path) -> None:
    server = start(mountpoint, "--loop", loop)
    entry = mounts.find_mount(mountpoint)
    assert entry is not None
    (fuse_control / entry.device.partition(":")[2] / "abort").write_text("1")
    assert finish(server) == (0, "")
    assert mounts.find_mount(mountpoint) is None


def test_unmount_from_outside_ends_the_session(mountpoint: Path, start: Start, loop: str) -> None:
    server = start(mountpoint, "--loop", loop)
    for _ in range(1000):
        read(mountpoint, "fast")
    subprocess.run(["fusermount3", "-u", mountpoint], check=True)
    assert finish(server) == (0, "")


def test_an_idle_mount_uses_no_cpu(mountpoint: Path, start: Start, loop: str) -> None:
    start(mountpoint, "--loop", loop)
    for _ in range(2000):
        read(mountpoint, "fast")
    before = float(read(mountpoint, "cpu"))
    time.sleep(1)
    # 1 % would be ten times what it uses; spinning would use 100 %.
    assert float(read(mountpoint, "cpu")) - before < 0.1


@pytest.mark.parametrize("pretend", ["no-name", "other-version"])
def test_without_the_private_name_the_stock_loop_serves(mountpoint: Path, start: Start, pretend: str) -> None:
    server = start(mountpoint, "--pretend", pretend)
    for _ in range(200):
        assert read(mountpoint, "fast") == b"fast"
    server.terminate()
    status, errors = finish(server)
    assert status == 0
    assert errors.count("slower stock request loop") == 1


def questions_before_writes(mountpoint: Path) -> int:
    """How many extended attributes the kernel asks for while 200 writes are made."""
    fd = os.open(mountpoint / "plain", os.O_WRONLY)
    try:
        os.pwrite(fd, b"x" * 4096, 0)
        before = int(read(mountpoint, "getxattrs"))
        for number in range(200):
            assert os.pwrite(fd, b"x" * 4096, number % 4 * 4096) == 4096
        return int(read(mountpoint, "getxattrs")) - before
    finally:
        os.close(fd)


@pytest.mark.skipif(os.geteuid() != 0, reason="only as root is the mount made without libfuse")
def test_a_write_is_one_request(mountpoint: Path, start: Start, loop: str) -> None:
    """Without FUSE_HANDLE_KILLPRIV_V2 the kernel asks for capabilities before each."""
    start(mountpoint, "--loop", loop)
    # Once more when it has looked at the attributes again: of whatever time that takes, not of the writes.
    assert questions_before_writes(mountpoint) <= 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only as root is the mount made without libfuse")
def test_names_in_one_directory_are_looked_up_at_the_same_time(mountpoint: Path, start: Start) -> None:
    server = start(mountpoint)
    found: list[bool] = []
    clients = [
        threading.Thread(target=lambda name=name: found.append((mountpoint / name).exists()), daemon=True)
        for name in ("meet-1", "meet-2")
    ]
    for client in clients:
        client.start()
    for client in clients:
        client.join(PATIENCE_S)
    if len(found) < 2:
        server.kill()  # frees them
    assert found == [False, False]


@pytest.mark.parametrize("pretend", ["old-kernel", "no-name"])
def test_what_does_without_the_flag_serves_all_the_same(mountpoint: Path, start: Start, pretend: str) -> None:
    server = start(mountpoint, "--pretend", pretend)
    assert questions_before_writes(mountpoint) >= 200
    server.terminate()
    assert finish(server)[0] == 0


def test_the_mount_is_found_and_described(mountpoint: Path, start: Start) -> None:
    start(mountpoint, "--fsname", "/a dir/with, comma\\and backslash")
    entry = mounts.find_mount(mountpoint)
    assert entry is not None
    assert entry.fstype == mounts.FSTYPE
    assert entry.source == "/a dir/with, comma\\and backslash"
    assert "default_permissions" in entry.options
    assert ("allow_other" in entry.options) == (os.geteuid() == 0)
    assert entry.device == f"{os.major(mountpoint.stat().st_dev)}:{os.minor(mountpoint.stat().st_dev)}"


@pytest.mark.parametrize(
    "name", ["with space", "new\nline", "back\\slash", "tab\there", "a\\040b", "ünï,cödé", "-dash"]
)
def test_odd_mountpoints(tmp_path: Path, start: Start, name: str) -> None:
    where = tmp_path / name
    where.mkdir()
    assert mounts.find_mount(where) is None
    server = start(where)
    entry = mounts.find_mount(where)
    assert entry is not None
    assert entry.mountpoint == os.fspath(where)
    assert read(where, "fast") == b"fast"
    server.terminate()
    assert finish(server) == (0, "")
    assert mounts.find_mount(where) is None


def test_find_mount_follows_links_but_the_last(tmp_path: Path, mountpoint: Path, start: Start) -> None:
    start(mountpoint)
    (tmp_path / "link").symlink_to(tmp_path)
    direct = mounts.find_mount(mountpoint)
    assert direct is not None
    assert mounts.find_mount(tmp_path / "link" / "mnt") == direct
    assert mounts.find_mount(f"{mountpoint}/") == direct
    assert mounts.find_mount(mountpoint / "fast") is None


def test_the_topmost_of_stacked_mounts_is_found(mountpoint: Path, start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    start(mountpoint)
    subprocess.run(["mount", "-t", "tmpfs", "above", mountpoint], check=True)
    try:
        entry = mounts.find_mount(mountpoint)
        assert entry is not None
        assert entry.source == "above"
    finally:
        subprocess.run(["umount", mountpoint], check=True)
    entry = mounts.find_mount(mountpoint)
    assert entry is not None
    assert entry.fstype == mounts.FSTYPE


def test_a_dead_mount_is_detached(mountpoint: Path, start: Start) -> None:
    server = start(mountpoint)
    server.kill()
    server.wait()
    with pytest.raises(OSError, match="not connected"):
        os.stat(mountpoint)
    mounts.detach_dead(mountpoint)
    assert mounts.find_mount(mountpoint) is None
    assert list(mountpoint.iterdir()) == []


def test_a_mount_that_is_served_is_busy(mountpoint: Path, start: Start) -> None:
    start(mountpoint)
    with pytest.raises(UserError, match="busy"):
        mounting.attach(mountpoint, fsname="x")
    assert read(mountpoint, "fast") == b"fast"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount above a dead mount")
@pytest.mark.parametrize("kernel", ["new", "before-6.5"])
def test_what_is_beneath_a_dead_mount_is_never_seen(mountpoint: Path, start: Start, kernel: str) -> None:
    (mountpoint / "fast").write_text("older")
    pretend = () if kernel == "new" else ("--pretend", kernel)
    server = start(mountpoint, *pretend)
    for stacked in (1, 2, 2):
        server.kill()
        server.wait()
        with watched((mountpoint / "fast").read_bytes) as seen:
            wait_until(functools.partial(seen.__contains__, errno.ENOTCONN))
            server = start(mountpoint, *pretend)
            wait_until(functools.partial(seen.__contains__, b"fast"))
        assert seen <= {b"fast", errno.ENOTCONN, errno.ECONNABORTED}
        assert len(mounts_at(mountpoint)) == (1 if kernel == "new" else 2), stacked
    server.terminate()
    assert finish(server)[0] == 0
    assert mounts_at(mountpoint) == []
    assert (mountpoint / "fast").read_text() == "older"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount above a dead mount")
def test_an_unmount_takes_off_what_is_dead_beneath(mountpoint: Path, start: Start) -> None:
    server = start(mountpoint)
    server.kill()
    server.wait()
    server = start(mountpoint, "--pretend", "before-6.5")
    assert read(mountpoint, "fast") == b"fast"
    assert len(mounts_at(mountpoint)) == 2
    subprocess.run(["fusermount3", "-u", mountpoint], check=True)
    assert finish(server)[0] == 0
    assert mounts_at(mountpoint) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
@pytest.mark.parametrize("covered", ["directory", "mount point"])
def test_a_directory_is_opened_beneath_dead_mounts(mountpoint: Path, start: Start, covered: str) -> None:
    with contextlib.ExitStack() as undo:
        if covered == "mount point":
            subprocess.run(["mount", "-t", "tmpfs", "backing", mountpoint], check=True)
            undo.callback(subprocess.run, ["umount", "-l", mountpoint], check=True)
        (mountpoint / "file").write_text("beneath")
        (mountpoint / "other").mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "other", mountpoint / "other"], check=True)
        undo.callback(subprocess.run, ["umount", "-l", mountpoint / "other"], check=True)
        (mountpoint / "other" / "file").touch()
        server = start(mountpoint)
        server.kill()
        server.wait()
        undo.callback(mounts.detach_dead, mountpoint)
        # Tests beside this one mount other file systems.
        devices = {entry.device for entry in mounts.mounts() if Path(entry.mountpoint).is_relative_to(mountpoint)}
        stat = os.stat(mountpoint.parent)
        devices.add(f"{os.major(stat.st_dev)}:{os.minor(stat.st_dev)}")
        before = [entry for entry in mounts.mounts() if entry.device in devices]
        fd = takeover.open_beneath(mountpoint, mounts.FSTYPE, os.fspath(mountpoint))
        undo.callback(os.close, fd)
        assert [entry for entry in mounts.mounts() if entry.device in devices] == before
        assert len(before) >= 3
        assert Path(f"/proc/self/fd/{fd}/file").read_text() == "beneath"
        assert os.listdir(f"/proc/self/fd/{fd}/other") == ["file"]
        with pytest.raises(OSError, match="not connected"):
            os.stat(mountpoint)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_what_cannot_be_opened_beneath_is_said(mountpoint: Path, start: Start) -> None:
    server = start(mountpoint)
    server.kill()
    server.wait()
    with pytest.raises(UserError, match=r"beneath the dead mount .* No such file"):
        takeover.open_beneath(mountpoint, mounts.FSTYPE, f"{mountpoint}/nothing")
    assert takeover.is_dead(mountpoint, mounts.FSTYPE)


def test_a_session_that_fails_leaves_a_dead_mount(mountpoint: Path, start: Start) -> None:
    (mountpoint / "fast").write_text("older")
    server = start(mountpoint, "--keep")
    assert read(mountpoint, "fast") == b"fast"
    server.terminate()
    assert finish(server)[0] == 0
    with pytest.raises(OSError, match="not connected"):
        read(mountpoint, "fast")


def test_what_can_not_be_a_mountpoint_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    with pytest.raises(UserError, match="not a directory"):
        session.mount(None, file, fsname="x")
    with pytest.raises(UserError, match="No such file"):
        session.mount(None, tmp_path / "nothing", fsname="x")
    with pytest.raises(UserError, match="cannot unmount"):
        mounts.detach_dead(tmp_path)


def test_the_kernels_small_limits_are_raised(mountpoint: Path, start: Start, loop: str, fuse_control: Path) -> None:
    """What was set before INIT was answered did not last: that sets all of them anew."""
    start(mountpoint, "--loop", loop)
    assert read(mountpoint, "fast") == b"fast"  # INIT is over
    entry = mounts.find_mount(mountpoint)
    assert entry is not None
    wanted = {
        Path("/sys/class/bdi", entry.device, "read_ahead_kb"): mounts.READ_AHEAD_KIB,
        Path("/sys/class/bdi", entry.device, "max_ratio"): 1,
        fuse_control / entry.device.partition(":")[2] / "max_background": handshake.MAX_BACKGROUND,
        fuse_control / entry.device.partition(":")[2] / "congestion_threshold": handshake.CONGESTION_THRESHOLD,
    }
    assert {path: int(path.read_text()) for path in wanted} == wanted


def test_what_can_not_be_tuned_is_left_out() -> None:
    entry = mounts.MountEntry(1, 0, "0:0", "/nowhere", mounts.FSTYPE, "x", frozenset())
    assert mounts.tune(entry, writeback_cache=True) == {}
