"""Caches with millions of dirty slots or many small files, made in seconds, without writing the data.

Dirty slots are what a kill leaves. Their pool is a sparse file, whose blocks read as zeros, and its headers name files
of a real catalog: a real daemon has made that, and was killed.
"""

from __future__ import annotations

import contextlib
import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import xxhash

from bench.candidates import Served, own, running
from bench.disks import BLOCK, Absent
from cachefsd.media import header
from cachefsd.media.catalog import open_catalog
from cachefsd.media.header import HEADER_SIZE, WORDS_PER_HEADER, HeaderCodec, blank_headers
from cachefsd.media.medium import FileMedium
from cachefsd.media.pool import open_pool
from cachefsd.media.poolfile import POOL
from cachefsd.media.ports import U64, Changes, FileRecord, SlotState, Stamp
from cachefsd.media.superblock import Geometry, SuperblockPair

CHUNK = 1 << 18
"""slots at a time"""
FILES = 64
FIRST_POOL_MIB = 64
RECORDS = 10_000
"""in a transaction"""
MEMORY_PER_SLOT = 128
"""bytes of headers, and of what else is in memory"""


def crashed(served: Served, slots: int) -> list[str]:
    """Make a cache with so many dirty slots for a candidate without a daemon; a command that mounts it.

    ``file-0`` and so on are the files. Nothing is written back.

    :raises Absent: memory is too small.
    """
    usage = os.statvfs(served.memory)
    if usage.f_bavail * usage.f_frsize < slots * MEMORY_PER_SLOT:
        raise Absent("not enough memory for the headers")
    places = {"disk": served.disk.directory, "mnt": served.mountpoint, "memory": served.memory}
    options = "dirty_age=1000000,low_watermark=0.99,high_watermark=1"
    command = [part.format_map(places) for part in own(size_mib=FIRST_POOL_MIB, options=options).command]
    with running(command, served.mountpoint) as daemon:
        for number in range(FILES):
            (served.mountpoint / f"file-{number}").write_bytes(bytes(BLOCK))
        daemon.kill()
        daemon.wait()
    _grow(served.memory / "cache", slots, seed=1)
    return command


def small_files(served: Served, count: int, size_mib: int) -> list[str]:
    """Make a cache with so many clean files of one block for a candidate without a daemon; a command that mounts it.

    The backing has none of these files: nobody asks for them.
    """
    places = {"disk": served.disk.directory, "mnt": served.mountpoint, "memory": served.memory}
    command = [part.format_map(places) for part in own(size_mib=size_mib).command]
    with running(command, served.mountpoint):
        pass
    cache = served.memory / "cache"
    with open_pool(cache, volatile=True) as pool, contextlib.closing(open_catalog(cache, pool.uuid)) as catalog:
        pool.mark_open()
        seq, checksum, now = pool.seq_floor + 1, xxhash.xxh3_64_intdigest(bytes(pool.block_size)), time.time_ns()
        for first in range(1, count + 1, RECORDS):
            file_ids = range(first, min(first + RECORDS, count + 1))
            for file_id in file_ids:
                pool.publish(file_id - 1, SlotState.CLEAN, seq + file_id, file_id, 0, checksum, now, pool.block_size)
            stamp = Stamp(pool.block_size, now, now)
            catalog.transact(
                Changes(
                    put=[
                        FileRecord(
                            file_id,
                            handle=b"handle of file %016d" % file_id,
                            parent_handle=b"handle of directory %012d" % (file_id % 1000),
                            name=b"file-%d" % file_id,
                            path=b"directory-%d/file-%d" % (file_id % 1000, file_id),
                            stamp=stamp,
                        )
                        for file_id in file_ids
                    ],
                    settings={"next_file_id": b"%d" % (count + 1)},
                )
            )
        pool.fence()
        pool.mark_clean(seq + count + 1)
    return command


def _grow(cache: Path, slots: int, seed: int) -> None:
    """Replace the pool of a cache that nobody uses by one in which ``slots`` slots are dirty.

    They are shared among the files that had dirty blocks: each gets a run of blocks of zeros from its beginning on, in
    random slots and written in random order.
    """
    with open_pool(cache, volatile=True) as pool:
        found = pool.scan(0, pool.slots)
        codec = HeaderCodec(pool.uuid, pool.block_size)
        block_size, seed_of_checks = pool.block_size, xxhash.xxh3_64_intdigest(pool.uuid)
    path = cache / POOL
    with contextlib.closing(FileMedium(os.open(path, os.O_RDWR), path)) as medium:
        superblock = SuperblockPair.load(medium).current
    file_ids = np.unique(found.file_id[found.state == SlotState.DIRTY])
    if not len(file_ids) or superblock.clean:
        raise RuntimeError("the daemon of this cache has left nothing dirty, or was not killed")
    size = (block_size + HEADER_SIZE) * (slots + 2) + (4 << 20)
    geometry = Geometry.fit(size, block_size)
    path.unlink()
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    with contextlib.closing(FileMedium(fd, path)) as medium:
        os.ftruncate(fd, size)
        rng = np.random.default_rng(seed)
        versions = rng.permutation(slots)
        seqs = rng.permutation(slots).astype(np.uint64) + np.uint64(superblock.seq_floor + 1)
        per_file = -(-slots // len(file_ids))
        zeros = xxhash.xxh3_64_intdigest(bytes(block_size))
        for first in range(0, slots, CHUNK):
            part = slice(first, min(first + CHUNK, slots))
            words = dirty_headers(
                seed_of_checks,
                slots=np.arange(part.start, part.stop, dtype=np.uint64),
                seqs=seqs[part],
                file_ids=file_ids[versions[part] // per_file],
                blocks=(versions[part] % per_file).astype(np.uint64),
                checksum=zeros,
                length=block_size,
            )
            _require_dirty(codec, words, first)
            os.pwrite(fd, words, geometry.header_offset + first * HEADER_SIZE)
        SuperblockPair.format(medium, replace(superblock, geometry=geometry, clean=False))


def dirty_headers(seed: int, *, slots: U64, seqs: U64, file_ids: U64, blocks: U64, checksum: int, length: int) -> U64:
    """:meth:`HeaderCodec.state_word` and :meth:`HeaderCodec.body` for many slots at once; shape (n, 8)."""
    words = np.zeros((len(slots), WORDS_PER_HEADER), np.uint64)
    words[:, 1], words[:, 2], words[:, 3] = seqs, file_ids, blocks
    words[:, 4], words[:, 5] = checksum, time.time_ns()
    words[:, 6] = slots | np.uint64(length << 32)
    total = np.full(len(slots), seed, np.uint64)
    for column, factor in enumerate(header._BODY_FACTORS, 1):
        total += words[:, column] * np.uint64(factor)
    total ^= total >> np.uint64(32)
    total *= np.uint64(header._FINAL_FACTOR)
    words[:, 7] = total ^ total >> np.uint64(29)

    byte = SlotState.DIRTY * header._STATE_REPEATED
    low = seqs & np.uint64(header._LOW40)
    check = (np.uint64(byte << 40) | low) * np.uint64(header._STATE_FACTOR)
    check += slots * np.uint64(header._SLOT_FACTOR) + np.uint64(seed)
    words[:, 0] = np.uint64(byte << 56) | check >> np.uint64(48) << np.uint64(40) | low
    return words


def _require_dirty(codec: HeaderCodec, words: U64, first: int) -> None:
    out = blank_headers(first, len(words))
    codec.check(words, out, 0)
    if out.malformed.any() or (out.state != SlotState.DIRTY).any():
        raise RuntimeError("the codec does not take these headers for dirty ones")
