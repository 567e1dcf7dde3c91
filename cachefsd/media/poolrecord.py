"""What stands in the place of a pool file when the pool is on a device. The format is in docs/format.md."""

from __future__ import annotations

import errno
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from cachefsd.errors import UserError
from cachefsd.media.medium import Medium
from cachefsd.media.sealed import FIELDS_MAX, SEALED_SIZE, is_sealed, seal

RECORD_SIZE = SEALED_SIZE
RECORD_MAGIC = b"cachedev"
_VERSION = 1
_FIELDS = struct.Struct("<8sII16s")
_PATH_MAX = FIELDS_MAX - _FIELDS.size


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
        return seal(fields)

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
        if not is_sealed(raw):
            raise UserError(f"{name}: the record of the pool's device is damaged")
        _, version, length, pool_uuid = _FIELDS.unpack_from(raw)
        if version != _VERSION:
            raise UserError(f"{name}: the record has format version {version}, this cachefsd knows {_VERSION}")
        path = raw[_FIELDS.size :][:length]
        if length > _PATH_MAX or not path.startswith(b"/") or b"\0" in path:
            raise UserError(f"{name}: the record of the pool's device names none")
        return cls(Path(os.fsdecode(path)), pool_uuid)
