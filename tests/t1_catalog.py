"""The catalog on real LMDB environments."""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_fs import loop_mounted
from support_strategies import ANY_NAMES, KEPT_TIMES, PATHS, U32, U63

from cachefsd.media.catalog import LmdbCatalog, create_catalog, open_catalog
from cachefsd.media.ports import (
    CatalogError,
    CatalogFullError,
    Changes,
    FileRecord,
    Intent,
    Stamp,
    hash_of_handle,
)
from cachefsd.media.records import decode_record, decode_table, encode_record

UUID = bytes(range(16))
FULL = FileRecord(
    file_id=2**62 + 5,
    handle=b"\x01handle",
    parent_handle=b"\x02parent",
    name=b"na\xffme",
    path=b"dir/na\xffme",
    mode=0o104755,
    uid=1000,
    gid=2**32 - 2,
    stamp=Stamp(2**40, -1, 2**62),
    attr_seq=2**63 - 1,
    mtime_ns=-7,
    ctime_ns=1_700_000_000_000_000_000,
    unlinked=True,
)


@pytest.fixture
def catalog(tmp_path: Path) -> Iterator[LmdbCatalog]:
    create_catalog(tmp_path, UUID, 100)
    opened = open_catalog(tmp_path, UUID)
    yield opened
    opened.close()


def put_raw(path: Path, database: bytes, key: bytes, value: bytes) -> None:
    env = lmdb.Environment(str(path / "catalog"), map_size=0, max_dbs=4, lib_version=0)
    try:
        with env.begin(write=True, db=env.open_db(database)) as txn:
            txn.put(key, value)
    finally:
        env.close()


RECORD = st.builds(
    FileRecord,
    file_id=U63.filter(bool),
    handle=st.binary(min_size=1, max_size=300),
    parent_handle=st.binary(max_size=300),
    name=ANY_NAMES | st.just(b""),
    path=PATHS,
    mode=U32,
    uid=U32,
    gid=U32,
    stamp=st.none() | st.builds(Stamp, U63, KEPT_TIMES, KEPT_TIMES),
    attr_seq=U63,
    mtime_ns=KEPT_TIMES,
    ctime_ns=KEPT_TIMES,
    unlinked=st.booleans(),
    touched=st.booleans(),
    synced=st.booleans(),
    doubtful=st.booleans(),
)


@given(RECORD)
def test_records_round_trip(record: FileRecord) -> None:
    found = decode_record(record.file_id, encode_record(record))
    assert replace(found, path=record.path) == record
    if len(record.path) <= 1024:
        assert found.path == record.path
    else:
        start, _, end = found.path.partition(b"/")
        assert start == b"(cut)"
        assert record.path.endswith(end)
        assert len(found.path) > 1024 - 256 - len(b"(cut)/")


BAD = pytest.mark.parametrize(
    "changes",
    [
        *({"name": name} for name in (b"..", b".", b"a/b", b"a\0", b"n" * 256)),
        *({"path": path} for path in (b"../etc/passwd", b"a/../../b", b"a/./b", b"a\0/b")),
        {"handle": b""},
        {"handle": b"h" * 512},
        {"parent_handle": b"h" * 512},
        {"file_id": 0},
        {"file_id": 2**63},
        {"attr_seq": 2**63},
        {"stamp": Stamp(2**63, 0, 0)},
    ],
)


def rows_of(records: list[FileRecord]) -> list[tuple[int, int, int, bool]]:
    return [(each.file_id, hash_of_handle(each.handle), each.attr_seq, each.unlinked) for each in records]


def decoded(records: list[FileRecord]) -> list[tuple[int, int, int, bool]]:
    """What many records say, decoded together."""
    keys = [record.file_id.to_bytes(8, "big") for record in records]
    table = decode_table(keys, [encode_record(record) for record in records])
    return list(zip(*(column.tolist() for column in table), strict=True))


@given(st.lists(RECORD, min_size=1, max_size=8))
def test_many_records_are_decoded_as_each_of_them(records: list[FileRecord]) -> None:
    assert decoded(records) == rows_of(records)


@given(st.lists(st.binary(max_size=200).map(lambda end: encode_record(FULL)[: 200 - len(end)] + end), min_size=1))
def test_what_is_damaged_is_refused_among_many_as_well(values: list[bytes]) -> None:
    keys = [(number + 1).to_bytes(8, "big") for number in range(len(values))]
    try:
        expected = rows_of([decode_record(number + 1, value) for number, value in enumerate(values)])
    except (ValueError, struct.error):
        with pytest.raises((ValueError, struct.error)):
            decode_table(keys, values)
    else:
        table = decode_table(keys, values)
        assert list(zip(*(column.tolist() for column in table), strict=True)) == expected


@BAD
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_record_that_leads_astray_is_found_among_others(changes: dict[str, Any], place: int) -> None:
    records = [replace(FULL, file_id=number) for number in (1, 2)]
    records.insert(place, replace(FULL, **changes))
    with pytest.raises(ValueError, match="impossible"):
        decoded(records)


def test_a_table_of_more_records_than_are_decoded_together(catalog: LmdbCatalog) -> None:
    records = [FileRecord(number, b"h%d" % number, name=b"n", path=b"d/n") for number in range(1, 10_000)]
    catalog.transact(Changes(put=records))
    assert [column.tolist() for column in catalog.table()] == [list(c) for c in zip(*rows_of(records), strict=True)]
    assert catalog.record(777) == records[776]


def test_the_table_of_an_empty_catalog(catalog: LmdbCatalog) -> None:
    assert [len(column) for column in catalog.table()] == [0, 0, 0, 0]


def test_a_record_that_is_not_there(catalog: LmdbCatalog) -> None:
    with pytest.raises(CatalogError, match="no record of file 5"):
        catalog.record(5)


def test_a_catalog_that_is_closed_cannot_be_read(tmp_path: Path) -> None:
    create_catalog(tmp_path, UUID, 100)
    catalog = open_catalog(tmp_path, UUID)
    catalog.close()
    for read in (catalog.table, lambda: catalog.record(1)):
        with pytest.raises(CatalogError, match="can't read"):
            read()


@BAD
def test_a_record_that_leads_astray_is_damaged(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="impossible"):
        decode_record(changes.get("file_id", 1), encode_record(replace(FULL, **changes)))


@pytest.mark.parametrize("length", [1, 100, 255])
def test_of_a_long_path_the_end_is_kept(length: int) -> None:
    record = replace(FULL, path=b"/".join([b"n" * length] * 3000))
    kept = decode_record(record.file_id, encode_record(record)).path
    assert 1024 - 256 <= len(kept) <= 1024
    cut, _, end = kept.partition(b"/")
    assert cut == b"(cut)"
    assert set(end.split(b"/")) == {b"n" * length}
    whole = replace(FULL, path=b"/".join([b"n" * 255] * 4))
    assert decode_record(whole.file_id, encode_record(whole)) == whole


def test_everything_survives_reopening(tmp_path: Path) -> None:
    create_catalog(tmp_path, UUID, 100)
    catalog = open_catalog(tmp_path, UUID)
    plain = FileRecord(1, b"one")
    intents = [Intent(1, 9, 4096, -5), Intent(1, 300, 0, -5), Intent(2, 5, 2**62, -5)]
    catalog.transact(
        Changes(put=[FULL, plain], add_intents=list(reversed(intents)), settings={"policy": b"\0" * 100_000})
    )
    catalog.close()
    catalog = open_catalog(tmp_path, UUID)
    assert list(catalog.files()) == [plain, FULL]
    assert catalog.intents() == intents
    assert catalog.setting("policy") == b"\0" * 100_000
    assert catalog.setting("nothing") is None
    catalog.close()


def test_modes(tmp_path: Path, catalog: LmdbCatalog) -> None:
    assert stat.S_IMODE((tmp_path / "catalog").stat().st_mode) == 0o700
    for name in ("data.mdb", "lock.mdb"):
        assert stat.S_IMODE((tmp_path / "catalog" / name).stat().st_mode) == 0o600


def test_a_record_replaces_the_earlier_one(catalog: LmdbCatalog) -> None:
    catalog.transact(Changes(put=[FileRecord(1, b"old"), FileRecord(2, b"other")]))
    catalog.transact(Changes(put=[FileRecord(1, b"new")]))
    assert list(catalog.files()) == [FileRecord(1, b"new"), FileRecord(2, b"other")]


def test_a_catalog_with_an_index_by_handle_as_there_was_one(tmp_path: Path, catalog: LmdbCatalog) -> None:
    catalog.transact(Changes(put=[FileRecord(1, b"a"), FileRecord(2, b"b")]))
    catalog.close()
    for number, handle in ((1, b"a"), (2, b"b")):
        put_raw(tmp_path, b"handles", handle, number.to_bytes(8, "big"))
    catalog = open_catalog(tmp_path, UUID)
    catalog.transact(Changes(put=[FileRecord(1, b"c")], delete=[2]))
    catalog.close()
    catalog = open_catalog(tmp_path, UUID)
    assert list(catalog.files()) == [FileRecord(1, b"c")]
    catalog.close()


def test_deleting_a_file_takes_its_intents_along(catalog: LmdbCatalog) -> None:
    last = 2**63 - 1
    catalog.transact(
        Changes(
            put=[FileRecord(1, b"a"), FileRecord(2, b"b"), FileRecord(3, b"c")],
            add_intents=[
                Intent(1, last, 1, -5),
                Intent(2, 0, 2, -5),
                Intent(2, 7, 2, -5),
                Intent(2, last, 2, -5),
                Intent(3, 0, 3, -5),
            ],
        )
    )
    catalog.transact(Changes(delete=[2, 77]))
    assert [record.file_id for record in catalog.files()] == [1, 3]
    assert catalog.intents() == [Intent(1, last, 1, -5), Intent(3, 0, 3, -5)]


def test_intents_are_dropped_up_to_a_sequence_number(catalog: LmdbCatalog) -> None:
    catalog.transact(Changes(add_intents=[Intent(1, seq, 0, -5) for seq in (1, 5, 6)] + [Intent(2, 1, 0, -5)]))
    catalog.transact(Changes(drop_intents=[(1, 5)], add_intents=[Intent(1, 4, 8, -5)]))
    assert catalog.intents() == [Intent(1, 4, 8, -5), Intent(1, 6, 0, -5), Intent(2, 1, 0, -5)]


def test_what_is_removed_is_removed_first(catalog: LmdbCatalog) -> None:
    catalog.transact(Changes(put=[FileRecord(1, b"h")]))
    catalog.transact(Changes(delete=[1], put=[FileRecord(2, b"h")]))
    assert [record.file_id for record in catalog.files()] == [2]


def test_a_failed_commit_applies_nothing_and_is_the_last(catalog: LmdbCatalog) -> None:
    catalog.transact(Changes(put=[FileRecord(1, b"good")]))
    with pytest.raises(CatalogError, match="can't commit"):
        catalog.transact(Changes(put=[FileRecord(2, b"new")], settings={"": b"LMDB has no empty keys"}))
    with pytest.raises(CatalogError, match="earlier commit"):
        catalog.transact(Changes())
    assert [record.file_id for record in catalog.files()] == [1]


def test_a_map_that_is_full_grows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefsd.media.catalog._MAP_MIN", 64 << 10)
    create_catalog(tmp_path, UUID, 1)
    catalog = open_catalog(tmp_path, UUID)
    records = [FileRecord(number, b"h%d" % number, path=b"p" * 200) for number in range(1, 3000)]
    for first in range(0, 1500, 30):
        catalog.transact(Changes(put=records[first : first + 30]))
    catalog.transact(Changes(put=records[1500:], settings={"big": bytes(1 << 20)}))  # more than twice what there was
    catalog.close()
    catalog = open_catalog(tmp_path, UUID)
    assert list(catalog.files()) == records
    catalog.transact(Changes(delete=[1]))
    assert list(catalog.files()) == records[1:]
    catalog.close()


def test_the_map_of_a_large_pool_holds_its_files(tmp_path: Path) -> None:
    slots = (1 << 40) // 4096
    create_catalog(tmp_path, UUID, slots)
    with lmdb.Environment(str(tmp_path / "catalog"), map_size=0, max_dbs=4, lib_version=0) as env:
        assert env.info()["map_size"] >= slots * 1024
    assert (tmp_path / "catalog" / "data.mdb").stat().st_blocks * 512 < 64 << 20


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with loop_mounted("ext4", tmp_path, size_mib=24, options=("-m", "0")) as mountpoint:
        yield mountpoint


def fill(path: Path) -> None:
    with path.open("wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(4096))


def test_a_full_disk_is_the_error_of_one_commit_and_the_catalog_goes_on(small_disk: Path) -> None:
    create_catalog(small_disk / "cache", UUID, 100)
    catalog = open_catalog(small_disk / "cache", UUID)
    catalog.transact(Changes(put=[FileRecord(1, b"first")]))
    fill(small_disk / "filler")
    for number in range(2, 100):  # the space is reserved
        catalog.transact(Changes(put=[FileRecord(number, b"reserved")], delete=[number - 1]))
    too_much = Changes(put=[FileRecord(7, b"new")], settings={str(n): bytes(1 << 20) for n in range(12)})
    for _ in range(3):
        with pytest.raises(CatalogFullError, match="no space for the catalog"):
            catalog.transact(too_much)
        assert [record.file_id for record in catalog.files()] == [99]
        catalog.transact(Changes(put=[FileRecord(99, b"reserved")]))
    (small_disk / "filler").unlink()
    catalog.transact(too_much)
    catalog.close()
    catalog = open_catalog(small_disk / "cache", UUID)
    assert [record.file_id for record in catalog.files()] == [7, 99]
    assert catalog.setting("11") == bytes(1 << 20)
    catalog.close()


# Refusals


def open_error(path: Path, uuid: bytes = UUID) -> str:
    with pytest.raises(CatalogError) as caught:
        open_catalog(path, uuid)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_catalog(tmp_path: Path) -> None:
    assert "missing" in open_error(tmp_path)
    (tmp_path / "catalog").mkdir()
    assert "missing" in open_error(tmp_path)


def test_a_catalog_of_another_pool(tmp_path: Path) -> None:
    create_catalog(tmp_path, UUID, 100)
    assert "another pool" in open_error(tmp_path, bytes(16))


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        (b"catalog.version", b"2", "version 2"),
        (b"catalog.engine", b"lmdb 1.0", "lmdb 1.0"),
    ],
)
def test_other_versions(tmp_path: Path, name: bytes, value: bytes, words: str) -> None:
    create_catalog(tmp_path, UUID, 100)
    put_raw(tmp_path, b"settings", name, value)
    assert words in open_error(tmp_path)


def test_the_other_engine_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "catalog").mkdir()
    lmdb.Environment(str(tmp_path / "catalog"), lib_version=1).close()
    assert "can't open" in open_error(tmp_path)


@pytest.mark.parametrize("content", [b"x" * 10, b"y" * 100_000])
def test_a_destroyed_catalog(tmp_path: Path, content: bytes) -> None:
    create_catalog(tmp_path, UUID, 100)
    (tmp_path / "catalog" / "data.mdb").write_bytes(content)
    assert "can't open" in open_error(tmp_path)


def test_an_unfinished_catalog_is_refused_and_can_be_finished(tmp_path: Path) -> None:
    (tmp_path / "catalog").mkdir()
    lmdb.Environment(str(tmp_path / "catalog"), lib_version=0, max_dbs=4).close()
    assert "never finished" in open_error(tmp_path)
    put_raw(tmp_path, b"settings", b"catalog.version", b"1")
    assert "never finished" in open_error(tmp_path)
    create_catalog(tmp_path, UUID, 100)
    open_catalog(tmp_path, UUID).close()


def test_creating_never_touches_a_catalog(tmp_path: Path) -> None:
    create_catalog(tmp_path, UUID, 100)
    with pytest.raises(CatalogError, match="already"):
        create_catalog(tmp_path, bytes(16), 100)
    open_catalog(tmp_path, UUID).close()


@pytest.mark.parametrize("value", [b"", b"\x01", b"\x02" + bytes(200), encode_record(FULL)[:-1]])
def test_a_damaged_record_is_an_error_and_nothing_else(tmp_path: Path, value: bytes) -> None:
    create_catalog(tmp_path, UUID, 100)
    put_raw(tmp_path, b"files", (1).to_bytes(8, "big"), value)
    catalog = open_catalog(tmp_path, UUID)
    for read in (catalog.files, catalog.table, lambda: catalog.record(1)):
        with pytest.raises(CatalogError, match="damaged"):
            read()
    catalog.close()
