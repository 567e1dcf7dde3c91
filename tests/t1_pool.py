"""The pool on real files: format, owning, refusing, the durability classes, and what a crash leaves."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import stat
import sys
import tempfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cachefsd.errors import UserError
from cachefsd.media.pool import MappedPool, open_pool
from cachefsd.media.poolfile import PoolInfo, create_pool
from cachefsd.media.ports import Durability, SlotState
from cachefsd.media.superblock import MAX_SLOTS, SUPERBLOCK_SIZE, Geometry, Superblock
from cachefsd.runs import slot_index

BLOCK = 4096
DATA_OFFSET = 2 << 20


def size_for(slots: int) -> int:
    return DATA_OFFSET + slots * BLOCK


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    create_pool(tmp_path / "cache", size_for(8), BLOCK, volatile=True)
    return tmp_path / "cache"


@pytest.fixture
def memory_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/dev/shm"))
    yield path
    shutil.rmtree(path)


def publish(pool: MappedPool, slot: int, seq: int, state: SlotState = SlotState.DIRTY) -> None:
    pool.publish(slot, state, seq, 7, slot, 0xABCDEF, -5, BLOCK)


def change(cache: Path, offset: int, data: bytes) -> None:
    fd = os.open(cache / "pool", os.O_WRONLY)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def superblocks(cache: Path) -> list[Superblock | None]:
    raw = (cache / "pool").read_bytes()[: 2 * SUPERBLOCK_SIZE]
    return [Superblock.unpack(raw[:SUPERBLOCK_SIZE]), Superblock.unpack(raw[SUPERBLOCK_SIZE:])]


def rewrite(cache: Path, edit: Callable[[Superblock], Superblock]) -> None:
    """Edit both superblocks, checksums included."""
    for index, found in enumerate(superblocks(cache)):
        assert found is not None
        change(cache, index * SUPERBLOCK_SIZE, edit(found).pack())


def newest(cache: Path) -> int:
    generations = [found.generation if found else -1 for found in superblocks(cache)]
    return generations.index(max(generations))


# Format


def test_format_allocates_and_clears_every_byte(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    size = size_for(5) + 17
    info = create_pool(
        tmp_path / "a" / "b",
        size,
        BLOCK,
        volatile=True,
        progress=lambda done, total: seen.append((done, total)),
    )
    path = tmp_path / "a" / "b" / "pool"
    assert info == PoolInfo(path, info.uuid, size, BLOCK, 5)
    assert seen[-1] == (size, size)
    status = path.stat()
    assert status.st_size == size
    assert status.st_blocks * 512 >= size
    assert stat.S_IMODE(status.st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not any(path.read_bytes()[2 * SUPERBLOCK_SIZE :])


@pytest.mark.parametrize(
    ("size", "block_size", "words"),
    [
        (1000, BLOCK, "too small"),
        (size_for(1) - 1, BLOCK, "too small"),
        (1 << 30, 5000, "power of two"),
        (1 << 30, 2048, "power of two"),
        (1 << 30, 2 << 20, "power of two"),
        (1 << 46, BLOCK, "larger blocks"),
        (1 << 43, BLOCK, "free"),
    ],
)
def test_format_refuses_what_cannot_be(tmp_path: Path, size: int, block_size: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        create_pool(tmp_path / "cache", size, block_size, volatile=True)
    assert not (tmp_path / "cache" / "pool").exists()


@pytest.mark.parametrize("block_size", [4096, 65536, 1 << 20])
def test_what_is_said_of_the_smallest_pool_is_true(tmp_path: Path, block_size: int) -> None:
    with pytest.raises(UserError, match=r"the smallest pool has (\d+)K$") as caught:
        create_pool(tmp_path / "cache", 2 << 20, block_size, volatile=True)
    smallest = int(str(caught.value).split()[-1][:-1]) << 10
    assert create_pool(tmp_path / "cache", smallest, block_size, volatile=True).slots == 1
    with pytest.raises(UserError, match="too small"):
        create_pool(tmp_path / "other", smallest - 1, block_size, volatile=True)


def test_a_big_endian_machine_is_refused(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "byteorder", "big")
    with pytest.raises(UserError, match="little endian"):
        open_pool(cache, volatile=True)
    with pytest.raises(UserError, match="little endian"):
        create_pool(tmp_path / "other", size_for(8), BLOCK, volatile=True)
    assert not (tmp_path / "other").exists()


def test_slots_are_numbered_by_signed_words() -> None:
    assert Geometry.fit((1 << 31) * BLOCK + (1 << 38), BLOCK).slots > MAX_SLOTS
    assert not replace(Geometry.fit(1 << 30, BLOCK), slots=1 << 31, file_size=1 << 50, data_offset=1 << 40).sane()
    assert replace(Geometry.fit(1 << 30, BLOCK), slots=MAX_SLOTS, file_size=1 << 50, data_offset=1 << 40).sane()


def test_format_never_overwrites_a_pool(cache: Path) -> None:
    before = (cache / "pool").read_bytes()
    with pytest.raises(UserError, match="already"):
        create_pool(cache, size_for(8), BLOCK, volatile=True)
    assert (cache / "pool").read_bytes() == before


def test_format_leaves_a_pool_alone_whose_superblocks_are_lost(cache: Path) -> None:
    with open_pool(cache, volatile=True) as pool:
        publish(pool, 3, 1)
    change(cache, 0, bytes(2 * SUPERBLOCK_SIZE))
    with pytest.raises(UserError, match="already"):
        create_pool(cache, size_for(8), BLOCK, volatile=True)


def test_an_interrupted_format_is_unusable_and_can_be_done_again(tmp_path: Path) -> None:
    cache = tmp_path / "cache"

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        create_pool(cache, size_for(8), BLOCK, volatile=True, progress=interrupt)
    with pytest.raises(UserError, match="never finished formatting"):
        open_pool(cache, volatile=True)
    assert create_pool(cache, size_for(3), BLOCK, volatile=True).slots == 3
    assert (cache / "pool").stat().st_size == size_for(3)


def test_a_format_that_fails_leaves_no_pool_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int, data: Any, offset: int) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "pwrite", fail)
    with pytest.raises(UserError, match="Input/output error"):
        create_pool(tmp_path / "cache", size_for(8), BLOCK, volatile=True)
    assert not (tmp_path / "cache" / "pool").exists()


# Opening and refusing


def open_error(cache: Path) -> str:
    before = (cache / "pool").read_bytes() if (cache / "pool").exists() else b""
    with pytest.raises(UserError) as caught:
        open_pool(cache, volatile=True)
    after = (cache / "pool").read_bytes() if (cache / "pool").exists() else b""
    assert before == after, "a refusal writes nothing"
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_pool(tmp_path: Path) -> None:
    assert "can't open" in open_error(tmp_path)


def test_a_file_that_is_no_pool(tmp_path: Path) -> None:
    (tmp_path / "pool").write_bytes(b"hello" * 10000)
    assert "not a pool" in open_error(tmp_path)


def test_an_empty_file(tmp_path: Path) -> None:
    (tmp_path / "pool").touch()
    assert "never finished" in open_error(tmp_path)


def test_both_superblocks_damaged(cache: Path) -> None:
    change(cache, 100, b"\xff")
    change(cache, SUPERBLOCK_SIZE + 100, b"\xff")
    assert "both superblocks" in open_error(cache)


@pytest.mark.parametrize("by", [-1, -BLOCK, 1, BLOCK])
def test_a_file_cut_or_extended(cache: Path, by: int) -> None:
    os.truncate(cache / "pool", size_for(8) + by)
    assert "cut, extended or replaced" in open_error(cache)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"version": 2}, "format version 2"),
        ({"incompat": 4}, "flags 0x4"),
        ({"ro_compat": 1}, "flags 0x1"),
    ],
)
def test_newer_formats(cache: Path, changes: dict[str, Any], words: str) -> None:
    rewrite(cache, lambda superblock: replace(superblock, **changes))
    assert words in open_error(cache)


@pytest.mark.parametrize(
    "changes",
    [
        {"slots": 9},
        {"slots": 0},
        {"block_size": 0},
        {"block_size": 12288},
        {"data_offset": 8192},
        {"header_offset": 0},
        {"header_offset": 8200},
    ],
)
def test_impossible_layouts(cache: Path, changes: dict[str, int]) -> None:
    rewrite(cache, lambda superblock: replace(superblock, geometry=replace(superblock.geometry, **changes)))
    assert "impossible layout" in open_error(cache)


def _own(cache: Path, connection: Any) -> None:
    pool = open_pool(cache, volatile=True)
    connection.send(os.getpid())
    connection.recv()
    pool.close()


def test_a_second_process_is_refused_and_told_by_whom(cache: Path) -> None:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    owner = context.Process(target=_own, args=(cache, there))
    owner.start()
    try:
        assert here.poll(60)
        pid = here.recv()
        assert f"in use by another daemon (process {pid})" in open_error(cache)
        with pytest.raises(UserError, match="in use"):
            create_pool(cache, size_for(8), BLOCK, volatile=True)
        here.send(None)
        owner.join(60)
        assert owner.exitcode == 0
    finally:
        owner.kill()
        owner.join()
    open_pool(cache, volatile=True).close()


def test_closing_unlocks_and_not_before_all_views_are_released(cache: Path) -> None:
    pool = open_pool(cache, volatile=True)
    view = pool.view(0)
    with pytest.raises(BufferError):
        pool.close()
    assert "in use" in open_error(cache)
    view.release()
    pool.close()
    open_pool(cache, volatile=True).close()


def test_a_refused_open_unlocks(cache: Path) -> None:
    rewrite(cache, lambda superblock: replace(superblock, version=superblock.version + 1))
    open_error(cache)
    rewrite(cache, lambda superblock: replace(superblock, version=superblock.version - 1))
    open_pool(cache, volatile=True).close()


# Superblocks


def test_a_life_of_superblocks(cache: Path) -> None:
    with open_pool(cache, volatile=True) as pool:
        assert (pool.incarnation, pool.was_clean, pool.seq_floor, pool.identity) == (1, True, 0, b"")
        pool.bind(b"device 5, inode 2", b"/srv/" + b"x" * 300)
        pool.mark_open()
        pool.mark_persisted(40)
    with open_pool(cache, volatile=True) as pool:
        assert (pool.incarnation, pool.was_clean, pool.persisted_seq) == (2, False, 40)
        assert pool.identity == b"device 5, inode 2"
        assert pool.path_hint == (b"/srv/" + b"x" * 300)[:256]
        pool.mark_open()
        pool.mark_clean(1000)
    with open_pool(cache, volatile=True) as pool:
        assert (pool.incarnation, pool.was_clean, pool.seq_floor) == (3, True, 1000)
        assert pool.notes == []
        for identity in (b"", b"x" * 65):
            with pytest.raises(ValueError, match="64 bytes"):
                pool.bind(identity, b"")


def test_only_the_inactive_superblock_is_written(cache: Path) -> None:
    with open_pool(cache, volatile=True) as pool:
        for seq in range(1, 6):
            before = superblocks(cache)
            active = newest(cache)
            pool.mark_persisted(seq)
            after = superblocks(cache)
            assert after[active] == before[active]
            assert newest(cache) == 1 - active
            found = after[1 - active]
            assert found is not None
            assert found.persisted_seq == seq


@pytest.mark.parametrize("damage", [b"\xff", bytes(SUPERBLOCK_SIZE)])
@pytest.mark.parametrize("newer", [True, False])
def test_one_damaged_superblock_is_repaired_and_reported(cache: Path, damage: bytes, newer: bool) -> None:
    with open_pool(cache, volatile=True) as pool:
        pool.mark_open()
        pool.mark_clean(50)
    victim = newest(cache) if newer else 1 - newest(cache)
    change(cache, victim * SUPERBLOCK_SIZE, damage)
    with open_pool(cache, volatile=True) as pool:
        assert not pool.was_clean, "the damaged copy may have been the one that said otherwise"
        assert pool.incarnation > 2 or newer
        assert len(pool.notes) == 1
        assert f"superblock {'AB'[victim]}" in pool.notes[0]
    with open_pool(cache, volatile=True) as pool:
        assert pool.notes == []
        assert not pool.was_clean


def test_a_failed_superblock_write_poisons_the_pool(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.EIO, "injected")

    with open_pool(cache, volatile=True, persistence=Durability.DISK) as pool:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError, match="injected"):
                pool.mark_open()
        with pytest.raises(OSError, match="earlier sync"):
            pool.sync()


# Slots


@pytest.mark.parametrize("persistence", list(Durability))
def test_slots_survive_reopening_in_every_class(cache: Path, persistence: Durability) -> None:
    one, two, three = os.urandom(BLOCK), os.urandom(2 * BLOCK), os.urandom(BLOCK)
    with open_pool(cache, volatile=True, persistence=persistence) as pool:
        assert pool.durability is persistence
        pool.write(0, one)
        pool.write(1, memoryview(two))
        pool.view(7)[:] = three
        pool.persist(7)
        pool.fence()
        for slot in (0, 1, 2, 7):
            publish(pool, slot, 100 + slot)
        pool.fence()
        pool.set_state(2, SlotState.CLEAN)
        pool.set_state(0, SlotState.FREE)
        pool.fence()
        pool.sync()
        assert pool.checksum_of(7) == 0xABCDEF
        assert bytes(pool.view(1, 2)) == two
    with open_pool(cache, volatile=True, persistence=persistence) as pool:
        found = pool.scan(0, pool.slots)
        assert list(found.state) == [0, 2, 1, 0, 0, 0, 0, 2]
        assert [seq for seq, known in zip(found.seq, found.seq_known, strict=True) if known] == [
            100,
            101,
            102,
            107,
        ]
        assert found.mtime_ns.view(np.int64)[7] == -5
        assert not found.malformed.any()
        assert not found.unreadable.any()
        assert bytes(pool.view(0)) + bytes(pool.view(1, 2)) + bytes(pool.view(7)) == one + two + three


@pytest.mark.parametrize("order", [[3, 1, 4, 5, 6, 0], [1, 2, 3, 4, 5, 6]], ids=["apart", "adjacent"])
def test_many_headers_at_once_are_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, order: list[int]
) -> None:
    slots = array("i", order)
    checksums = np.array([0, 1, 2**64 - 1, 2**63, 7, 0x123456789ABCDEF0], np.uint64)
    headers: list[bytes] = []
    persisted: list[set[int]] = []
    for at_once in (False, True):
        cache = tmp_path / f"{at_once}"
        create_pool(cache, size_for(8), BLOCK, volatile=True)
        change(cache, 16, b"the same for both")  # where the identity of the format is
        with open_pool(tmp_path / "False", volatile=True) as first:
            codec = first._codec
        with open_pool(cache, volatile=True) as pool:
            pool._codec = codec
            lines: set[int] = set()

            def persist(offset: int, length: int, lines: set[int] = lines) -> None:
                lines.update(range(offset // 64, (offset + length + 63) // 64))

            monkeypatch.setattr(pool, "_persist", persist)
            if at_once:
                places = slot_index(slots)
                assert isinstance(places, slice) == (order == sorted(order))
                pool.publish_run(places, SlotState.DIRTY, 2**40 - 2, 2**63 + 1, 2**52, checksums, -5, 17)
                pool.set_states(slot_index(slots[1:4]), SlotState.CLEAN)
                pool.set_states(np.empty(0, np.int32), SlotState.FREE)
            else:
                for index, (slot, checksum) in enumerate(zip(order, checksums.tolist(), strict=True)):
                    length = BLOCK if index < 5 else 17
                    seq, block = 2**40 - 2 + index, 2**52 + index
                    pool.publish(slot, SlotState.DIRTY, seq, 2**63 + 1, block, checksum, -5, length)
                for slot in order[1:4]:
                    pool.set_state(slot, SlotState.CLEAN)
            with pytest.raises(IndexError):
                pool.set_states(np.array([8], np.int32), SlotState.FREE)
            headers.append(bytes(pool._header_bytes))
            persisted.append(lines)
            found = pool.scan(0, 8)
            assert [found.state[slot] for slot in order] == [2, 1, 1, 1, 2, 2]
            assert found.state.sum() == 9
            assert not found.malformed.any()
    assert headers[0] == headers[1]
    assert persisted[0] == persisted[1]


@pytest.mark.parametrize("persistence", list(Durability))
def test_stores_stay_inside_the_pool(cache: Path, persistence: Durability) -> None:
    with open_pool(cache, volatile=True, persistence=persistence) as pool:
        with pytest.raises((IndexError, ValueError)):
            pool.write(pool.slots, bytes(BLOCK))
        with pytest.raises((IndexError, ValueError)):
            publish(pool, pool.slots, 1)


def test_scan_of_a_part(cache: Path) -> None:
    with open_pool(cache, volatile=True) as pool:
        publish(pool, 5, 9)
        found = pool.scan(4, 3)
        assert found.first_slot == 4
        assert list(found.state) == [0, 2, 0]
        assert list(found.block) == [0, 5, 0]


def test_scan_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefsd.media.poolreader._SCAN_CHUNK", 256)
    create_pool(tmp_path, size_for(11), BLOCK, volatile=True)
    with open_pool(tmp_path, volatile=True) as pool:
        for slot in range(11):
            publish(pool, slot, slot + 1)
        assert list(pool.scan(0, 11).seq) == list(range(1, 12))
        assert list(pool.scan(3, 6).seq) == list(range(4, 10))


def test_unreadable_headers_cost_only_their_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slots = 200
    create_pool(tmp_path, size_for(slots), BLOCK, volatile=True)
    with open_pool(tmp_path, volatile=True) as pool:
        for slot in range(slots):
            publish(pool, slot, slot + 1)
        poison = range(2 * SUPERBLOCK_SIZE + 4096, 2 * SUPERBLOCK_SIZE + 8192)  # slots 64 to 127
        preadv = os.preadv

        def poisoned(fd: int, buffers: Any, offset: int) -> int:
            if offset < poison.stop and offset + len(buffers[0]) > poison.start:
                raise OSError(errno.EIO, "poison")
            return preadv(fd, buffers, offset)

        monkeypatch.setattr(os, "preadv", poisoned)
        found = pool.scan(10, slots - 10)
    numbers = np.arange(10, slots)
    bad = (numbers >= 64) & (numbers < 128)
    assert (found.unreadable == bad).all()
    assert (found.state[~bad] == SlotState.DIRTY).all()
    assert (found.seq[~bad] == numbers[~bad] + 1).all()
    assert (found.state[bad] != SlotState.FREE).all()
    assert not found.malformed.any()


def test_a_header_torn_between_words_is_never_live(cache: Path) -> None:
    """Any subset of the eight words of a publication: live only when all are there, FREE without w0."""
    with open_pool(cache, volatile=True) as pool:
        publish(pool, 3, 1)
        pool.set_state(3, SlotState.FREE)
    offset = 2 * SUPERBLOCK_SIZE + 3 * 64
    old = (cache / "pool").read_bytes()[offset : offset + 64]
    with open_pool(cache, volatile=True) as pool:
        pool.publish(3, SlotState.DIRTY, 2**40 + 2, 8, 9, 0x123456789ABCDEF0, 77, 12)
    new = (cache / "pool").read_bytes()[offset : offset + 64]
    words = [(old[at : at + 8], new[at : at + 8]) for at in range(0, 64, 8)]
    for chosen in range(255):
        torn = b"".join(pair[chosen >> index & 1] for index, pair in enumerate(words))
        change(cache, offset, torn)
        with open_pool(cache, volatile=True) as pool:
            found = pool.scan(3, 1)
        if chosen & 1:
            assert found.malformed[0], f"{chosen:b}"
        else:
            assert found.state[0] == SlotState.FREE
            assert not found.malformed[0]


def test_publication_never_clears_the_line_first(cache: Path) -> None:
    """Everything but the eight bytes of w0 stays as it is when only the state changes."""
    with open_pool(cache, volatile=True) as pool:
        publish(pool, 2, 5)
        offset = 2 * SUPERBLOCK_SIZE + 2 * 64
        before = (cache / "pool").read_bytes()
        pool.set_state(2, SlotState.QUARANTINED)
        after = (cache / "pool").read_bytes()
        assert before[:offset] == after[:offset]
        assert before[offset + 8 :] == after[offset + 8 :]
        assert pool.scan(2, 1).state[0] == SlotState.QUARANTINED


# Durability classes


def test_memory_must_be_asked_for(memory_dir: Path) -> None:
    cache = memory_dir / "cache"
    with pytest.raises(UserError, match="tmpfs"):
        create_pool(cache, size_for(2), BLOCK, volatile=False)
    assert not (cache / "pool").exists()
    create_pool(cache, size_for(2), BLOCK, volatile=True)
    with pytest.raises(UserError, match="tmpfs"):
        open_pool(cache)
    with open_pool(cache, volatile=True) as pool:
        assert pool.durability is Durability.RAM
        pool.sync()


@pytest.fixture
def disk_dir() -> Iterator[Path]:
    path = Path(tempfile.mkdtemp(dir="/var/tmp"))
    yield path
    shutil.rmtree(path)


def test_a_disk_syncs_and_never_again_after_an_error(disk_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    create_pool(disk_dir, size_for(2), BLOCK, volatile=False)
    with open_pool(disk_dir) as pool:
        if pool.durability is not Durability.DISK:
            pytest.skip("/var/tmp is not on an ordinary disk")
        synced: list[int] = []
        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", synced.append)
            pool.fence()
            assert not synced
            pool.sync()
            assert len(synced) == 1

        def fail(fd: int) -> None:
            raise OSError(errno.ENOSPC, "injected")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fdatasync", fail)
            with pytest.raises(OSError, match="injected"):
                pool.sync()
        for again in (pool.sync, pool.mark_open, lambda: pool.mark_clean(1), lambda: pool.mark_persisted(1)):
            with pytest.raises(OSError, match="earlier sync"):
                again()


def test_without_libpmem_the_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cachefsd.media.mapping._LIBPMEM", "libpmem-that-is-not-there.so.1")
    with pytest.raises(UserError, match="libpmem1"):
        open_pool(cache, volatile=True, persistence=Durability.PMEM)
    open_pool(cache, volatile=True).close()
