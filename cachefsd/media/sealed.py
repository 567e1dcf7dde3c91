"""Fields with a checksum behind them, as the superblocks of a pool and the record of its device are on the media."""

from __future__ import annotations

import struct

import xxhash

SEALED_SIZE = 4096
_CHECKSUM = struct.Struct("<Q")
FIELDS_MAX = SEALED_SIZE - _CHECKSUM.size


def seal(fields: bytes) -> bytes:
    """The 4096 bytes of ``fields``, zeros, and the checksum of both."""
    covered = fields.ljust(FIELDS_MAX, b"\0")
    return covered + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(covered))


def is_sealed(raw: bytes) -> bool:
    """Whether ``raw`` is what :func:`seal` has made of some fields, whole and undamaged."""
    covered, checksum = raw[:FIELDS_MAX], raw[FIELDS_MAX:]
    return checksum == _CHECKSUM.pack(xxhash.xxh3_64_intdigest(covered))
