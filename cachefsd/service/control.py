"""Talking to a running daemon: a socket per mount, one JSON object per line in each direction.

Beside the socket is a note of what the daemon serves, which stays when the daemon dies.

Requests are ``{"command": "status"}``, ``{"command": "flush"}`` and
``{"command": "forget-conflict", "arguments": {"id": N}}``. A reply is any number of lines with
``progress`` (null: still at it), then one with ``result`` or ``error``. Only the daemon's own user and root
are heard.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import trio

from cachefsd.errors import NobodyError, SilentError, UserError
from cachefsd.media.cachedir import PrivateDirectory
from cachefsd.service.places import socket_path
from cachefsd.wakeup import Signal

log = logging.getLogger(__name__)
_MAX_LINE = 65536
_PATIENCE_S = 30.0  # for a client to say what it wants, and for a daemon to answer
_HEARTBEAT_S = 5.0
_BACKLOG = 256  # beyond it a client would have to try again
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: struct ucred

Progress = Callable[[Any], None]
Command = Callable[[Progress], Awaitable[Any]]
"""Runs a command and returns its result; reports progress in between."""
ArgumentCommand = Callable[[Progress, dict[str, Any]], Awaitable[Any]]
"""The same for a command that takes arguments. It has to check them: they come from a client."""


class ControlServer:
    """Answers clients of one mount."""

    def __init__(
        self,
        mountpoint: Path,
        commands: dict[str, Command],
        with_arguments: dict[str, ArgumentCommand] | None = None,
        note: dict[str, Any] | None = None,
    ) -> None:
        """``note`` is what is known of the mount when nobody answers any more: places, as text."""
        self._path = socket_path(mountpoint)
        self._note = note
        self._commands = commands
        self._with_arguments = with_arguments or {}

    @contextlib.contextmanager
    def listening(self) -> Iterator[trio.SocketListener]:
        """The socket, there until the end of the block.

        :raises UserError: it can't be made.
        """
        with contextlib.ExitStack() as undo:
            try:
                directory = undo.enter_context(PrivateDirectory.create(self._path.parent))
                path = directory.within(self._path.name)
                # Whoever owned it is dead: of two daemons for one mount point the second has failed by now.
                path.unlink(missing_ok=True)
                listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
                undo.callback(listener.close)
                listener.bind(os.fspath(path))
                undo.callback(path.unlink, missing_ok=True)
                path.chmod(0o600)
                listener.listen(_BACKLOG)
                if self._note is not None:
                    _write_note(directory, self._path.with_suffix(".json").name, self._note)
            except OSError as error:
                raise UserError(f"cannot make the control socket {self._path}: {error.strerror}") from error
            yield trio.SocketListener(trio.socket.from_stdlib_socket(listener))

    async def serve(self, listener: trio.SocketListener) -> None:
        """Answer until cancelled."""
        async with trio.open_nursery() as clients:
            await trio.serve_listeners(self._answer_safely, [listener], handler_nursery=clients)

    async def _answer_safely(self, stream: trio.SocketStream) -> None:
        # What a client does must not reach the daemon.
        try:
            async with stream:
                await self._answer(stream)
        except* (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        except* Exception:
            log.exception("a control client could not be answered")

    async def _answer(self, stream: trio.SocketStream) -> None:
        peer = stream.socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        _, uid, _ = _CREDENTIALS.unpack(peer)
        command = None
        with trio.move_on_after(_PATIENCE_S):
            # Read from strangers too: one that is still sending when we close would not see the answer.
            line = await _receive_line(stream)
            if uid not in (0, os.geteuid()):
                await _send(stream, {"error": "permission denied"})
                return
            command = self._command(*_parse(line))
            if command is None:
                await _send(stream, {"error": "no such command"})
                return
        if command is not None:
            await self._run(stream, command)

    def _command(self, name: str, arguments: dict[str, Any]) -> Command | None:
        if name in self._with_arguments:
            command = self._with_arguments[name]
            return lambda progress: command(progress, arguments)
        return None if arguments else self._commands.get(name)

    async def _run(self, stream: trio.SocketStream, command: Command) -> None:
        """Run a command and send what it reports; a client that goes away ends it."""
        latest: list[Any] = []
        news = Signal()
        told = news.next

        def progress(value: Any) -> None:
            latest[:] = [value]
            news.set()

        async def report() -> None:
            nonlocal told
            while True:
                with trio.move_on_after(_HEARTBEAT_S):
                    await told.wait()
                told = news.next
                await _send(stream, {"progress": latest.pop() if latest else None})

        async with trio.open_nursery() as nursery:
            nursery.start_soon(report)
            try:
                answer = {"result": await command(progress)}
            except OSError as error:
                answer = {"error": error.strerror or str(error)}
            except Exception as error:
                log.exception("a bug: a control command failed")
                answer = {"error": f"the command failed ({type(error).__name__}: {error}); see the daemon's log"}
            nursery.cancel_scope.cancel()
        await _send(stream, answer)


def _write_note(directory: PrivateDirectory, name: str, note: dict[str, Any]) -> None:
    """Replace the note at once: whoever reads it sees the old one or the new one."""
    new = f"{name}.new"
    with open(directory.open_file(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w") as file:
        json.dump(note, file)
    os.rename(new, name, src_dir_fd=directory.fd, dst_dir_fd=directory.fd)


async def _receive_line(stream: trio.SocketStream) -> bytes:
    data = b""
    while b"\n" not in data and len(data) <= _MAX_LINE:
        piece = await stream.receive_some()
        if not piece:
            break
        data += piece
    return data.partition(b"\n")[0][:_MAX_LINE]


async def _send(stream: trio.SocketStream, message: dict[str, Any]) -> None:
    await stream.send_all(json.dumps(message).encode() + b"\n")


def _parse(line: bytes) -> tuple[str, dict[str, Any]]:
    """The command and its arguments; empty ones where the client has sent something else."""
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return "", {}
    if not isinstance(message, dict):
        return "", {}
    command, arguments = message.get("command"), message.get("arguments", {})
    if not isinstance(command, str) or not isinstance(arguments, dict):
        return "", {}
    return command, arguments


# ---- the other end


def ask(
    mountpoint: Path, command: str, progress: Progress | None = None, arguments: dict[str, Any] | None = None
) -> Any:
    """Send a command to the daemon of ``mountpoint`` and return its result.

    :raises NobodyError: there is no daemon.
    :raises SilentError: it does not answer.
    :raises UserError: the command failed.
    """
    return ask_socket(socket_path(mountpoint), f"{mountpoint}", command, progress, arguments=arguments)


def ask_socket(
    path: Path,
    name: str,
    command: str,
    progress: Progress | None = None,
    patience_s: float = _PATIENCE_S,
    arguments: dict[str, Any] | None = None,
) -> Any:
    """The same for the socket ``path`` of a daemon that errors call ``name``. It may be silent for ``patience_s``."""
    request = {"command": command} | ({"arguments": arguments} if arguments else {})
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            connection.settimeout(patience_s)
            connection.connect(os.fspath(path))
            connection.sendall(json.dumps(request).encode() + b"\n")
            with connection.makefile("rb") as lines:
                for line in lines:
                    message = json.loads(line)
                    if "error" in message:
                        raise UserError(f"{name}: {message['error']}")
                    if "result" in message:
                        return message["result"]
                    if progress is not None and message["progress"] is not None:
                        progress(message["progress"])
    except (FileNotFoundError, ConnectionRefusedError):
        raise NobodyError(f"no cachefsd serves {name}") from None
    except (TimeoutError, BlockingIOError):  # or so many ask it that the kernel takes no more of them
        raise SilentError(f"{name}: the daemon does not answer") from None
    except OSError as error:
        raise UserError(f"{name}: cannot talk to the daemon: {error.strerror}") from None
    raise UserError(f"{name}: the daemon went away")
