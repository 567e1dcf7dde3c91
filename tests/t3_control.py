"""The control socket, both ends: commands, progress, and clients that do not keep to the rules."""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from cachefsd.errors import NobodyError, SilentError, UserError
from cachefsd.service import control, places
from cachefsd.service.control import ControlServer, Progress, ask

PLACE = Path("/some/where")


class Commands:
    """What a daemon would do, at the test's command."""

    def __init__(self) -> None:
        self.gate = trio.Event()
        self.running = 0
        self.most_running = 0

    async def status(self, _: Progress) -> Any:
        return {"mountpoint": os.fspath(PLACE), "text": "ü\n"}

    async def count(self, progress: Progress) -> Any:
        for number in range(3):
            progress(number)
            await trio.sleep(0.05)
        return "counted"

    async def wait(self, progress: Progress) -> Any:
        self.running += 1
        self.most_running = max(self.most_running, self.running)
        try:
            await self.gate.wait()
        finally:
            self.running -= 1
        return None

    async def fail(self, _: Progress) -> Any:
        raise OSError(28, os.strerror(28))

    async def bug(self, _: Progress) -> Any:
        raise ZeroDivisionError


@pytest.fixture
async def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Commands]:
    monkeypatch.setattr(places, "runtime_directory", lambda: tmp_path / "run")
    commands = Commands()
    names = ("status", "count", "wait", "fail", "bug")
    server = ControlServer(PLACE, {name: getattr(commands, name) for name in names})
    with server.listening() as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(server.serve, listener)
            yield commands
            nursery.cancel_scope.cancel()


async def asked(command: str, progress: Progress | None = None) -> Any:
    return await trio.to_thread.run_sync(ask, PLACE, command, progress)


async def connected() -> trio.SocketStream:
    stream = trio.socket.socket(socket.AF_UNIX)
    await stream.connect(os.fspath(places.socket_path(PLACE)))
    return trio.SocketStream(stream)


async def everything(stream: trio.SocketStream) -> bytes:
    data = b""
    with trio.fail_after(60):
        async for piece in stream:
            data += piece
    return data


async def test_a_command_and_its_result(commands: Commands) -> None:
    assert await asked("status") == {"mountpoint": "/some/where", "text": "ü\n"}


async def test_progress_arrives_before_the_result(commands: Commands) -> None:
    seen: list[Any] = []
    assert await asked("count", seen.append) == "counted"
    assert seen
    assert seen == sorted(set(seen))


async def test_a_command_that_takes_long_says_so(
    commands: Commands, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The client gives up on a daemon that is silent for long, so there must be something to hear."""
    monkeypatch.setattr(control, "_HEARTBEAT_S", 0.02)
    stream = await connected()
    await stream.send_all(b'{"command": "wait"}\n')
    heard = b""
    with trio.fail_after(60):
        while heard.count(b"\n") < 5:
            heard += await stream.receive_some()
    assert commands.running == 1
    commands.gate.set()
    answers = [json.loads(line) for line in (heard + await everything(stream)).splitlines()]
    assert answers[-1] == {"result": None}
    assert answers[:-1] == [{"progress": None}] * (len(answers) - 1)


async def test_errors_reach_the_client(commands: Commands, expect_logs: Any) -> None:
    with pytest.raises(UserError, match=r"^/some/where: No space left on device$"):
        await asked("fail")
    with pytest.raises(UserError, match=r"^/some/where: no such command$"):
        await asked("none")
    expect_logs("a bug: a control command failed", count=1)
    with pytest.raises(UserError, match=r"^/some/where: the command failed \(.*\); see the daemon's log$"):
        await asked("bug")
    assert await asked("status")  # it is still there


@pytest.mark.parametrize(
    "line",
    [
        b"\n",
        b"garbage\n",
        b"\xff\xfe\0\n",
        b"[]\n",
        b"{}\n",
        b'{"command": 7}\n',
        b'{"command": ["status"]}\n',
        b'{"command": "__init__"}\n',
        b'{"command": "status"',
        b"[" * 60_000 + b"\n",
        b"x" * 1_000_000,
    ],
    ids=lambda line: repr(line[:24]),
)
async def test_garbage_is_answered_and_forgotten(commands: Commands, line: bytes) -> None:
    stream = await connected()
    with trio.fail_after(60):
        try:
            await stream.send_all(line)
            await stream.send_eof()
            assert json.loads(await everything(stream)) == {"error": "no such command"}
        except trio.BrokenResourceError:
            assert len(line) > 65536  # more than it is willing to read
    await stream.aclose()
    assert await asked("status")


async def test_half_a_line_is_waited_for_but_not_for_ever(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = await connected()
    await stream.send_all(b'{"command": ')
    await trio.sleep(0.1)
    await stream.send_all(b'"status"}\n')
    assert b"result" in await everything(stream)
    monkeypatch.setattr(control, "_PATIENCE_S", 0.3)
    stream = await connected()
    await stream.send_all(b'{"command": ')
    assert await everything(stream) == b""
    assert await asked("status")


async def test_a_client_that_leaves_ends_its_command(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "_HEARTBEAT_S", 0.02)
    stream = await connected()
    await stream.send_all(b'{"command": "wait"}\n')
    assert await stream.receive_some()
    assert commands.running == 1
    await stream.aclose()
    with trio.fail_after(60):
        while commands.running:
            await trio.sleep(0.01)
    assert await asked("status")


async def test_many_clients_at_once(commands: Commands) -> None:
    results: list[Any] = []

    async def one() -> None:
        await asked("wait")
        results.append(None)

    async with trio.open_nursery() as nursery:
        for _ in range(30):
            nursery.start_soon(one)
        silent = [await connected() for _ in range(30)]
        with trio.fail_after(60):
            while commands.running < 30:
                await trio.sleep(0.01)
        assert await asked("status")
        commands.gate.set()
    assert len(results) == 30
    for stream in silent:
        await stream.aclose()


async def test_only_its_owner_and_root_are_heard(commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    path = places.socket_path(PLACE)
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    # Whoever reaches the socket all the same: this process is root, so the daemon takes it for user 4321.
    monkeypatch.setattr(control, "_CREDENTIALS", _OtherUser)
    with pytest.raises(UserError, match="permission denied"):
        await asked("status")


class _OtherUser:
    size = control._CREDENTIALS.size

    @staticmethod
    def unpack(data: bytes) -> tuple[int, int, int]:
        pid, _, gid = control.struct.unpack("3i", data)
        return pid, 4321, gid


async def test_nobody_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "runtime_directory", lambda: tmp_path / "run")
    with pytest.raises(UserError, match=r"^no cachefsd serves /some/where$"):
        await asked("status")
    # One was killed: its socket is still there, and the next daemon takes its place.
    (tmp_path / "run").mkdir()
    dead = socket.socket(socket.AF_UNIX)
    dead.bind(os.fspath(places.socket_path(PLACE)))
    dead.close()
    with pytest.raises(UserError, match=r"^no cachefsd serves /some/where$"):
        await asked("status")
    with ControlServer(PLACE, {}).listening():
        pass
    assert not places.socket_path(PLACE).exists()


async def test_a_daemon_that_is_silent_is_told_from_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "runtime_directory", lambda: tmp_path / "run")
    path = places.socket_path(PLACE)
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(os.fspath(path))
        silent.listen(0)
        with pytest.raises(SilentError, match=r"^/some/where: the daemon does not answer$"):
            control.ask_socket(path, "/some/where", "status", patience_s=0.05)
        with pytest.raises(SilentError):
            control.ask_socket(path, "/some/where", "status", patience_s=0.05)
    with pytest.raises(NobodyError):
        control.ask_socket(path, "/some/where", "status", patience_s=0.05)


async def test_the_note_of_a_mount_outlives_its_daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "runtime_directory", lambda: tmp_path / "run")
    note = {"mountpoint": os.fsdecode(b"/some/\xff"), "pid": 1}
    with ControlServer(PLACE, {}, note={"pid": 0}).listening():
        pass
    with ControlServer(PLACE, {}, note=note).listening():
        pass
    assert os.listdir(tmp_path / "run") == [places.note_path(PLACE).name]
    assert json.loads(places.note_path(PLACE).read_text()) == note
    assert places.note_path(PLACE).stat().st_mode & 0o777 == 0o600
