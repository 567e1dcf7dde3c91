"""Stretches of adjacent numbers: blocks that one request covers, slots that lie side by side in the pool."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

Number = TypeVar("Number", bound=np.integer[Any])
SlotIndex = slice | npt.NDArray[np.integer[Any]]
"""Distinct numbers, n > 0 of them or an array of shape (n,), as they index arrays: adjacent ones as a slice, which
numpy takes in a third of the time."""


def runs_of(numbers: Sequence[int] | array[int] | npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Ascending numbers as (first index, count) of stretches without gaps."""
    count = len(numbers)
    if count < 2:
        return [(0, 1)] if count else []  # the usual case, and numpy takes 2 us
    values = np.asarray(numbers)
    (edges,) = (values[1:] - values[:-1] != 1).nonzero()
    if not len(edges):
        return [(0, count)]
    return [(first, end - first) for first, end in _between(edges, count)]


def equal_runs(numbers: npt.NDArray[np.integer[Any]]) -> list[tuple[int, int]]:
    """``numbers``, n > 0 of them, as (first index, end) of stretches of equal ones."""
    (edges,) = (numbers[1:] != numbers[:-1]).nonzero()
    return list(_between(edges, len(numbers)))


def _between(edges: npt.NDArray[np.intp], count: int) -> Iterator[tuple[int, int]]:
    """(first index, end) of what lies between edges, each the index of the last one before it."""
    return pairwise([0, *(edges + 1).tolist(), count])


def slot_index(numbers: array[int]) -> SlotIndex:
    """Numbers in an array of type ``i`` as places; for as long as it is left as it is."""
    first, end = numbers[0], numbers[0] + len(numbers)
    if first >= 0 and numbers[-1] == end - 1 and np.arange(first, end, dtype=np.int32).tobytes() == numbers.tobytes():
        return slice(first, end)
    return np.frombuffer(numbers, np.int32)


def numbers_of(places: SlotIndex, dtype: type[Number]) -> npt.NDArray[Number]:
    """The numbers that ``places`` are, shape (n,)."""
    if isinstance(places, slice):
        return np.arange(places.start, places.stop, dtype=dtype)
    return places.astype(dtype)


def stretches(places: SlotIndex) -> list[tuple[int, int]]:
    """``places`` as (first number, count) of stretches without gaps."""
    if isinstance(places, slice):
        return [(places.start, places.stop - places.start)]
    return [(int(places[index]), count) for index, count in runs_of(places)]
