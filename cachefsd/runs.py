"""Stretches of adjacent numbers: blocks that one request covers, slots that lie side by side in the pool."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt


def runs_of(numbers: Sequence[int] | array[int] | npt.NDArray[Any]) -> list[tuple[int, int]]:
    """Ascending numbers as (first index, count) of stretches without gaps."""
    count = len(numbers)
    if count < 2:
        return [(0, 1)] if count else []  # the usual case, and numpy takes 10 us
    edges = np.flatnonzero(np.diff(numbers) != 1) + 1
    return [(first, end - first) for first, end in pairwise([0, *edges.tolist(), count])]
