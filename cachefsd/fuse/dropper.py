"""A small process of its own that has the kernel drop pages. It is run as a file, and imports nothing of cachefsd.

To drop a page the kernel waits for its lock, and who holds that may wait for an answer of the daemon. A thread of the
daemon that waits there could not be killed: a killed daemon would then keep its locks, and the connection would never
end. This process has nothing but the connection. It ends the connection itself when the daemon is gone and the kernel
still waits.

Arguments: the descriptor of a socket to the daemon, that of the connection, and the connection's name in /sys.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import struct
import sys
from contextlib import suppress
from queue import SimpleQueue
from threading import Thread

THREADS = 4
REQUEST = struct.Struct("=QQqq")
"""number of the request, node id, offset, length in bytes"""
ANSWER = struct.Struct("=Qi")
"""number of the request, errno or 0"""
_NOTIFY = struct.Struct("=IiQQqq")  # fuse_out_header, fuse_notify_inval_inode_out
_INVAL_INODE = 2  # FUSE_NOTIFY_INVAL_INODE
_FSOPEN, _FSCONFIG, _FSMOUNT = 430, 431, 432  # the same on every architecture
_CREATE = 6  # FSCONFIG_CMD_CREATE


def drop(connection: int, node: int, offset: int, size: int) -> int:
    """Drop the pages of a range of a file, after dirty ones of them have been written; the errno, or 0."""
    try:
        os.write(connection, _NOTIFY.pack(_NOTIFY.size, _INVAL_INODE, 0, node, offset, size))
    except OSError as error:
        return error.errno or 1
    return 0


def serve(daemon: socket.socket, connection: int, name: str) -> None:
    """Do what the daemon asks for until it closes its end."""
    requests: SimpleQueue[tuple[int, int, int, int]] = SimpleQueue()
    asked = 0
    done: list[None] = []

    def work() -> None:
        while True:
            number, node, offset, size = requests.get()
            answer = drop(connection, node, offset, size)
            done.append(None)
            with suppress(OSError):  # the daemon is gone
                daemon.send(ANSWER.pack(number, answer))

    for _ in range(THREADS):
        Thread(target=work, daemon=True).start()
    while message := daemon.recv(REQUEST.size):
        asked += 1
        requests.put(REQUEST.unpack(message))
    if len(done) < asked:
        with suppress(OSError):  # the connection is gone
            abort(name)


def abort(name: str) -> None:
    """End a connection: whoever waits for an answer gets an error.

    :raises OSError: there is no such connection, or it is another user's.
    """
    try:
        fd = os.open(f"/sys/fs/fuse/connections/{name}/abort", os.O_WRONLY)
    except FileNotFoundError:
        # That file system is mounted by who starts the machine, and not everywhere: for root this does it as well.
        root = _file_system(b"fusectl")
        try:
            fd = os.open(f"{name}/abort", os.O_WRONLY, dir_fd=root)
        finally:
            os.close(root)
    try:
        os.write(fd, b"1\n")
    finally:
        os.close(fd)


def _file_system(kind: bytes) -> int:
    """The root of a file system that is mounted nowhere."""
    libc = ctypes.CDLL(None, use_errno=True)

    def call(number: int, *arguments: object) -> int:
        result: int = libc.syscall(number, *arguments)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    context = call(_FSOPEN, kind, 1)
    try:
        call(_FSCONFIG, context, _CREATE, None, None, 0)
        return call(_FSMOUNT, context, 1, 0)
    finally:
        os.close(context)


if __name__ == "__main__":
    # These are sent to the daemon's whole group, and it is the daemon that stops in order.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as to_daemon, suppress(OSError):
        serve(to_daemon, int(sys.argv[2]), sys.argv[3])
    os._exit(0)
