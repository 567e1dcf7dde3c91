"""Direct I/O by Linux AIO: from and to mapped memory, at the end of files, on a disk that hangs."""

from __future__ import annotations

import errno
import mmap
import os
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import trio
import trio.testing
from support_fs import (
    LARGEST,
    THROTTLE,
    area,
    drop_caches,
    ext4,
    ext4_area,
    file_system,
    frozen,
    largest_file,
    slow_reads,
    ticks,
)

from cachefsd.backing import aio as aio_module
from cachefsd.backing.aio import Aio
from cachefsd.backing.ports import Run
from cachefsd.backing.workers import Workers

__all__ = ["area", "ext4", "ext4_area", "file_system"]

BLOCK = 4096


@pytest.fixture
async def aio() -> AsyncIterator[Aio]:
    async with Workers(4, "data") as workers, Aio(workers, depth=8) as result:
        yield result


@contextmanager
def opened(path: Path, flags: int) -> Iterator[int]:
    fd = os.open(path, flags | os.O_DIRECT, 0o600)
    try:
        yield fd
    finally:
        os.close(fd)


@contextmanager
def mapped(path: Path, blocks: int) -> Iterator[memoryview]:
    with open(path, "w+b") as file:
        file.truncate(blocks * BLOCK)
        with mmap.mmap(file.fileno(), blocks * BLOCK) as memory, memoryview(memory) as view:
            yield view
    path.unlink()


def run(offset: int, places: Sequence[int] = (0,)) -> Run:
    return Run(offset, np.array(places))


async def written(aio: Aio, fd: int, offset: int, memory: memoryview, places: Sequence[int] = (0,)) -> int:
    """The bytes that one request has written, or minus its errno."""
    (count,) = await aio.write_runs(fd, memory, BLOCK, [run(offset, places)])
    return count


def pattern(block: int) -> bytes:
    return block.to_bytes(4, "little") * (BLOCK // 4)


@pytest.mark.parametrize("where", ["/dev/shm", ""])
async def test_gather_write_and_scatter_read_with_mapped_memory(aio: Aio, area: Path, where: str) -> None:
    pool = Path(where or area.parent) / f"cachefsd-test-{os.getpid()}"
    order = [7, 3, 4, 5, 0, 6]
    with mapped(pool, 16) as memory, opened(area / "f", os.O_CREAT | os.O_RDWR) as fd:
        for block in range(8):
            memory[block * BLOCK : (block + 1) * BLOCK] = pattern(block)
        assert await written(aio, fd, BLOCK, memory, order) == len(order) * BLOCK
        expected = b"".join(map(pattern, order))
        assert (area / "f").read_bytes() == bytes(BLOCK) + expected
        targets = [memory[(15 - i) * BLOCK : (16 - i) * BLOCK] for i in range(len(order))]
        assert await aio.readv(fd, BLOCK, targets) == len(order) * BLOCK
        assert b"".join(targets) == expected
        for view in targets:
            view.release()


async def test_more_pieces_than_one_request_takes(aio: Aio, ext4_area: Path, tmp_path: Path) -> None:
    with mapped(tmp_path / "pool", 2100) as memory, opened(ext4_area / "f", os.O_CREAT | os.O_RDWR) as fd:
        assert await written(aio, fd, 0, memory, range(0, 2100, 2)) == 1024 * BLOCK
        assert await written(aio, fd, 0, memory, range(1050)) == 1050 * BLOCK
        every_other = [memory[i * BLOCK : (i + 1) * BLOCK] for i in range(0, 2100, 2)]
        assert await aio.readv(fd, 0, every_other) == 1024 * BLOCK
        adjacent = [memory[i * BLOCK : (i + 1) * BLOCK] for i in range(1050)]
        assert await aio.readv(fd, 0, adjacent) == 1050 * BLOCK
        for view in [*every_other, *adjacent]:
            view.release()


async def test_a_read_is_short_at_the_end(aio: Aio, area: Path, tmp_path: Path) -> None:
    (area / "f").write_bytes(b"x" * (BLOCK + 100))
    os.sync()
    with mapped(tmp_path / "pool", 4) as memory, opened(area / "f", os.O_RDONLY) as fd:
        assert await aio.readv(fd, 0, [memory]) == BLOCK + 100
        assert bytes(memory[: BLOCK + 101]) == b"x" * (BLOCK + 100) + b"\0"
        assert await aio.readv(fd, 2 * BLOCK, [memory]) == 0


async def test_errors_are_raised(aio: Aio, ext4_area: Path, tmp_path: Path) -> None:
    (ext4_area / "f").write_bytes(bytes(BLOCK))
    with mapped(tmp_path / "pool", 1) as memory, opened(ext4_area / "f", os.O_RDONLY) as fd:
        assert await written(aio, fd, 0, memory) == -errno.EBADF
        with pytest.raises(OSError, match="Invalid argument"), memory[1:] as misaligned:
            await aio.readv(fd, 0, [misaligned])


async def test_more_requests_than_the_context_holds(aio: Aio, area: Path, tmp_path: Path) -> None:
    (area / "f").write_bytes(b"".join(map(pattern, range(200))))
    drop_caches()
    with mapped(tmp_path / "pool", 200) as memory, opened(area / "f", os.O_RDONLY) as fd:

        async def one(block: int) -> None:
            with memory[block * BLOCK : (block + 1) * BLOCK] as view:
                assert await aio.readv(fd, block * BLOCK, [view]) == BLOCK

        async with trio.open_nursery() as nursery:
            for block in range(200):
                nursery.start_soon(one, block)
        assert bytes(memory) == b"".join(map(pattern, range(200)))
    assert aio.inline == 200


async def test_a_batch_is_one_job_and_each_run_has_its_own_answer(
    aio: Aio, ext4_area: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs: list[str] = []
    plain = Workers.run

    async def counted(workers: Workers, fn: Callable[..., object], *args: object) -> object:
        jobs.append(fn.__name__)
        return await plain(workers, fn, *args)

    monkeypatch.setattr(Workers, "run", counted)
    with mapped(tmp_path / "pool", 8) as memory, opened(ext4_area / "f", os.O_CREAT | os.O_RDWR) as fd:
        for block in range(8):
            memory[block * BLOCK : (block + 1) * BLOCK] = pattern(block)
        # The kernel takes what is before a request that it refuses, and the rest must be asked for again.
        runs = [run(0, [0, 1]), run(-BLOCK, [2]), run(9 * BLOCK, [3])]
        runs += [run(-BLOCK, [4]), run(4 * BLOCK, [6, 5]), run(-BLOCK, [7])]
        refused = -errno.EINVAL
        expected = [2 * BLOCK, refused, BLOCK, refused, 2 * BLOCK, refused]
        assert await aio.write_runs(fd, memory, BLOCK, runs) == expected
        assert len(jobs) == 1
        content = bytearray(10 * BLOCK)
        for place, block in ((0, 0), (1, 1), (4, 6), (5, 5), (9, 3)):
            content[place * BLOCK : (place + 1) * BLOCK] = pattern(block)
        assert (ext4_area / "f").read_bytes() == content
        assert await aio.write_runs(fd, memory, BLOCK, [run(-BLOCK)] * 3) == [refused] * 3
        assert await aio.write_runs(fd, memory, BLOCK, []) == []
    assert aio.deferred == 9


async def test_batches_larger_than_the_context_share_it(aio: Aio, ext4_area: Path, tmp_path: Path) -> None:
    with mapped(tmp_path / "pool", 90) as memory, opened(ext4_area / "f", os.O_CREAT | os.O_RDWR) as fd:
        memory[:] = b"".join(map(pattern, range(90)))
        counts: list[int] = []

        async def write(first: int) -> None:
            runs = [run(block * BLOCK, [block]) for block in range(first, first + 30)]
            counts.extend(await aio.write_runs(fd, memory, BLOCK, runs))

        async with trio.open_nursery() as nursery:
            for first in (0, 30, 60):
                nursery.start_soon(write, first)
        assert counts == [BLOCK] * 90
        assert (ext4_area / "f").read_bytes() == bytes(memory)


async def test_a_run_beyond_the_largest_size_is_short_or_fails_and_the_others_do_not(
    aio: Aio, ext4_area: Path, tmp_path: Path
) -> None:
    with mapped(tmp_path / "pool", 2) as memory, opened(ext4_area / "f", os.O_CREAT | os.O_RDWR) as fd:
        memory[:] = pattern(1) + pattern(2)
        runs = [run(offset, [0, 1]) for offset in (0, LARGEST - BLOCK, LARGEST, 4 * BLOCK)]
        with largest_file(LARGEST):
            counts = await aio.write_runs(fd, memory, BLOCK, runs)
        assert counts == [2 * BLOCK, BLOCK, -errno.EFBIG, 2 * BLOCK]
        with open(ext4_area / "f", "rb") as file:
            content = file.read(6 * BLOCK)
        assert content == bytes(memory) + bytes(2 * BLOCK) + bytes(memory)


async def test_a_disk_that_hangs_does_not_block_the_loop(aio: Aio, ext4: Path, ext4_area: Path, tmp_path: Path) -> None:
    done: list[int] = []
    with mapped(tmp_path / "pool", 1) as memory, opened(ext4_area / "f", os.O_CREAT | os.O_RDWR) as fd:
        memory[:] = pattern(9)

        async def write(offset: int) -> None:
            done.append(await written(aio, fd, offset, memory))

        async with trio.open_nursery() as nursery:
            with frozen(ext4):
                nursery.start_soon(write, 0)
                nursery.start_soon(write, BLOCK)
                await ticks(50)
                assert done == []
        assert done == [BLOCK, BLOCK]
        assert (ext4_area / "f").read_bytes() == pattern(9) * 2


@pytest.mark.skipif(not THROTTLE.exists(), reason="needs the blkio controller of cgroup version 1")
async def test_reads_of_a_slow_disk_do_not_block_the_loop(
    aio: Aio, ext4: Path, ext4_area: Path, tmp_path: Path
) -> None:
    (ext4_area / "f").write_bytes(b"".join(map(pattern, range(32))))
    drop_caches()
    done: list[int] = []
    with mapped(tmp_path / "pool", 32) as memory, opened(ext4_area / "f", os.O_RDONLY) as fd:

        async def read(block: int) -> None:
            with memory[block * BLOCK : (block + 1) * BLOCK] as view:
                assert await aio.readv(fd, block * BLOCK, [view]) == BLOCK
            done.append(block)

        async with trio.open_nursery() as nursery:
            with slow_reads(ext4):
                for block in range(32):
                    nursery.start_soon(read, block)
                await ticks(50)
                assert len(done) < 32
        assert bytes(memory) == b"".join(map(pattern, range(32)))


@pytest.mark.parametrize("count", [1, 20], ids=["one", "a batch"])
async def test_a_cancellation_waits_for_the_kernel(
    aio: Aio, ext4: Path, ext4_area: Path, tmp_path: Path, count: int
) -> None:
    done: list[int] = []
    with mapped(tmp_path / "pool", 1) as memory, opened(ext4_area / "f", os.O_CREAT | os.O_RDWR) as fd:
        memory[:] = pattern(9)

        async def write() -> None:
            done.extend(await aio.write_runs(fd, memory, BLOCK, [run(block * BLOCK) for block in range(count)]))

        async with trio.open_nursery() as nursery:
            with frozen(ext4):
                nursery.start_soon(write)
                await ticks(5)
                nursery.cancel_scope.cancel()
                with trio.CancelScope(shield=True):
                    await ticks(5)
                assert done == []
        assert done == [BLOCK] * count
        assert (ext4_area / "f").read_bytes() == pattern(9) * count


async def test_reads_that_come_together_are_submitted_together(aio: Aio, ext4_area: Path, tmp_path: Path) -> None:
    path = ext4_area / "file"
    path.write_bytes(b"".join(bytes([number]) * BLOCK for number in range(8)))
    calls: list[int] = []
    submit = aio._submit

    def counted(requests: object, first: int, count: int) -> list[tuple[int, int]]:
        calls.append(count)
        return submit(requests, first, count)

    aio._submit = counted  # type: ignore[method-assign]
    failures: list[int | None] = []

    async def one(fd: int, block: int) -> None:
        try:
            await aio.readv(fd, block * BLOCK, [memory[block * BLOCK : (block + 1) * BLOCK]])
        except OSError as error:
            failures.append(error.errno)

    with opened(path, os.O_RDONLY) as fd, opened(path, os.O_WRONLY) as wrong, mapped(tmp_path / "memory", 8) as memory:
        aio.gathers = lambda: True
        async with trio.open_nursery() as nursery:
            for block in (0, 1, 2):
                nursery.start_soon(one, fd, block)
            nursery.start_soon(one, wrong, 3)  # refused in the middle of the others
            for block in (4, 5):
                nursery.start_soon(one, fd, block)
            await trio.testing.wait_all_tasks_blocked()
            assert not calls
            aio.submit()
            assert calls == [6]
        aio.gathers = lambda: False
        await one(fd, 7)
        assert calls[-1] == 1
        assert [memory[block * BLOCK] for block in range(8)] == [0, 1, 2, 0, 4, 5, 0, 7]
    assert failures == [errno.EBADF]


async def test_no_more_than_so_many_wait_for_others(ext4_area: Path, tmp_path: Path) -> None:
    blocks = 2 * aio_module._MOST_GATHERED
    path = ext4_area / "file"
    path.write_bytes(bytes(blocks * BLOCK))
    async with Workers(1, "data") as workers, Aio(workers, depth=blocks) as aio:
        aio.gathers = lambda: True
        with opened(path, os.O_RDONLY) as fd, mapped(tmp_path / "memory", blocks) as memory:
            async with trio.open_nursery() as nursery:
                for start in range(0, blocks * BLOCK, BLOCK):
                    nursery.start_soon(aio.readv, fd, start, [memory[start : start + BLOCK]])
