"""What stands in the place of a pool file when the pool is on a device. The format is in docs/format.md."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import xxhash

from cachefsd.errors import UserError
from cachefsd.media.medium import Medium

RECORD_SIZE = 4096
RECORD_MAGIC = b"cachedev"
_VERSION = 1
_FIELDS = struct.Struct("<8sII16s")
_CHECKSUM = struct.Struct("<Q")
_PATH_MAX = RECORD_SIZE - _FIELDS.size - _CHECKSUM.size


@dataclass(frozen=True, slots=True)
class PoolRecord:
    """The device that holds a pool, and which pool that is."""

    device: Path
    pool_uuid: bytes

    def pack(self) -> bytes:
        """The 4096 bytes of the record.

        :raises OSError: the path is too long.
        """
        path = os.fsencode(self.device)
        if len(path) > _PATH_MAX:
            raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG))
        fields = _FIELDS.pack(RECORD_MAGIC, _VERSION, len(path), self.pool_uuid) + path
        covered = fields.ljust(RECORD_SIZE - _CHECKSUM.size, b"\0")
        return covered + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(covered))

    @classmethod
    def read(cls, file: Medium) -> Self | None:
        """What the beginning of a pool file says; None if it is no record.

        :raises OSError: from the media.
        :raises UserError: it is one, and damaged or of another version.
        """
        raw = bytearray(RECORD_SIZE)
        return cls.unpack(bytes(raw[: file.read(raw, 0)]), file.path)

    @classmethod
    def unpack(cls, raw: bytes, name: Path) -> Self | None:
        """What ``raw``, the beginning of a pool file, says; None if it is no record.

        :raises UserError: it is one, and damaged or of another version.
        """
        if not raw.startswith(RECORD_MAGIC):
            return None
        covered = raw[: RECORD_SIZE - _CHECKSUM.size]
        if raw[len(covered) :] != _CHECKSUM.pack(xxhash.xxh3_64_intdigest(covered)):
            raise UserError(f"{name}: the record of the pool's device is damaged")
        _, version, length, pool_uuid = _FIELDS.unpack_from(raw)
        if version != _VERSION:
            raise UserError(f"{name}: the record has format version {version}, this cachefsd knows {_VERSION}")
        path = raw[_FIELDS.size :][:length]
        if length > _PATH_MAX or not path.startswith(b"/") or b"\0" in path:
            raise UserError(f"{name}: the record of the pool's device names none")
        return cls(Path(os.fsdecode(path)), pool_uuid)
