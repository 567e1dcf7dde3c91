"""The replacement policy by itself."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cachefsd.core import policy
from cachefsd.core.policy import Clock


def evictable_from(allowed: np.ndarray):
    return lambda start, stop: allowed[start:stop].copy()


def test_victims_are_evictable_distinct_and_as_many_as_there_are():
    clock = Clock(10)
    allowed = np.zeros(10, bool)
    allowed[[2, 5, 7]] = True
    victims = clock.victims(64, evictable_from(allowed))
    assert sorted(victims) == [2, 5, 7]


def test_a_touched_block_outlives_an_untouched_one():
    clock = Clock(4)
    for slot in range(4):
        clock.admitted(slot)
    clock.touched(0)
    clock.touched(2)
    assert sorted(clock.victims(2, evictable_from(np.ones(4, bool)))) == [1, 3]


def test_the_hand_goes_on_where_it_stopped():
    clock = Clock(8)
    everything = evictable_from(np.ones(8, bool))
    assert clock.victims(3, everything) == [0, 1, 2]
    assert clock.victims(3, everything) == [3, 4, 5]


def test_a_scan_does_not_displace_what_is_used():
    clock = Clock(100)
    hot = set(range(0, 100, 10))
    for slot in range(100):
        clock.admitted(slot)
    for _ in range(20):
        for slot in hot:
            clock.touched(slot)
        for slot in clock.victims(10, evictable_from(np.ones(100, bool))):
            assert slot not in hot
            clock.admitted(slot)


@given(
    slots=st.integers(1, 20_000),
    count=st.integers(1, 200),
    touches=st.lists(st.integers(0, 19_999), max_size=200),
    seed=st.integers(0, 2**32 - 1),
)
def test_finds_all_there_are_whatever_happened_before(slots, count, touches, seed):
    clock = Clock(slots)
    for slot in touches:
        clock.touched(slot % slots)
    allowed = np.random.default_rng(seed).random(slots) < 0.01
    victims = clock.victims(count, evictable_from(allowed))
    assert len(victims) == len(set(victims)) == min(count, int(allowed.sum()))
    assert all(allowed[slot] for slot in victims)


def test_state_survives_a_restart():
    clock = Clock(4)
    clock.touched(1)
    again = Clock(4)
    again.load(0, clock.dump(0))
    assert again.victims(3, evictable_from(np.ones(4, bool))) == [0, 2, 3]


@pytest.mark.parametrize("state", [b"", bytes(2), bytes(4)])
def test_a_state_of_another_shape_is_ignored(state):
    clock = Clock(4)
    clock.load(0, state)
    assert clock.dump(0) == bytes(1)


@given(st.lists(st.tuples(st.booleans(), st.sets(st.integers(0, 19))), max_size=12))
def test_many_slots_at_once_count_as_one_by_one(steps):
    one, many = Clock(20), Clock(20)
    for admitted, slots in steps:
        places = np.array(sorted(slots), np.uint64)
        for slot in slots:
            (one.admitted if admitted else one.touched)(slot)
        (many.admitted_all if admitted else many.touched_all)(places)
    assert many.dump(0) == one.dump(0)


@given(st.integers(1, 30), st.lists(st.integers(0, 29), max_size=60))
def test_state_survives_in_pieces(slots, touches):
    clock, again = Clock(slots), Clock(slots)
    with mock.patch.object(policy, "PIECE", 8):
        for slot in touches:
            clock.touched(slot % slots)
        for piece in range(-(-slots // 8)):
            again.load(piece, clock.dump(piece))
    assert again._counters == clock._counters


def test_a_search_ends_early_and_goes_on():
    clock = Clock(3 * Clock._SKIPPED)
    state = bytearray(3 * Clock._SKIPPED)
    wanted = [Clock._SKIPPED - 1, 2 * Clock._SKIPPED + 5, 3 * Clock._SKIPPED - 1]
    for slot in wanted:
        state[slot] = 1
        clock.touched(slot)
    skipped: list[int] = []

    def skip(start: int, stop: int) -> int:
        found = state.find(1, start, stop)
        end = stop if found < 0 else found
        skipped.append(end - start)
        return end

    found: list[int] = []
    searches = 0
    while len(found) < 3:
        skipped.clear()
        for slot in clock.victims(64, lambda start, stop: np.frombuffer(state[start:stop], np.uint8) == 1, skip):
            found.append(slot)
            state[slot] = 0
        assert sum(skipped) <= Clock._SKIPPED
        searches += 1
        assert searches < 30
    assert sorted(found) == wanted
    while clock.unfinished:
        assert not clock.victims(1, lambda start, stop: np.frombuffer(state[start:stop], np.uint8) == 1, skip)
        searches += 1
        assert searches < 60


def test_a_search_of_what_may_not_go_ends():
    clock = Clock(10)
    assert clock.victims(3, lambda start, stop: np.zeros(stop - start, bool)) == []
    assert not clock.unfinished
