"""The bytes of a pool beside its map: how superblocks and headers are read, and superblocks written.

Two kinds of place have them: a file, by system calls, and a device of device-dax, which knows no read and no write.
"""

from __future__ import annotations

import errno
import mmap
import os
from pathlib import Path
from typing import Protocol

from cachefsd.errors import UserError
from cachefsd.media.cachedir import READ_ONLY
from cachefsd.media.daxdevice import examine, open_device
from cachefsd.media.mapping import Mapping


class Medium(Protocol):
    """An open, locked place of a pool. Offsets and sizes are in bytes."""

    path: Path
    fd: int
    """what is mapped"""
    bad: tuple[range, ...]
    """what is known to be unreadable: a load from there is a SIGBUS"""

    @property
    def size(self) -> int:
        """How much there is."""

    def holds(self, size: int) -> bool:
        """Whether a pool of ``size`` bytes can be what is here."""

    def read(self, buffer: bytearray | memoryview, offset: int) -> int:
        """Fill ``buffer``; less is only at the end. Returns the number of bytes.

        :raises OSError: EIO, where the media can't be read.
        """

    def write(self, data: bytes | memoryview, offset: int) -> None:
        """Store all of ``data``, to be made durable by :meth:`sync`.

        :raises OSError: from the media.
        """

    def sync(self) -> None:
        """Make what was written durable. Blocks.

        :raises OSError: from the media.
        """

    def close(self) -> None:
        """Close and, once it is not mapped any more, unlock it."""


class FileMedium:
    """A pool file that the caller has opened and locked."""

    bad: tuple[range, ...] = ()  # read(2) says EIO

    def __init__(self, fd: int, path: Path) -> None:
        self.fd = fd
        self.path = path

    @property
    def size(self) -> int:
        return os.fstat(self.fd).st_size

    def holds(self, size: int) -> bool:
        return size == self.size

    def read(self, buffer: bytearray | memoryview, offset: int) -> int:
        view, done = memoryview(buffer), 0
        while done < len(view) and (got := os.preadv(self.fd, [view[done:]], offset + done)):
            done += got
        return done

    def write(self, data: bytes | memoryview, offset: int) -> None:
        done = 0
        while done < len(data):
            written = os.pwrite(self.fd, data[done:], offset + done)
            if not written:
                raise OSError(errno.EIO, "nothing could be written")
            done += written

    def sync(self) -> None:
        os.fdatasync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


class DeviceMedium:
    """A device of device-dax, all of it mapped."""

    def __init__(self, path: Path) -> None:
        """Open and lock it.

        :raises UserError: it can't be used for a pool, or somebody uses it.
        """
        device = open_device(path)
        self.fd = device.fd
        self.path = path
        self.size = device.size
        self.alignment = device.alignment
        self.bad = device.bad
        try:
            self._mapping = Mapping(device.fd, device.size, name=os.fspath(path), volatile=True, forced=None)
        except BaseException as error:
            os.close(device.fd)
            if isinstance(error, OSError):
                raise UserError(f"{path}: can't map the device: {error.strerror}") from error
            raise

    def holds(self, size: int) -> bool:
        return size <= self.size and size % self.alignment == 0

    def read(self, buffer: bytearray | memoryview, offset: int) -> int:
        end = min(offset + len(buffer), self.size)
        if any(part.start < end and offset < part.stop for part in self.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        memoryview(buffer)[: end - offset] = self._mapping.view[offset:end]
        return end - offset

    def write(self, data: bytes | memoryview, offset: int) -> None:
        self._mapping.copy(offset, data)

    def sync(self) -> None:
        self._mapping.fence()

    def close(self) -> None:
        self._mapping.close()
        os.close(self.fd)


class DeviceReader:
    """A device of device-dax, mapped for reading. It is not locked."""

    def __init__(self, path: Path) -> None:
        """
        :raises OSError, UserError: it can't be read.
        """
        facts = examine(path)
        self.path = path
        self.size = facts.size
        self.bad = facts.bad
        self.fd = os.open(path, READ_ONLY)
        try:
            self._map = mmap.mmap(self.fd, facts.size, mmap.MAP_SHARED, mmap.PROT_READ)
        except BaseException:
            os.close(self.fd)
            raise

    def holds(self, size: int) -> bool:
        return size <= self.size

    def read(self, buffer: bytearray | memoryview, offset: int) -> int:
        end = min(offset + len(buffer), self.size)
        if any(part.start < end and offset < part.stop for part in self.bad):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        memoryview(buffer)[: end - offset] = self._map[offset:end]
        return end - offset

    def write(self, data: bytes | memoryview, offset: int) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    def sync(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        self._map.close()
        os.close(self.fd)
