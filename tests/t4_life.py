"""How a daemon ends, and what is seen after it: signals, failures, starts over a dead mount, closed descriptors."""

from __future__ import annotations

import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from support_daemon import ROOT, Daemon, MakeDaemon, cachefsd, is_gone, make_daemon, mounts_at, wait_until, watched

from cachefsd.fuse import mounts

__all__ = ["make_daemon"]
pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts over what is dead")
OLDER, NEWER = "older", "newer, and acknowledged"
DEAD = {errno.ENOTCONN, errno.ECONNABORTED}


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    """Mounted over its own backing, with a file that is newer in the cache."""
    result = make_daemon(over=True, mount=False, options=("dirty_age=3600",))
    (result.backing / "doc").write_text(OLDER)
    result.start_and_wait()
    with (result.path / "doc").open("r+") as file:  # to truncate it would change the backing
        file.write(NEWER)
    return result


def end_of(daemon: Daemon) -> int:
    """The exit status of the daemon, once it has ended."""
    return daemon.children[-1].wait(180)


def seen(path: Path) -> object:
    try:
        return path.read_text()
    except OSError as error:
        return error.errno


HARMLESS = [
    *(signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGPIPE, signal.SIGALRM, signal.SIGVTALRM),
    *(signal.SIGPROF, signal.SIGIO, signal.SIGPWR, signal.SIGXCPU, signal.SIGTRAP, signal.SIGRTMIN, signal.SIGRTMAX),
]


def test_signals_that_do_not_end_it(daemon: Daemon) -> None:
    for number in HARMLESS:
        os.kill(daemon.pid, number)
    for _ in range(3):
        assert daemon.ask("status")["pid"] == daemon.pid
    assert seen(daemon.path / "doc") == NEWER
    wait_until(lambda: "tasks, asked for by SIGUSR1" in daemon.stderr.read_text(), "the tasks")
    said = daemon.stderr.read_text()
    assert "SIGHUP is ignored" in said
    assert "SIGUSR2 is ignored" in said
    assert "threads, asked for by SIGUSR1" in said
    assert "Thread MainThread:" in said
    assert "feed_watchdog" in said or "_rounds" in said  # of the tasks


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stop_says_what_it_uncovers(daemon: Daemon, number: signal.Signals) -> None:
    assert daemon.ask("status")["covers_backing"]
    os.kill(daemon.pid, number)
    assert end_of(daemon) == 0
    assert seen(daemon.path / "doc") == OLDER
    said = daemon.stderr.read_text()
    assert f"4096 bytes stay in the cache {daemon.cache}" in said
    assert "shows the older content of the backing" in said
    daemon.start_and_wait()
    assert daemon.ask("status")["recovery"]["clean"]
    assert seen(daemon.path / "doc") == NEWER


def test_sigquit_stops_in_order_and_uncovers_nothing(daemon: Daemon) -> None:
    os.kill(daemon.pid, signal.SIGQUIT)
    assert end_of(daemon) == 0
    assert seen(daemon.path / "doc") == errno.ENOTCONN
    daemon.start_and_wait()
    assert daemon.ask("status")["recovery"]["clean"]
    assert seen(daemon.path / "doc") == NEWER


@pytest.mark.parametrize("number", [signal.SIGABRT, signal.SIGSEGV, signal.SIGBUS, signal.SIGKILL])
def test_a_death_uncovers_nothing(daemon: Daemon, number: signal.Signals) -> None:
    os.kill(daemon.pid, number)
    assert end_of(daemon) == -number
    with watched((daemon.path / "doc").read_text) as found:
        wait_until(lambda: bool(found), "a look at the dead mount")
        daemon.start_and_wait()
        wait_until(lambda: NEWER in found, "the data")
    assert found <= {NEWER} | DEAD
    assert len(mounts_at(daemon.mountpoint)) == 1
    if number != signal.SIGKILL:
        assert "Fatal Python error" in daemon.stderr.read_text()


FAILING = """
import sys
from cachefsd.service import daemon
{patch}
from cachefsd.__main__ import main
sys.argv[1:] = {words}
main()
"""
SERVING_FAILS = """
async def fail(mounted):
    raise ValueError("of a test")
daemon._stop = fail
"""
START_FAILS = """
class Failing(daemon.ControlServer):
    def listening(self):
        raise ValueError("of a test")
daemon.ControlServer = Failing
"""
READY_FAILS = """
def fail(*_, **states):
    raise ValueError("of a test")
daemon.notify = fail
"""


def start_failing(daemon: Daemon, patch: str) -> subprocess.Popen[bytes]:
    """A daemon in the foreground in which something fails that never should."""
    return daemon.run([sys.executable, "-c", FAILING.format(patch=patch, words=daemon.words())])


def test_a_bug_in_the_daemon_uncovers_nothing(daemon: Daemon) -> None:
    daemon.kill()
    child = start_failing(daemon, SERVING_FAILS)
    wait_until(lambda: daemon.is_served_by(child), "a daemon that serves")
    with watched((daemon.path / "doc").read_text) as found:
        wait_until(lambda: NEWER in found, "the data")
        child.terminate()
        assert child.wait(180) == 1
        wait_until(lambda: bool(found & DEAD), "the dead mount")
        daemon.start_and_wait()
    assert found <= {NEWER} | DEAD
    said = daemon.stderr.read_text()
    assert said.count("after an exception that nobody expected") == 1
    assert "cachefsd: the daemon of " in said
    assert "is left as a dead mount" in said


@pytest.mark.parametrize("over_dead", [True, False])
def test_a_start_that_fails_uncovers_nothing(daemon: Daemon, over_dead: bool) -> None:
    if over_dead:
        daemon.kill()
    else:
        os.kill(daemon.pid, signal.SIGTERM)
        end_of(daemon)
    with watched((daemon.path / "doc").read_text) as found:
        assert start_failing(daemon, START_FAILS).wait(180) == 1
    assert not over_dead or found <= DEAD
    assert seen(daemon.path / "doc") == errno.ENOTCONN
    daemon.start_and_wait()
    assert seen(daemon.path / "doc") == NEWER
    assert len(mounts_at(daemon.mountpoint)) == 1


def test_a_readiness_that_cannot_be_told_is_no_end(daemon: Daemon) -> None:
    daemon.kill()
    child = start_failing(daemon, READY_FAILS)
    wait_until(lambda: "could not be told that the mount serves" in daemon.stderr.read_text(), "the failure")
    wait_until(lambda: daemon.is_served_by(child), "a daemon that serves")
    assert seen(daemon.path / "doc") == NEWER


def test_an_aborted_connection_uncovers_nothing(daemon: Daemon, tmp_path: Path) -> None:
    entry = mounts.find_mount(daemon.mountpoint)
    assert entry is not None
    control = tmp_path / "connections"  # a test beside this one may unmount the usual place
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "fusectl", control], check=True)
    try:
        (control / entry.device.partition(":")[2] / "abort").write_text("1")
    finally:
        subprocess.run(["umount", control], check=True)
    assert end_of(daemon) == 1
    assert seen(daemon.path / "doc") == errno.ENOTCONN
    daemon.start_and_wait()
    assert seen(daemon.path / "doc") == NEWER


def test_killed_again_and_again_while_it_starts(daemon: Daemon, rng) -> None:
    daemon.kill()
    with watched((daemon.path / "doc").read_text) as found:
        for _ in range(4):
            child = daemon.start()
            time.sleep(rng.uniform(0.3, 1.5))
            child.kill()
            child.wait()
        daemon.start_and_wait()
        wait_until(lambda: NEWER in found, "the data")
    assert found <= {NEWER} | DEAD
    assert len(mounts_at(daemon.mountpoint)) == 1


def test_unmount_of_dead_mounts_takes_off_all_of_them(daemon: Daemon) -> None:
    daemon.kill()
    fd = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={fd},rootmode=40000,user_id=0,group_id=0"
    subprocess.run(["mount", "-i", "-t", mounts.FSTYPE, "-o", data, "x", daemon.mountpoint], check=True, pass_fds=[fd])
    os.close(fd)
    assert len(mounts_at(daemon.mountpoint)) == 2
    cachefsd("unmount", daemon.mountpoint)
    assert mounts_at(daemon.mountpoint) == []


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_closed_standard_descriptors(make_daemon: MakeDaemon, closed: str) -> None:
    daemon = make_daemon(mount=False)

    def run(*words: object) -> None:
        script = f'exec timeout --signal=KILL 100 "$0" -m cachefsd "$@" {closed}'
        command = ["bash", "-c", script, sys.executable, *map(str, words)]
        assert subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=False).returncode == 0

    run(*daemon.mount_words())
    daemon.pid = daemon.ask("status")["pid"]
    (daemon.path / "file").write_text(NEWER)
    run("flush", daemon.mountpoint)
    assert (daemon.backing / "file").read_text() == NEWER
    run("status", daemon.mountpoint)
    run("unmount", daemon.mountpoint)
    assert mounts_at(daemon.mountpoint) == []


@pytest.mark.parametrize("environment", [{"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}])
def test_output_that_cannot_show_a_name(tmp_path: Path, environment: dict[str, str]) -> None:
    name = os.fsdecode(b"caf\xc3\xa9-\xff")
    done = subprocess.run(
        [sys.executable, "-m", "cachefsd", "mount", tmp_path / name, "--cache", tmp_path / "cache"],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"does not exist" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_mount_leaves_no_daemon(make_daemon: MakeDaemon, number: signal.Signals, status: int) -> None:
    daemon = make_daemon(mount=False)
    cachefsd("format", daemon.cache, "--size", "64M", "--volatile")
    for pause in (0.0, 0.6, 1.2):
        child = subprocess.Popen(
            [sys.executable, "-m", "cachefsd", *map(str, daemon.mount_words())],
            env=os.environ | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE,
        )
        time.sleep(0.3 + pause)  # the imports, the daemon's imports, its start: whatever it meets
        child.send_signal(number)
        _, said = child.communicate(timeout=180)
        if child.returncode == 0:  # it was faster
            daemon.pid = daemon.ask("status")["pid"]
            daemon.unmount()
            continue
        assert child.returncode in (status, -number), said
        assert said.count(b"\n") <= 1
        assert b"Traceback" not in said
        wait_until(lambda: not mounts_at(daemon.mountpoint), "the end of the mount")
    daemon.mount()


INTERRUPTED = """
import os, signal, subprocess, sys, time
from cachefsd.service import process
from cachefsd.service.signals import Stopped

class Popen(subprocess.Popen):
    def __init__(self, *words, **options):
        super().__init__(*words, **options)
        os.kill(os.getpid(), signal.SIGTERM)

process.subprocess.Popen = Popen
try:
    process.start_in_background({words}, print)
except Stopped:
    sys.exit(143)
"""


def test_a_mount_interrupted_while_it_starts_the_daemon_leaves_none(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon(mount=False)
    words = [str(word) for word in daemon.mount_words()]
    done = subprocess.run([sys.executable, "-c", INTERRUPTED.format(words=words)], check=False, timeout=180)
    assert done.returncode == 143
    assert not mounts_at(daemon.mountpoint)
    daemon.mount()


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def has_ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 180)[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_daemon_in_the_background_that_dies_is_collected_by_its_parent(
    make_daemon: MakeDaemon, number: signal.Signals
) -> None:
    """Whatever process 1 does: nobody sees a zombie with the pid of the daemon once the parent has ended."""
    daemon = make_daemon()
    parent = parent_of(daemon.pid)
    process = Path(f"/proc/{parent}")
    assert (process / "comm").read_text() == "cachefsd-parent\n"
    assert {os.readlink(fd) for fd in (process / "fd").iterdir()} == {"/dev/null"}
    assert os.readlink(process / "cwd") == "/"
    assert (process / "oom_score_adj").read_text() == Path(f"/proc/{daemon.pid}/oom_score_adj").read_text()
    pidfd = os.pidfd_open(parent)
    try:
        os.kill(parent, signal.SIGTERM)  # as who ends a whole group: the daemon must not get it twice
        os.kill(parent, signal.SIGHUP)
        assert daemon.status()["pid"] == daemon.pid
        os.kill(daemon.pid, number)
        assert has_ended(pidfd)
        assert not Path(f"/proc/{daemon.pid}").exists()
    finally:
        os.close(pidfd)
    daemon.mount()


def test_the_daemon_does_not_need_its_parent(make_daemon: MakeDaemon) -> None:
    daemon = make_daemon()
    parent = parent_of(daemon.pid)
    os.kill(parent, signal.SIGKILL)
    wait_until(lambda: is_gone(parent), "the parent's death")
    (daemon.path / "file").write_text(NEWER)
    daemon.flush()
    assert (daemon.backing / "file").read_text() == NEWER
    daemon.unmount()


REAPED = """
import os, signal, sys
sys.path.insert(0, os.environ["PYTHONPATH"])
from cachefsd import reaper
reaper.stay_behind()
if sys.argv[1] == "exit":
    os._exit(7)
elif sys.argv[1] == "kill":
    os.kill(os.getpid(), signal.SIGKILL)
signal.signal(signal.SIGTERM, lambda *_: os._exit(9))
os.write(int(os.environ["SAYS"]), b"x")
signal.pause()
"""


@pytest.mark.parametrize(("how", "status"), [("exit", 7), ("kill", 128 + signal.SIGKILL), ("term", 9)])
def test_the_parent_ends_as_the_daemon_did(how: str, status: int) -> None:
    reader, writer = os.pipe()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "SAYS": str(writer)}
    child = subprocess.Popen([sys.executable, "-c", REAPED, how], env=environment, pass_fds=[writer])
    os.close(writer)
    try:
        if how == "term":
            assert os.read(reader, 1) == b"x"
            child.terminate()  # by the process that has started it: handed on
        assert child.wait(180) == status
    finally:
        os.close(reader)
        child.kill()
        child.wait()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGQUIT, signal.SIGINT])
def test_a_stop_before_it_serves(daemon: Daemon, number: signal.Signals) -> None:
    """The dead mount that was there stays."""
    daemon.kill()
    child = daemon.start()
    time.sleep(0.7)
    child.send_signal(number)
    status = child.wait(180)
    assert is_gone(child.pid)
    said = daemon.stderr.read_text()
    assert "Traceback" not in said
    if status:
        assert status in (128 + number, -number), said
        assert seen(daemon.path / "doc") == errno.ENOTCONN
    daemon.start_and_wait()
    assert seen(daemon.path / "doc") == NEWER
