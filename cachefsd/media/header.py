"""The 64-byte header of a slot: packing one, checking millions. The format is in docs/format.md."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from cachefsd.media.ports import U64, Headers, SlotState
from cachefsd.times import to_word

HEADER_SIZE = 64
WORDS_PER_HEADER = 8

_MASK64 = (1 << 64) - 1
_LOW40 = (1 << 40) - 1
_LOW32 = (1 << 32) - 1
_STATE_REPEATED = 0x55  # the 2-bit state four times: states differ in at least four bits of w0

# Odd, so that flipping any single bit of a word changes the sum, and of differences divisible by at
# most 8, so that exchanging two words is missed only if they are equal modulo 2**61.
_BODY_FACTORS = (
    0x9E3779B97F4A7C11,
    0xC2B2AE3D27D4EB43,
    0x165667B19E3779FD,
    0xFF51AFD7ED558CCF,
    0xC4CEB9FE1A85EC59,
    0xD6E8FEB86659FD9B,
)
_FINAL_FACTOR = 0xBF58476D1CE4E5B9
_STATE_FACTOR = 0x94D049BB133111EB
_SLOT_FACTOR = 0xD1B54A32D192ED03


def _u64(value: Any) -> U64:
    return np.array(value, np.uint64)


# numpy takes an array of no dimension in half the time of an int.
_LOW40_NP, _29_NP, _32_NP, _40_NP, _48_NP = _u64(_LOW40), _u64(29), _u64(32), _u64(40), _u64(48)
_BODY_FACTORS_NP, _FINAL_FACTOR_NP = _u64(_BODY_FACTORS), _u64(_FINAL_FACTOR)
_STATE_FACTOR_NP, _SLOT_FACTOR_NP = _u64(_STATE_FACTOR), _u64(_SLOT_FACTOR)


@lru_cache(64)
def _counted(count: int) -> U64:
    """What differs between the headers of consecutive blocks: seq and block count up."""
    words = np.zeros((count, WORDS_PER_HEADER), np.uint64)
    words[:, 1] = words[:, 3] = np.arange(count)
    return words


_pack_body = struct.Struct("<7Q").pack


class HeaderCodec:
    """Packs and checks the headers of one pool: its UUID is part of every check."""

    __slots__ = ("_block_size", "_seed", "_seed_np", "_states", "_states_np")

    def __init__(self, pool_uuid: bytes, block_size: int) -> None:
        self._seed = xxhash.xxh3_64_intdigest(pool_uuid)
        self._seed_np = _u64(self._seed)
        self._block_size = block_size
        # By state: its byte in place, and its share of the check; 0.1 µs less per state word.
        state_bytes = [state * _STATE_REPEATED for state in SlotState]
        self._states = [(byte << 56, (byte << 40) * _STATE_FACTOR + self._seed) for byte in state_bytes]
        self._states_np = [(_u64(placed), _u64(share & _MASK64)) for placed, share in self._states]

    def state_word(self, state: int, seq: int, slot: int) -> int:
        """w0. Only the low 40 bits of ``seq`` matter."""
        placed, share = self._states[state]
        low = seq & _LOW40
        check = (low * _STATE_FACTOR + slot * _SLOT_FACTOR + share & _MASK64) >> 48
        return placed | check << 40 | low

    def body(self, seq: int, file_id: int, block: int, checksum: int, mtime_ns: int, slot: int, length: int) -> bytes:
        """w1 to w7, 56 bytes. ``mtime_ns`` is stored as the word of ``cachefsd.times``.

        A sum of products because it costs 0.4 µs here and 5 ns per header in numpy; xxh3 would cost 0.1 µs
        here, but in numpy its 128-bit products take four multiplications each.
        """
        f1, f2, f3, f4, f5, f6 = _BODY_FACTORS
        mtime_ns &= _MASK64  # to_word, without the call
        place = length << 32 | slot
        total = (
            self._seed + seq * f1 + file_id * f2 + block * f3 + checksum * f4 + mtime_ns * f5 + place * f6
        ) & _MASK64
        total = (total ^ total >> 32) * _FINAL_FACTOR & _MASK64
        return _pack_body(seq, file_id, block, checksum, mtime_ns, place, total ^ total >> 29)

    def state_words(self, state: int, seqs: U64, slots: U64) -> U64:
        """:meth:`state_word` of many slots."""
        placed, share = self._states_np[state]
        low = seqs & _LOW40_NP
        words: U64 = low * _STATE_FACTOR_NP
        words += slots * _SLOT_FACTOR_NP
        words += share
        words >>= _48_NP
        words <<= _40_NP
        words |= low
        words |= placed
        return words

    def headers(
        self,
        state: int,
        seq: int,
        file_id: int,
        block: int,
        checksums: U64,
        mtime_ns: int,
        slots: U64,
        last_length: int,
    ) -> U64:
        """Whole headers of consecutive blocks of one file, with consecutive numbers, all full but the last one;
        shape (n, 8)."""
        words: U64 = _counted(len(slots)) + _u64(
            [0, seq, file_id, block, 0, to_word(mtime_ns), self._block_size << 32, 0]
        )
        words[:, 4] = checksums
        words[-1, 6] = last_length << 32
        words[:, 6] += slots
        words[:, 7] = self._body_checks(words[:, 1:7])
        words[:, 0] = self.state_words(state, words[:, 1], slots)
        return words

    def _body_checks(self, words: U64) -> U64:
        """w7 to w1 to w6, shape (n, 6)."""
        total: U64 = words @ _BODY_FACTORS_NP
        total += self._seed_np
        total ^= total >> _32_NP
        total *= _FINAL_FACTOR_NP
        total ^= total >> _29_NP
        return total

    def _state_checks(self, words: npt.NDArray[Any], slots: U64) -> U64:
        """The checks in w0 to ``words``, uint64: the state's byte above the low 40 bits of seq."""
        checks: U64 = words * _STATE_FACTOR
        checks += slots * _SLOT_FACTOR
        checks += self._seed
        checks >>= 48
        return checks

    def check(self, words: U64, out: Headers, at: int) -> None:
        """Check ``words``, shape (n, 8), and describe them in ``out`` from index ``at`` on."""
        part = slice(at, at + len(words))
        slots = np.arange(out.first_slot + at, out.first_slot + at + len(words), dtype=np.uint64)
        w0, w1, w6 = words[:, 0], words[:, 1], words[:, 6]
        length = out.length[part]
        np.right_shift(w6, 32, out=length)

        body_good = self._body_checks(words[:, 1:7]) == words[:, 7]
        body_good &= w6 & _LOW32 == slots
        body_good &= length - 1 < self._block_size  # length 0 wraps around

        state_byte = w0 >> 56
        state = np.bitwise_and(state_byte, 3, dtype=np.uint64)
        live = self._state_checks(state_byte << 40 | w0 & _LOW40, slots) == w0 >> 40 & 0xFFFF
        live &= state_byte == state * _STATE_REPEATED
        live &= (w0 ^ w1) & _LOW40 == 0
        live &= body_good
        malformed = ~live & (state_byte != 0)
        # A caller that forgets to look at ``malformed`` must not take the slot for a free one.
        state[malformed] = SlotState.QUARANTINED

        out.state[part] = state
        out.malformed[part] = malformed
        out.seq_known[part] = body_good
        fields = (out.seq, out.file_id, out.block, out.checksum, out.mtime_ns)
        for column, values in enumerate(fields, 1):
            values[part] = words[:, column]


def blank_headers(first_slot: int, count: int) -> Headers:
    """Arrays for ``count`` headers, all marked unreadable until they have been checked."""

    def words() -> U64:
        return np.zeros(count, np.uint64)

    return Headers(
        first_slot=first_slot,
        state=np.full(count, SlotState.QUARANTINED, np.uint8),
        seq=words(),
        file_id=words(),
        block=words(),
        checksum=words(),
        mtime_ns=words(),
        length=words(),
        seq_known=np.zeros(count, np.bool_),
        malformed=np.zeros(count, np.bool_),
        unreadable=np.ones(count, np.bool_),
    )
