"""Making a cache: what fails in between leaves nothing behind, and takes nothing with it."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from cachefsd.errors import UserError
from cachefsd.media.catalog import open_catalog
from cachefsd.media.pool import open_pool
from cachefsd.media.ports import CatalogError, Changes, FileRecord
from cachefsd.service import caches
from cachefsd.service.caches import Provisional, format_cache

SIZE = 4 << 20


def make(cache: Path) -> None:
    assert format_cache(cache, SIZE, 4096, volatile=True, progress=None, may_replace=None) is not None


def tree_of(path: Path) -> list[str]:
    return sorted(os.fspath(found.relative_to(path)) for found in path.rglob("*"))


class Interrupted(BaseException):
    pass


@pytest.mark.parametrize("error", [CatalogError("full"), OSError(errno.ENOSPC, "full"), Interrupted()])
@pytest.mark.parametrize("there", [False, True], ids=["new directory", "old directory"])
def test_a_failed_format_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, there: bool
) -> None:
    cache = tmp_path / "above" / "cache"
    if there:
        cache.mkdir(parents=True)
        (cache / "cachefsd.log").write_text("of earlier days")
    before = tree_of(tmp_path)

    def fail(path: Path, uuid: bytes, slots: int) -> None:
        (path / "catalog").mkdir()
        (path / "catalog" / "data.mdb").write_bytes(b"half")
        raise error

    monkeypatch.setattr(caches, "create_catalog", fail)
    with pytest.raises((UserError, Interrupted)):
        make(cache)
    assert tree_of(tmp_path) == before


def test_no_space_in_mid_format(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int, offset: int, size: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(UserError, match="No space left"):
        make(tmp_path / "above" / "cache")
    assert tree_of(tmp_path) == []


def test_a_failed_format_removes_no_directory_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: Path, uuid: bytes, slots: int) -> None:
        (tmp_path / "above" / "other").mkdir()
        raise CatalogError("full")

    monkeypatch.setattr(caches, "create_catalog", fail)
    with pytest.raises(UserError):
        make(tmp_path / "above" / "cache")
    assert tree_of(tmp_path) == ["above", "above/other"]


def test_a_provisional_cache_is_gone_unless_it_is_kept(tmp_path: Path) -> None:
    with Provisional(tmp_path / "a" / "b"):
        make(tmp_path / "a" / "b")
    assert tree_of(tmp_path) == []
    with Provisional(tmp_path / "a" / "b") as made:
        make(tmp_path / "a" / "b")
        made.keep()
    assert (tmp_path / "a" / "b" / "pool").exists()
    with Provisional(tmp_path / "a" / "b"):
        pass
    assert (tmp_path / "a" / "b" / "pool").exists()  # it was there before


def test_a_provisional_cache_that_was_used_stays(tmp_path: Path) -> None:
    with Provisional(tmp_path / "cache"):
        make(tmp_path / "cache")
        with open_pool(tmp_path / "cache", volatile=True) as pool:
            catalog = open_catalog(tmp_path / "cache", pool.uuid)
            record = FileRecord(1, b"handle", b"", b"name", b"name", 0o100644, 0, 0, None, 0, 0, 0)
            catalog.transact(Changes(put=[record]))
            catalog.close()
    assert (tmp_path / "cache" / "pool").exists()


def test_a_provisional_cache_that_is_in_use_stays(tmp_path: Path) -> None:
    with Provisional(tmp_path / "other") as made:
        make(tmp_path / "other")
        pool = open_pool(tmp_path / "other", volatile=True)
        made.__exit__(None, None, None)
        assert (tmp_path / "other" / "pool").exists()
        pool.close()
