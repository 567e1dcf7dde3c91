"""The daemon as a service: the unit's own command line, readiness, watchdog, stop; without systemd itself."""

from __future__ import annotations

import configparser
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from support_daemon import ROOT, Daemon, MakeDaemon, make_daemon, wait_until

from cachefsd.fuse import mounts
from cachefsd.service.places import socket_path

__all__ = ["make_daemon"]
UNIT = ROOT / "systemd" / "cachefsd@.service"
EXAMPLE = ROOT / "systemd" / "example.conf"


class Manager:
    """What systemd does for a service of Type=notify."""

    def __init__(self, directory: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._path = directory / "notify"
        self._socket.bind(os.fspath(self._path))
        self._socket.settimeout(180)
        self.services: list[subprocess.Popen[bytes]] = []

    def start(self, settings: dict[str, str], **environment: str) -> subprocess.Popen[bytes]:
        """Run ExecStart with the variables of an EnvironmentFile."""
        words = command_of(settings)
        assert words[0] == "cachefsd"
        env = os.environ | settings | {"NOTIFY_SOCKET": os.fspath(self._path)} | environment
        service = subprocess.Popen([sys.executable, "-m", *words], env=env, cwd=ROOT, stderr=subprocess.PIPE)
        self.services.append(service)
        return service

    def hear(self) -> dict[str, str]:
        """The next notification."""
        lines = self._socket.recv(4096).decode().splitlines()
        return dict(line.split("=", 1) for line in lines)

    def expect_silence(self) -> None:
        """Nothing more has been said."""
        self._socket.setblocking(False)
        with pytest.raises(BlockingIOError):
            self.hear()

    def end(self) -> None:
        for service in self.services:
            service.kill()
            service.wait()
            if service.stderr is not None:
                service.stderr.close()
        self._socket.close()


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    result = Manager(tmp_path)
    try:
        yield result
    finally:
        result.end()


def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None, delimiters=["="])
    parser.optionxform = str  # type: ignore[method-assign, assignment]
    parser.read(UNIT)
    return parser


def command_of(settings: dict[str, str]) -> list[str]:
    """ExecStart as systemd reads it: ${A} is one word, $A any number of them."""
    words: list[str] = []
    for word in shlex.split(unit()["Service"]["ExecStart"]):
        if split := re.fullmatch(r"\$(\w+)", word):
            words += settings[split[1]].split()
        else:
            words.append(re.sub(r"\$\{(\w+)\}", lambda match: settings[match[1]], word))
    return words


def settings_of(daemon: Daemon) -> dict[str, str]:
    """What example.conf sets, for the places of a test."""
    names = dict(line.split("=", 1) for line in EXAMPLE.read_text().splitlines() if line and line[0] != "#")
    assert set(names) == {"BACKING", "MOUNTPOINT", "CACHE", "OPTIONS"}
    return {
        "BACKING": os.fspath(daemon.backing),
        "MOUNTPOINT": os.fspath(daemon.mountpoint),
        "CACHE": os.fspath(daemon.cache),
        "OPTIONS": f"{names['OPTIONS']} --size 64M --volatile -o dirty_age=3600",
    }


@pytest.fixture
def daemon(make_daemon: MakeDaemon) -> Daemon:
    return make_daemon(mount=False)


def test_the_unit_is_correct(tmp_path: Path) -> None:
    copy = tmp_path / "cachefsd@data.service"
    text = UNIT.read_text()
    assert "\nExecStart=cachefsd mount " in text
    shutil.copy(sys.executable, tmp_path / "cachefsd")
    copy.write_text(text.replace("ExecStart=cachefsd", f"ExecStart={tmp_path}/cachefsd"))
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", copy], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "cachefsd@data.service" not in done.stderr


def test_the_unit_keeps_the_mount_visible() -> None:
    """Any of these would give the service a mount namespace of its own (systemd.exec(5))."""
    service = set(unit()["Service"])
    private = r"Private.*|Protect.*|Read.*Paths|InaccessiblePaths|.*BindPaths|BindReadOnlyPaths|TemporaryFileSystem"
    assert not {name for name in service if re.fullmatch(rf"{private}|Root.*|Mount.*|DynamicUser|.*Directory", name)}


def test_ready_on_a_mount_point_that_is_not_utf_8(manager: Manager, daemon: Daemon) -> None:
    daemon.mountpoint = daemon.mountpoint.with_name(os.fsdecode(b"caf\xe9\nREADY=0"))
    daemon.mountpoint.mkdir()
    service = manager.start(settings_of(daemon))
    first = manager.hear()
    assert first["READY"] == "1"
    assert first["STATUS"].endswith("caf\\xe9\\nREADY=0")
    assert daemon.ask("status")["mountpoint"] == os.fspath(daemon.mountpoint)
    service.send_signal(signal.SIGTERM)
    service.communicate(timeout=180)
    assert service.returncode == 0


def test_ready_when_it_serves_and_stopped_with_dirty_data(manager: Manager, daemon: Daemon) -> None:
    settings = settings_of(daemon)
    service = manager.start(settings)
    first = manager.hear()
    assert first["READY"] == "1"
    assert str(daemon.mountpoint) in first["STATUS"]
    entry = mounts.find_mount(daemon.mountpoint)
    assert entry is not None
    assert entry.fstype == mounts.FSTYPE
    (daemon.path / "file").write_bytes(b"x" * 100_000)
    assert daemon.status()["pid"] == service.pid
    service.send_signal(signal.SIGTERM)
    assert manager.hear() == {"STOPPING": "1"}
    _, errors = service.communicate(timeout=180)
    assert service.returncode == 0
    assert b"bytes are still dirty, and kept" in errors
    assert mounts.find_mount(daemon.mountpoint) is None
    assert not socket_path(daemon.mountpoint).exists()
    assert (daemon.backing / "file").stat().st_size == 0

    manager.start(settings)
    assert manager.hear()["READY"] == "1"
    assert (daemon.path / "file").read_bytes() == b"x" * 100_000
    assert daemon.status()["recovery"]["clean"]


def test_the_example_makes_no_cache_where_there_is_none(manager: Manager, daemon: Daemon) -> None:
    """With --size, a cache whose file system was not mounted was replaced by a new one, which hid its dirty data."""
    (options,) = [line for line in EXAMPLE.read_text().splitlines() if line.startswith("OPTIONS=")]
    service = manager.start(settings_of(daemon) | {"OPTIONS": options.removeprefix("OPTIONS=")})
    _, errors = service.communicate(timeout=180)
    assert b"there is no cache in" in errors
    assert not daemon.cache.exists()
    assert service.returncode != 0


def test_restarted_after_a_kill(manager: Manager, daemon: Daemon) -> None:
    service = manager.start(settings_of(daemon))
    manager.hear()
    (daemon.path / "file").write_bytes(b"x" * 100_000)
    service.kill()
    service.wait()
    manager.start(settings_of(daemon))
    assert manager.hear()["READY"] == "1"
    assert (daemon.path / "file").read_bytes() == b"x" * 100_000
    assert not daemon.status()["recovery"]["clean"]


def test_a_start_that_fails_is_not_ready(manager: Manager, daemon: Daemon) -> None:
    service = manager.start(settings_of(daemon) | {"BACKING": "/does not exist"})
    _, errors = service.communicate(timeout=180)
    assert str(service.returncode) == unit()["Service"]["RestartPreventExitStatus"]
    assert errors.decode().splitlines() == ["cachefsd: the backing /does not exist does not exist"]
    manager.expect_silence()


@pytest.mark.parametrize("wrong", ["-o dirty_aeg=3", "--size lots", "--sise 4G", ""])
def test_a_wrong_configuration_is_not_tried_again(manager: Manager, daemon: Daemon, wrong: str) -> None:
    service = manager.start(settings_of(daemon) | {"OPTIONS": f"{wrong} --volatile"})  # "": there is no cache
    _, errors = service.communicate(timeout=180)
    assert str(service.returncode) == unit()["Service"]["RestartPreventExitStatus"]
    assert errors.count(b"\n") == 1


def test_what_may_get_better_is_tried_again(manager: Manager, daemon: Daemon, make_daemon: MakeDaemon) -> None:
    other = make_daemon(daemon.backing)
    service = manager.start(settings_of(daemon))
    _, errors = service.communicate(timeout=180)
    assert b"already cached by another daemon" in errors
    assert str(service.returncode) not in ("0", unit()["Service"]["RestartPreventExitStatus"])
    other.unmount()


def test_the_watchdog_is_fed_by_a_loop_that_goes_round(manager: Manager, daemon: Daemon) -> None:
    service = manager.start(settings_of(daemon), WATCHDOG_USEC="200000")
    seen: list[dict[str, str]] = []
    while len(seen) < 6:
        seen.append(manager.hear())
    assert {"WATCHDOG": "1"} in seen
    assert sum("READY" in state for state in seen) == 1

    service.send_signal(signal.SIGABRT)  # what systemd sends to one that hangs
    _, errors = service.communicate(timeout=180)
    assert service.returncode == -signal.SIGABRT
    assert b"Fatal Python error: Aborted" in errors  # with the stacks of its threads


def test_a_watchdog_meant_for_another_process_is_not_fed(manager: Manager, daemon: Daemon) -> None:
    manager.start(settings_of(daemon), WATCHDOG_USEC="1000", WATCHDOG_PID="1")
    assert manager.hear()["READY"] == "1"
    (daemon.path / "file").write_bytes(b"x")
    manager.expect_silence()


@pytest.mark.parametrize("address", ["", "relative", "/does/not/exist", "@nobody-listens"])
def test_a_manager_that_does_not_listen_is_no_trouble(manager: Manager, daemon: Daemon, address: str) -> None:
    manager.start(settings_of(daemon), NOTIFY_SOCKET=address)
    wait_until(lambda: mounts.find_mount(daemon.mountpoint) is not None, "the mount")
    (daemon.path / "file").write_bytes(b"x")
    assert (daemon.path / "file").read_bytes() == b"x"
