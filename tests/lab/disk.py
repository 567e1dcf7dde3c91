"""A disk with a write cache that loses its content when the power goes."""

from __future__ import annotations

import os
import random
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

SECTOR = 4096
"""bytes that a disk writes whole or not at all. With 512, ext4 was gone after one of 32 cuts: it writes its superblock
of 1024 bytes, checksum at the end, in place, and mounts nothing whose checksum is wrong."""

# The network block device protocol (its doc/proto.md), as far as QEMU needs it: fixed newstyle, simple replies.
_OPTION_MAGIC = b"IHAVEOPT"
_OPTION_REPLY = struct.Struct(">QIII")  # magic, option, kind of reply, length
_OPTION_REPLY_MAGIC = 0x3E889045565A9
_OPTION = struct.Struct(">8sII")  # magic, option, length
_OPT_GO = 7
_REP_ACK, _REP_INFO, _REP_ERR_UNSUP = 1, 3, 1 << 31 | 1
_INFO_EXPORT = struct.Struct(">HQH")  # 0, size, transmission flags
_HAS_FLAGS, _SEND_FLUSH = 1, 4
_REQUEST = struct.Struct(">IHHQQI")  # magic, flags, command, handle, offset, length
_REPLY = struct.Struct(">IIQ")  # magic, error, handle
_REQUEST_MAGIC, _REPLY_MAGIC = 0x25609513, 0x67446698
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)


class Disk:
    """What was flushed is in a file of ``mib`` MiB, what was only written is in memory.

    A completed flush makes every completed write durable, and nothing else does.
    """

    def __init__(self, path: Path, mib: int) -> None:
        self.size = mib << 20
        self.flushes = 0
        self.lost = 0  # sectors
        self._unflushed: dict[int, bytes] = {}  # by sector
        self._file = path.open("w+b", buffering=0)
        self._file.truncate(self.size)

    def close(self) -> None:
        self._file.close()

    def read(self, offset: int, length: int) -> bytes:
        data = bytearray(os.pread(self._file.fileno(), length, offset))
        if self._unflushed:
            first = offset // SECTOR
            for index in range(length // SECTOR):
                if (held := self._unflushed.get(first + index)) is not None:
                    data[index * SECTOR : (index + 1) * SECTOR] = held
        return bytes(data)

    def write(self, offset: int, data: bytes) -> None:
        first = offset // SECTOR
        for index in range(len(data) // SECTOR):
            self._unflushed[first + index] = data[index * SECTOR : (index + 1) * SECTOR]

    def flush(self) -> None:
        self.flushes += 1
        for sector, data in self._unflushed.items():
            os.pwrite(self._file.fileno(), data, sector * SECTOR)
        self._unflushed.clear()

    def lose_power(self, rng: random.Random) -> None:
        """Of the sectors that were not flushed some are written, in no order, and the others lost."""
        # Between disks that write at once and disks that wait for a flush.
        share = rng.choice([0.0, rng.random(), 1.0])
        for sector, data in self._unflushed.items():
            if rng.random() < share:
                os.pwrite(self._file.fileno(), data, sector * SECTOR)
            else:
                self.lost += 1
        self._unflushed.clear()

    @contextmanager
    def served(self) -> Iterator[int]:
        """A descriptor of a socket at whose other end is this disk, for one QEMU, which must end first."""
        ours, theirs = socket.socketpair()
        server = threading.Thread(target=self._serve, args=(ours,), name="disk")
        server.start()
        try:
            yield theirs.fileno()
        finally:
            theirs.close()
            server.join()

    def _serve(self, connection: socket.socket) -> None:
        # When QEMU is killed, its end of the connection closes in the middle of anything.
        with suppress(EOFError, ConnectionError), connection, connection.makefile("rwb") as stream:
            _Session(self, cast(BinaryIO, stream)).run()


class _Session:
    """The server's side of one connection."""

    def __init__(self, disk: Disk, stream: BinaryIO) -> None:
        self._disk = disk
        self._stream = stream

    def run(self) -> None:
        self._negotiate()
        while self._answer():
            pass

    def _take(self, length: int) -> bytes:
        data = self._stream.read(length)
        if len(data) < length:
            raise EOFError
        return data

    def _send(self, *parts: bytes) -> None:
        self._stream.write(b"".join(parts))
        self._stream.flush()

    def _negotiate(self) -> None:
        self._send(b"NBDMAGIC", _OPTION_MAGIC, struct.pack(">H", 1))
        self._take(4)
        while True:
            magic, option, length = _OPTION.unpack(self._take(_OPTION.size))
            assert magic == _OPTION_MAGIC, magic
            self._take(length)
            if option != _OPT_GO:
                self._send(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, _REP_ERR_UNSUP, 0))
                continue
            export = _INFO_EXPORT.pack(0, self._disk.size, _HAS_FLAGS | _SEND_FLUSH)
            self._send(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, _REP_INFO, len(export)), export)
            self._send(_OPTION_REPLY.pack(_OPTION_REPLY_MAGIC, option, _REP_ACK, 0))
            return

    def _answer(self) -> bool:
        magic, _, command, handle, offset, length = _REQUEST.unpack(self._take(_REQUEST.size))
        assert magic == _REQUEST_MAGIC, magic
        data = b""
        if command == _READ:
            data = self._disk.read(offset, length)
        elif command == _WRITE:
            self._disk.write(offset, self._take(length))
        elif command == _FLUSH:
            self._disk.flush()
        elif command == _DISCONNECT:
            return False
        else:
            raise AssertionError(f"NBD command {command} was not offered")
        self._send(_REPLY.pack(_REPLY_MAGIC, 0, handle), data)
        return True
