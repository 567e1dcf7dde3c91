"""The budget of descriptors."""

from __future__ import annotations

import os
import resource
from collections.abc import Iterator

import pytest

from cachefsd.backing.descriptors import Descriptors


@pytest.fixture
def limit() -> Iterator[int]:
    """A limit for this test only, not far above what is open."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    number = len(os.listdir("/proc/self/fd")) + 200
    resource.setrlimit(resource.RLIMIT_NOFILE, (number, hard))
    try:
        yield number
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_quarter_is_kept_for_what_is_open(limit: int) -> None:
    budget = Descriptors()
    assert budget.limit == limit
    assert 2 * budget.most_files <= 200 - limit // 4
    assert not budget.short()
    taken = []
    try:
        while not budget.in_reserve(fd := os.dup(1)):
            taken.append(fd)
        taken.append(fd)
        assert limit - limit // 4 <= fd < limit
        assert budget.short()
        while fd < limit - 1:
            fd = os.dup(1)
            taken.append(fd)
        with pytest.raises(OSError, match="Too many open files"):
            os.dup(1)
        assert budget.short()
        os.close(taken.pop(0))
        assert not budget.short()
    finally:
        for fd in taken:
            os.close(fd)


def test_many_descriptors_have_a_small_reserve(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1 << 20, 1 << 20))
    budget = Descriptors()
    assert budget.in_reserve((1 << 20) - 1024)
    assert not budget.in_reserve((1 << 20) - 1025)


def test_one_file_can_always_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1, 1))
    assert Descriptors().most_files == 1
