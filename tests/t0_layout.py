"""Headers and superblocks as bytes: round trips, and damage that must not go unnoticed."""

from __future__ import annotations

import uuid

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_strategies import KEPT_TIMES, U32, U64

from cachefsd.media.header import HeaderCodec, blank_headers
from cachefsd.media.ports import Headers, SlotState
from cachefsd.media.superblock import DATA_ALIGNMENT, Geometry, Superblock
from cachefsd.times import from_word

BLOCK = 4096
UUID = bytes(range(16))
CODEC = HeaderCodec(UUID, BLOCK)
LIVE = st.sampled_from([SlotState.CLEAN, SlotState.DIRTY, SlotState.QUARANTINED])
FIELDS = st.tuples(U64, U64, U64, U64, KEPT_TIMES)


def pack(codec: HeaderCodec, state: int, slot: int, fields: tuple[int, ...], length: int) -> bytes:
    seq, file_id, block, checksum, mtime_ns = fields
    body = codec.body(seq, file_id, block, checksum, mtime_ns, slot, length)
    return codec.state_word(state, seq, slot).to_bytes(8, "little") + body


def check(codec: HeaderCodec, raw: bytes, first_slot: int) -> Headers:
    words = np.frombuffer(raw, "<u8").reshape(-1, 8)
    out = blank_headers(first_slot, len(words))
    codec.check(words, out, 0)
    return out


@given(state=LIVE, slot=U32, fields=FIELDS, length=st.integers(1, BLOCK))
def test_what_is_packed_one_by_one_is_read_back_by_the_vectorised_check(
    state: SlotState, slot: int, fields: tuple[int, ...], length: int
) -> None:
    out = check(CODEC, pack(CODEC, state, slot, fields, length), slot)
    assert not out.malformed[0]
    assert out.seq_known[0]
    assert (out.state[0], out.seq[0], out.file_id[0], out.block[0], out.checksum[0]) == (state, *fields[:4])
    assert from_word(int(out.mtime_ns[0])) == fields[4]
    assert out.length[0] == length


@given(state=LIVE, slot=U32, fields=FIELDS, length=st.integers(1, BLOCK))
def test_no_flipped_bit_leaves_a_live_header(state: SlotState, slot: int, fields: tuple[int, ...], length: int) -> None:
    raw = pack(CODEC, state, slot, fields, length)
    whole = int.from_bytes(raw, "little")
    for bit in range(512):
        out = check(CODEC, (whole ^ 1 << bit).to_bytes(64, "little"), slot)
        assert out.malformed[0], f"bit {bit}"
        assert out.seq_known[0] == (bit < 64), "the body is judged without w0"


@given(
    slot=U32,
    fields=st.lists(st.integers(0, 2**61 - 1), min_size=5, max_size=5),
    length=st.integers(1, BLOCK),
)
def test_exchanged_words_are_noticed(slot: int, fields: list[int], length: int) -> None:
    words = np.frombuffer(pack(CODEC, SlotState.DIRTY, slot, tuple(fields), length), "<u8")
    for first in range(8):
        for second in range(first):
            swapped = words.copy()
            swapped[[first, second]] = swapped[[second, first]]
            if swapped[first] != words[first]:
                out = check(CODEC, swapped.tobytes(), slot)
                assert out.malformed[0] or out.state[0] == SlotState.FREE, (first, second)


@given(slot=st.integers(0, 2**32 - 2), fields=FIELDS)
def test_a_header_is_good_in_its_slot_and_its_pool_only(slot: int, fields: tuple[int, ...]) -> None:
    raw = pack(CODEC, SlotState.CLEAN, slot, fields, BLOCK)
    assert check(CODEC, raw, slot + 1).malformed[0]
    assert not check(CODEC, raw, slot + 1).seq_known[0]
    assert check(HeaderCodec(uuid.uuid4().bytes, BLOCK), raw, slot).malformed[0]


@pytest.mark.parametrize("length", [0, BLOCK + 1])
def test_an_impossible_length_is_malformed(length: int) -> None:
    assert check(CODEC, pack(CODEC, SlotState.CLEAN, 3, (1, 2, 3, 4, 5), length), 3).malformed[0]


def test_zeros_are_a_free_slot_of_no_known_sequence_number() -> None:
    out = check(CODEC, bytes(64 * 3), 7)
    assert (out.state == SlotState.FREE).all()
    assert not out.malformed.any()
    assert not out.seq_known.any()


def test_a_free_header_still_tells_its_sequence_number() -> None:
    out = check(CODEC, pack(CODEC, SlotState.FREE, 7, (41, 2, 3, 4, 5), 1), 7)
    assert out.state[0] == SlotState.FREE
    assert out.seq_known[0]
    assert out.seq[0] == 41
    assert not out.malformed[0]


def test_every_state_byte_but_the_four_is_malformed_and_never_called_free() -> None:
    raw = pack(CODEC, SlotState.CLEAN, 7, (41, 2, 3, 4, 5), 1)
    for byte in set(range(256)) - {0, 0x55}:
        out = check(CODEC, raw[:7] + bytes([byte]) + raw[8:], 7)
        assert out.malformed[0]
        assert out.state[0] == SlotState.QUARANTINED


def test_the_state_word_depends_on_the_low_40_bits_of_the_sequence_number_only() -> None:
    assert CODEC.state_word(2, 5 << 40 | 77, 9) == CODEC.state_word(2, 77, 9)
    assert CODEC.state_word(2, 78, 9) != CODEC.state_word(2, 77, 9)


@pytest.mark.parametrize("block_size", [4096, 65536, 1 << 20])
@pytest.mark.parametrize("slots", [1, 4, 32640, 32641, 1_000_000])
def test_geometry_fits_and_wastes_less_than_the_alignment(block_size: int, slots: int) -> None:
    size = Geometry.fit(1 << 50, block_size).header_offset + slots * (64 + block_size) + DATA_ALIGNMENT
    geometry = Geometry.fit(size, block_size)
    assert geometry.sane()
    assert geometry.slots >= slots - DATA_ALIGNMENT // block_size
    end = geometry.data_offset + geometry.slots * block_size
    assert size - end < DATA_ALIGNMENT + block_size


SUPERBLOCK = Superblock(
    pool_uuid=UUID,
    geometry=Geometry.fit(4 << 20, BLOCK),
    generation=12,
    clean=False,
    incarnation=3,
    seq_floor=2**63,
    persisted_seq=99,
    identity=b"\x00backing\x00",
    path_hint=b"/srv/data",
)


def test_superblock_round_trip() -> None:
    raw = SUPERBLOCK.pack()
    assert len(raw) == 4096
    assert Superblock.unpack(raw) == SUPERBLOCK


@given(st.integers(0, 4096 * 8 - 1))
def test_no_flipped_bit_of_a_superblock_goes_unnoticed(bit: int) -> None:
    damaged = int.from_bytes(SUPERBLOCK.pack(), "little") ^ 1 << bit
    assert Superblock.unpack(damaged.to_bytes(4096, "little")) is None
