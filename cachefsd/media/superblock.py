"""The two superblocks of a pool, and how they are replaced. The format is in docs/format.md."""

from __future__ import annotations

import errno
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

from cachefsd.errors import ForeignError, UnfinishedError, UserError
from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.medium import Medium
from cachefsd.media.ports import NUMBERS_END
from cachefsd.media.sealed import SEALED_SIZE, is_sealed, seal

SUPERBLOCK_SIZE = SEALED_SIZE
HEADER_OFFSET = 2 * SUPERBLOCK_SIZE
DATA_ALIGNMENT = 2 << 20
MIN_BLOCK_SIZE = 4096
MAX_BLOCK_SIZE = 1 << 20
MAX_SLOTS = (1 << 31) - 1
"""The tables in memory number slots by signed 32-bit integers."""
IDENTITY_MAX = 64
PATH_HINT_MAX = 256

MAGIC = b"cachefsd"
FORMAT_VERSION = 1
KNOWN_INCOMPAT = 0
KNOWN_RO_COMPAT = 0

_FIELDS = struct.Struct("<8sII QQQ 16s QIIQQQ QQQ HH 64s 256s")
_NAMES = "AB"


def require_byte_order(name: object) -> None:
    """See that this machine stores integers as pools do.

    :raises UserError: it is big endian.
    """
    if sys.byteorder != "little":
        raise UserError(f"{name}: a pool needs a little endian machine, and this one is big endian")


def valid_block_size(size: int) -> bool:
    """Whether ``size`` is a power of two from 4 KiB to 1 MiB."""
    return MIN_BLOCK_SIZE <= size <= MAX_BLOCK_SIZE and size & (size - 1) == 0


@dataclass(frozen=True, slots=True)
class Geometry:
    """Where things are in the pool; all in bytes but ``slots``."""

    file_size: int
    block_size: int
    slots: int
    header_offset: int
    data_offset: int

    @classmethod
    def fit(cls, file_size: int, block_size: int) -> Self:
        """As many slots as fit into ``file_size`` bytes; 0 or fewer means that it is too small."""
        slots = (file_size - HEADER_OFFSET) // (HEADER_SIZE + block_size)
        slots = (file_size - _data_offset(slots)) // block_size
        return cls(file_size, block_size, slots, HEADER_OFFSET, _data_offset(slots))

    @staticmethod
    def smallest(block_size: int) -> int:
        """The size in bytes of a pool with one block."""
        return _data_offset(1) + block_size

    def sane(self) -> bool:
        """Whether nothing overlaps and everything is inside the file."""
        return (
            valid_block_size(self.block_size)
            and 1 <= self.slots <= MAX_SLOTS
            and self.header_offset >= HEADER_OFFSET
            and self.header_offset % HEADER_SIZE == 0
            and self.header_offset + self.slots * HEADER_SIZE <= self.data_offset
            and self.data_offset % DATA_ALIGNMENT == 0
            and self.data_offset + self.slots * self.block_size <= self.file_size
        )


def _data_offset(slots: int) -> int:
    end = HEADER_OFFSET + max(slots, 0) * HEADER_SIZE
    return -(-end // DATA_ALIGNMENT) * DATA_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Superblock:
    """One state of the superblock."""

    pool_uuid: bytes
    geometry: Geometry
    generation: int = 0
    version: int = FORMAT_VERSION
    incompat: int = 0
    ro_compat: int = 0
    clean: bool = True
    incarnation: int = 0
    seq_floor: int = 0
    persisted_seq: int = 0
    identity: bytes = b""
    path_hint: bytes = b""

    def pack(self) -> bytes:
        """The 4096 bytes of this state."""
        geometry = self.geometry
        fields = _FIELDS.pack(
            MAGIC, self.version, int(self.clean),
            self.incompat, self.ro_compat, self.generation,
            self.pool_uuid,
            geometry.file_size, geometry.block_size, 0,
            geometry.slots, geometry.header_offset, geometry.data_offset,
            self.incarnation, self.seq_floor, self.persisted_seq,
            len(self.identity), len(self.path_hint), self.identity, self.path_hint,
        )  # fmt: skip
        return seal(fields)

    @classmethod
    def unpack(cls, raw: bytes) -> Self | None:
        """What ``raw`` says, whatever its version; None if it is damaged or no superblock."""
        if not raw.startswith(MAGIC) or not is_sealed(raw):
            return None
        (
            _, version, clean, incompat, ro_compat, generation, pool_uuid,
            file_size, block_size, _,
            slots, header_offset, data_offset,
            incarnation, seq_floor, persisted_seq, identity_len, hint_len, identity, hint,
        ) = _FIELDS.unpack_from(raw)  # fmt: skip
        return cls(
            pool_uuid=pool_uuid,
            geometry=Geometry(file_size, block_size, slots, header_offset, data_offset),
            generation=generation,
            version=version,
            incompat=incompat,
            ro_compat=ro_compat,
            clean=bool(clean & 1),
            incarnation=incarnation,
            seq_floor=seq_floor,
            persisted_seq=persisted_seq,
            identity=identity[:identity_len],
            path_hint=hint[:hint_len],
        )


class SuperblockPair:
    """The superblocks A and B of an open, locked pool; ``current`` is the valid one in force."""

    def __init__(self, medium: Medium, current: Superblock, active: int, *, damaged: bool = False) -> None:
        self._medium = medium
        self._active = active
        self.current = current
        self.damaged = damaged
        """The inactive copy is unusable and has not been replaced yet."""

    @classmethod
    def load(cls, medium: Medium) -> Self:
        """Read both copies and choose; writes nothing.

        If one copy is damaged, it may have been the newer: ``current`` is then taken for that of an unclean
        stop, whatever it says.

        :raises UserError: neither copy can be used, or this version of cachefsd must not use the pool.
        """
        name = medium.path
        require_byte_order(name)
        raws = [_read(medium, index) for index in (0, 1)]
        if not any(map(any, raws)):
            raise UnfinishedError(
                f"{name}: the pool was never finished formatting; make it again with `cachefsd format`"
            )
        copies = [Superblock.unpack(raw) for raw in raws]
        if copies == [None, None]:
            if any(raw.startswith(MAGIC) for raw in raws):
                raise UserError(f"{name}: both superblocks of the pool are damaged")
            raise ForeignError(f"{name}: this is not a pool of cachefsd")
        pair = cls.choose(medium, copies)
        _require_usable(pair.current, medium)
        return pair

    @classmethod
    def choose(cls, medium: Medium, copies: Sequence[Superblock | None]) -> Self:
        """The pair of A and B, of which one may be damaged (None): the newer one is in force."""
        active, current = max(
            ((index, copy) for index, copy in enumerate(copies) if copy is not None),
            key=lambda candidate: candidate[1].generation,
        )
        damaged = None in copies
        if damaged:
            current = replace(current, clean=False, incarnation=current.incarnation + 1)
        return cls(medium, current, active, damaged=damaged)

    @classmethod
    def format(cls, medium: Medium, first: Superblock) -> Self:
        """Write both copies of a new pool."""
        pair = cls(medium, first, active=0)
        pair.store()
        pair.store()
        return pair

    def repair(self) -> str:
        """Replace the damaged copy; returns a line for people."""
        self.store()
        self.damaged = False
        return (
            f"superblock {_NAMES[self._active]} of the pool was damaged and has been written again;"
            " the last stop counts as unclean"
        )

    def store(self, **changes: Any) -> None:
        """Write ``current`` with ``changes`` to the inactive copy, durably, which makes it the active one.

        :raises OSError: nobody knows which of the two is in force on the media.
        """
        new = replace(self.current, generation=self.current.generation + 1, **changes)
        target = 1 - self._active
        self._write(target, new)
        self._active = target
        self.current = new

    def _write(self, target: int, new: Superblock) -> None:
        raw = new.pack()
        self._medium.write(raw, target * SUPERBLOCK_SIZE)
        self._medium.sync()
        if _read(self._medium, target) != raw:
            raise OSError(errno.EIO, "a superblock reads back differently")


def _read(medium: Medium, index: int) -> bytes:
    raw = bytearray(SUPERBLOCK_SIZE)
    try:
        return bytes(raw[: medium.read(raw, index * SUPERBLOCK_SIZE)])
    except OSError as error:
        if error.errno != errno.EIO:
            raise
        return b"unreadable"


def _require_usable(superblock: Superblock, medium: Medium) -> None:
    """:raises UserError: this version of cachefsd must not use the pool, or its place is not what it was."""
    name = medium.path
    if superblock.version != FORMAT_VERSION:
        raise UserError(
            f"{name}: the pool has format version {superblock.version}, this cachefsd knows {FORMAT_VERSION}"
        )
    unknown = superblock.incompat & ~KNOWN_INCOMPAT | superblock.ro_compat & ~KNOWN_RO_COMPAT
    if unknown:
        raise UserError(f"{name}: the pool needs features that this cachefsd lacks (flags {unknown:#x})")
    geometry = superblock.geometry
    if not medium.holds(geometry.file_size):
        raise UserError(
            f"{name} has {medium.size} bytes, its superblock says {geometry.file_size};"
            " it was cut, extended or replaced"
        )
    counted = (superblock.generation, superblock.incarnation, superblock.seq_floor, superblock.persisted_seq)
    if max(counted) >= NUMBERS_END:
        raise UserError(f"{name}: the superblock of the pool counts more than there can be")
    if not geometry.sane():
        raise UserError(f"{name}: the superblock of the pool describes an impossible layout")
