"""The one rule for time stamps: which can be kept, as which words, and what file systems make of them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_strategies import ANY_TIMES, EXT4_LAST_S, KEPT_TIMES, U64

from cachefsd.media.header import HeaderCodec, blank_headers
from cachefsd.media.ports import FileRecord, SlotState, Stamp
from cachefsd.media.records import decode_record, encode_record
from cachefsd.times import FIRST_NS, LAST_NS, NS, PROBE_NS, KeptTimes, clamp, from_word, to_word


@given(ANY_TIMES)
def test_the_nearest_time_that_can_be_kept_survives_as_a_word(ns):
    kept = clamp(ns)
    assert FIRST_NS <= kept <= LAST_NS
    assert kept == ns or not FIRST_NS <= ns <= LAST_NS
    assert clamp(kept) == kept
    assert 0 <= to_word(kept) < 1 << 64
    assert from_word(to_word(kept)) == kept


@given(U64)
def test_every_word_is_a_time(word):
    assert FIRST_NS <= from_word(word) <= LAST_NS
    assert to_word(from_word(word)) == word


def test_words_of_the_years_1902_to_2262_are_what_they_always_were():
    for ns in (0, -1, -2_000_000_000 * NS, 1_700_000_000 * NS + 1, (1 << 63) - 1):
        assert to_word(ns) == ns % (1 << 64)
        assert from_word(ns % (1 << 64)) == ns


@given(KEPT_TIMES, KEPT_TIMES, KEPT_TIMES, KEPT_TIMES)
def test_records_hold_all_times(mtime, ctime, stamp_mtime, stamp_ctime):
    record = FileRecord(1, b"h", mtime_ns=mtime, ctime_ns=ctime, stamp=Stamp(5, stamp_mtime, stamp_ctime))
    assert decode_record(1, encode_record(record)) == record


@given(ANY_TIMES)
def test_no_time_makes_a_record_or_a_header_fail(ns):
    decode_record(1, encode_record(FileRecord(1, b"h", mtime_ns=ns, ctime_ns=ns, stamp=Stamp(5, ns, ns))))
    codec = HeaderCodec(b"u" * 16, 4096)
    codec.body(1, 2, 3, 4, ns, 0, 1)


@given(KEPT_TIMES)
def test_headers_hold_all_times(ns):
    import numpy as np

    codec, out = HeaderCodec(b"u" * 16, 4096), blank_headers(0, 1)
    raw = codec.state_word(SlotState.DIRTY, 1, 0).to_bytes(8, "little") + codec.body(1, 2, 3, 4, ns, 0, 1)
    codec.check(np.frombuffer(raw, "<u8").reshape(1, 8), out, 0)
    assert not out.malformed[0]
    assert from_word(int(out.mtime_ns[0])) == ns


def linux(ns: int, first_s: int | None, last_s: int | None, granularity: int) -> int:
    """timestamp_truncate() of the kernel, and the two seconds of FAT."""
    seconds, rest = divmod(ns, NS)
    if first_s is not None and last_s is not None:
        seconds = min(max(seconds, first_s), last_s)
        if seconds in (first_s, last_s):
            rest = 0
    whole = seconds * NS + rest
    return whole - whole % granularity


SYSTEMS = pytest.mark.parametrize(
    ("first_s", "last_s", "granularity"),
    [
        (-(1 << 31), EXT4_LAST_S, 1),
        (-(1 << 31), (1 << 31) - 1, NS),
        (-(1 << 31), (1 << 31) - 1, 1),
        (0, (1 << 32) - 1, NS),
        (315532800, 4354819198, 2 * NS),
        (-(1 << 31), 16299260424, 1),
        (None, None, 1),
        (None, None, 100),
    ],
    ids=["ext4", "ext3", "xfs4", "old", "fat", "xfs", "btrfs", "smb"],
)


@SYSTEMS
@given(ns=KEPT_TIMES | st.integers(0, 2**31).map(lambda s: s * NS))
def test_what_a_probed_file_system_makes_of_a_time_is_known(first_s, last_s, granularity, ns):
    times = KeptTimes()
    times.probed(*(clamp(linux(each, first_s, last_s, granularity)) for each in (FIRST_NS, LAST_NS, PROBE_NS)))
    assert times.granularity == granularity
    kept = linux(ns, first_s, last_s, granularity)
    known = times.of(ns)
    assert known == kept or (known is None and min(abs(ns - end) for end in _ends(first_s, last_s)) < 2 * NS)


def _ends(first_s, last_s):
    return (FIRST_NS, LAST_NS) if first_s is None else (first_s * NS, last_s * NS)


@SYSTEMS
@given(ns=KEPT_TIMES, asked=st.lists(st.integers(0, 2**31 * NS), max_size=5))
def test_what_is_learned_is_true(first_s, last_s, granularity, ns, asked):
    times = KeptTimes()
    assert times.of(ns) is None
    for each in asked:
        times.learn(each, linux(each, first_s, last_s, granularity))
    assert times.granularity in (0, granularity)
    assert times.of(ns) in (None, linux(ns, first_s, last_s, granularity))


def test_a_granularity_is_learned_from_one_good_time():
    for granularity in (1, 100, 10**6, NS, 2 * NS):
        times = KeptTimes()
        times.learn(PROBE_NS, PROBE_NS - PROBE_NS % granularity)
        assert times.granularity == granularity
        assert times.of(PROBE_NS + 3) == (PROBE_NS + 3) // granularity * granularity
        assert times.of(LAST_NS) is None


def test_a_file_system_that_does_something_else_is_never_believed():
    times = KeptTimes()
    times.learn(PROBE_NS, PROBE_NS + 7)
    times.probed(LAST_NS, FIRST_NS, 5)
    assert times.of(PROBE_NS) is None
