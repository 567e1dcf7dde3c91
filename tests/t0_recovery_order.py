"""The order in which recovery looks at versions, which is that of a plain sort."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cachefsd.core.analysis import order_versions


@pytest.mark.parametrize("count", [0, 1, 2, 1000])
@pytest.mark.parametrize("files", [1, 3, 1 << 31, 1 << 62])
@pytest.mark.parametrize("blocks", [1, 50, 1 << 20, 1 << 30, 1 << 50])
def test_by_file_block_and_version(count: int, files: int, blocks: int) -> None:
    """Few files and blocks make many versions of each block; many of both do not fit into one word, or not with
    the index."""
    rng = np.random.default_rng(count + files % 97 + blocks)
    file_id = rng.integers(0, files, count, dtype=np.uint64, endpoint=True)
    block = rng.integers(0, blocks, count, dtype=np.uint64, endpoint=True)
    seq = rng.permutation(count).astype(np.uint64)
    wanted = sorted(range(count), key=lambda index: (file_id[index], block[index], seq[index]))
    order, same = order_versions(file_id, block, seq)
    assert order.tolist() == wanted
    places = list(zip(file_id[order].tolist(), block[order].tolist(), strict=True))
    assert same.tolist() == [a == b for a, b in itertools.pairwise([*places, (-1, -1)])][:count]
