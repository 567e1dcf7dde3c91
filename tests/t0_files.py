"""The block table of a file."""

from __future__ import annotations

from array import array
from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from cachefsd.core.blocktable import ABSENT, CHUNK_BLOCKS, BlockTable
from cachefsd.runs import numbers_of, runs_of, slot_index, stretches

BLOCKS = st.integers(0, 4 * CHUNK_BLOCKS) | st.integers(0, 2**40)


@given(st.lists(st.tuples(BLOCKS, st.integers(0, 2**31 - 1) | st.none()), max_size=60))
def test_behaves_like_a_dict(steps):
    table = BlockTable()
    model: dict[int, int] = {}
    for block, slot in steps:
        assert table.get(block) == model.get(block, ABSENT)
        if slot is not None:
            assert table.put(block, slot) == model.get(block, ABSENT)
            model[block] = slot
        elif block in model:
            table.remove(np.array([block], np.uint64))
            del model[block]
        assert table.cached == len(model)
    walked = [(int(b), int(s)) for blocks, slots in table.walk() for b, s in zip(blocks, slots, strict=True)]
    assert walked == sorted(model.items())
    assert sum(1 for _ in table.chunks) == len({b // CHUNK_BLOCKS for b in model})


@given(st.dictionaries(BLOCKS, st.integers(0, 2**31 - 1), min_size=1, max_size=60), BLOCKS)
def test_filling_at_once_and_walking_from_a_block(model, first):
    table = BlockTable()
    blocks = sorted(model)
    table.put_many(np.array(blocks, np.uint64), np.array([model[b] for b in blocks], np.int32))
    assert table.cached == len(model)
    assert all(table.get(b) == model[b] for b in blocks)
    walked = [int(b) for part, _ in table.walk(first) for b in part]
    assert walked == [b for b in blocks if b >= first]


@given(st.lists(st.tuples(BLOCKS, st.integers(1, 3 * CHUNK_BLOCKS)), min_size=1, max_size=5))
def test_runs_of_blocks_behave_like_a_dict(runs):
    table, slot = BlockTable(), 0
    model: dict[int, int] = {}
    for first, count in runs:
        blocks = range(first, first + count)
        before = [model.get(block, ABSENT) for block in blocks]
        assert table.get_run(first, count).tolist() == before
        assert table.absent(first, count) == [block for block in blocks if block not in model]
        slots = array("i", range(slot, slot + count))
        assert table.put_run(first, slots).tolist() == before
        model.update(zip(blocks, slots.tolist(), strict=True))
        assert table.get_run(first, count).tolist() == slots.tolist()
        slot += count
    assert table.cached == len(model)
    assert walked(table) == model
    for block in model:
        table.remove(np.array([block], np.uint64))
    assert not table.chunks


@given(st.sets(BLOCKS | st.integers(0, 2 * CHUNK_BLOCKS), min_size=1, max_size=60), st.data())
def test_removing_many_is_removing_each(blocks, data):
    model = {block: slot for slot, block in enumerate(sorted(blocks))}
    table = BlockTable()
    table.put_many(np.array(list(model), np.uint64), np.array(list(model.values()), np.int32))
    gone = sorted(data.draw(st.sets(st.sampled_from(list(model)), min_size=1)))
    table.remove(np.array(gone, np.uint64))
    for block in gone:
        del model[block]
    assert table.cached == len(model)
    assert walked(table) == model
    assert sum(1 for _ in table.chunks) == len({b // CHUNK_BLOCKS for b in model})


def walked(table: BlockTable) -> dict[int, int]:
    return {int(b): int(s) for blocks, slots in table.walk() for b, s in zip(blocks, slots, strict=True)}


@given(st.sets(st.integers(0, 50)))
def test_runs(numbers):
    ordered = sorted(numbers)
    runs = runs_of(ordered)
    assert [n for start, count in runs for n in ordered[start : start + count]] == ordered
    for start, count in runs:
        assert ordered[start + count - 1] - ordered[start] == count - 1
    for (a, n), (b, _) in pairwise(runs):
        assert ordered[b] > ordered[a + n - 1] + 1


@given(st.lists(st.integers(-1, 12), min_size=1, max_size=6) | st.tuples(st.integers(0, 9), st.integers(1, 9)))
def test_places(numbers):
    if isinstance(numbers, tuple):
        numbers = list(range(numbers[0], sum(numbers)))
    places = slot_index(array("i", numbers))
    assert isinstance(places, slice) == (numbers[0] >= 0 and numbers == list(range(numbers[0], numbers[-1] + 1)))
    assert np.arange(30)[places].tolist() == [number % 30 for number in numbers]
    assert numbers_of(places, np.int64).tolist() == numbers
    assert [slot + i for slot, count in stretches(places) for i in range(count)] == numbers
