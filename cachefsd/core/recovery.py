"""Bringing the state in memory back from the media. It is idempotent, and may itself be interrupted.

The headers say which block of which file is where; the catalog says which file that is, what was cut from
it, and whether its last name was about to go. Nothing on the media is changed before everything has been
found to fit together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..backing.ports import Backing
from ..errors import UserError
from ..media.ports import (
    NUMBERS_END,
    U8,
    U64,
    Bools,
    Catalog,
    CatalogError,
    Changes,
    Durability,
    FileRecord,
    Files,
    Intent,
    Pool,
    SlotState,
)
from ..times import from_word
from .cache import Cache
from .conflicts import load as conflicts_of
from .dormant import Rows
from .engine import Engine
from .files import CachedFile, file_of
from .offload import RunBlocking
from .options import EngineOptions
from .resolver import Resolver
from .slots import CLEAN, DIRTY, FREE, NOBODY, QUARANTINED, SET_ASIDE
from .upkeep import policy_settings

log = logging.getLogger(__name__)
NUMBERS_LEFT = 1 << 48  # years of writing


@dataclass(slots=True)
class Found:
    """All headers of the pool as arrays over its slots, and what becomes of each."""

    state: U8
    seq: U64
    file_id: U64
    block: U64
    length: U64
    mtime: U64
    """words, see ``cachefsd.times``"""
    unusable: Bools
    """malformed or unreadable: set aside, and reported"""
    max_seq: int
    dead: Bools
    """superseded, cut, or ownerless and clean: to become FREE"""
    lost_owner: Bools
    """dirty, of a file that nothing is known of: kept as it is, for export"""
    set_aside: Bools
    """on bad media; among ``lost_owner`` from :func:`_find_owners` on"""
    winners: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """slots that hold the current version of a block, by (file id, block)"""


async def recover(
    pool: Pool,
    catalog: Catalog,
    backing: Backing,
    options: EngineOptions,
    run_blocking: RunBlocking,
    now_ns: Callable[[], int] = time.time_ns,
    epoch: bytes = b"",
) -> Engine:
    """The engine over what the media hold.

    ``epoch`` names the time in which the page cache over the backing keeps what was written: the boot, and the mounts
    of its file system, one of which has to be the same. Empty: nobody knows.

    :raises UserError: when the parts do not fit together.
    """
    began = time.monotonic()
    try:
        files = catalog.table()
        intents: dict[int, list[Intent]] = {}
        for intent in catalog.intents():
            intents.setdefault(intent.file_id, []).append(intent)
        next_file_id = _file_id(catalog.setting("next_file_id") or b"1")
        policy_states = [catalog.setting(name) or b"" for name in policy_settings(pool.slots)]
        replaced = _replaced(files, catalog)
        conflicts = conflicts_of(catalog)
        noted_epoch = catalog.setting("epoch") or b""
        page_cache_kept = _one_epoch(noted_epoch, epoch)
    except CatalogError as error:
        raise UserError(str(error)) from error
    found = await _scan(pool)
    if pool.durability is Durability.DISK:
        _discard_torn(pool, found)
    _kill_cut(found, intents, pool.block_size)
    if replaced:
        gone = np.array(replaced, np.uint64)
        found.dead |= np.isin(found.file_id, gone) & (found.state != FREE)
        kept = ~np.isin(files.file_id, gone)
        files = Files(files.file_id[kept], files.handle_hash[kept], files.attr_seq[kept], files.unlinked[kept])
    _choose(found)
    _find_owners(found, files)

    cache = Cache(pool, catalog, backing, options, run_blocking, now_ns)
    try:
        seqs = [found.max_seq, pool.seq_floor, pool.persisted_seq]
        seqs += [int(files.attr_seq.max(initial=0))]
        seqs += [intent.seq for of_file in intents.values() for intent in of_file]
        cache.blocks.begin_at(max(seqs) + 1)
        last_ids = [int(ids.max(initial=0)) for ids in (files.file_id, found.file_id)]
        cache.records.begin_at(max(next_file_id - 1, *last_ids) + 1, conflicts)
        if max(cache.blocks.next_seq, cache.records.next_file_id) > NUMBERS_END - NUMBERS_LEFT:
            # Going on would end in versions that the next recovery takes for damaged.
            raise UserError("the cache counts more versions or files than there can have been: it is damaged")
        pool.mark_open()  # O8: before the first change
        _free_dead(cache, found)
        await cache.blocks.persist_frees()  # losers first, and durably: only then may a winner become FREE (O11)
        cache.files.forget_ids(replaced)
        records = _build(cache, found, files, intents)
        if pool.was_clean:
            for piece, state in enumerate(policy_states):
                cache.slots.policy.load(piece, state)
        resolver = Resolver(cache, records, page_cache_kept=page_cache_kept, clean=pool.was_clean)
        await resolver.run()
        if noted_epoch != epoch:  # from here on what the records say is true of this one
            await cache.records.transact(lambda: Changes(settings={"epoch": epoch}))
    except BaseException:
        cache.close()
        raise
    stats = cache.stats.recovery
    stats.clean, stats.blocks = pool.was_clean, len(found.winners)
    stats.seconds = time.monotonic() - began
    _report(found)
    engine = Engine(cache, resolver.retry)
    await engine.space.ask()
    return engine


def _one_epoch(one: bytes, other: bytes) -> bool:
    boot, *mounts = one.split() or [b""]
    boot_now, *mounts_now = other.split() or [b""]
    return bool(boot) and boot == boot_now and (mounts == mounts_now or not set(mounts).isdisjoint(mounts_now))


def _file_id(text: bytes) -> int:
    if text.isdigit() and 0 < (number := int(text)) < NUMBERS_END:
        return number
    raise CatalogError("the next file id in the catalog is damaged")


# ---- what the headers say


async def _scan(pool: Pool) -> Found:
    headers = pool.scan(0, pool.slots)
    await trio.lowlevel.checkpoint()
    state, seq, file_id, block = headers.state, headers.seq, headers.file_id, headers.block
    end = np.uint64(NUMBERS_END)
    known = headers.seq_known & (seq < end)
    unusable = headers.malformed | headers.unreadable
    unusable |= (state != FREE) & ((seq >= end) | (file_id >= end) | (block >= end // np.uint64(pool.block_size)))
    state[unusable] = FREE
    file_id[~known | (file_id >= end)] = 0
    return Found(
        state=state,
        seq=seq,
        file_id=file_id,
        block=block,
        length=headers.length,
        mtime=headers.mtime_ns,
        unusable=unusable,
        max_seq=int(seq[known].max(initial=0)),
        dead=np.zeros(pool.slots, np.bool_),
        lost_owner=np.zeros(pool.slots, np.bool_),
        set_aside=(state == QUARANTINED) & (file_id == NOBODY),
    )


def _discard_torn(pool: Pool, found: Found) -> None:
    """Class ``disk``: versions that no commit covers and whose data did not arrive were never promised."""
    unsure = (found.state != FREE) & (found.seq > np.uint64(pool.persisted_seq))
    for slot in np.flatnonzero(unsure).tolist():
        try:
            data = pool.read(slot)
        except OSError:
            continue  # it may have been acknowledged, and is taken for lost when it is first used
        if xxh3_64_intdigest(data) != pool.checksum_of(slot):
            found.dead[slot] = True


def _kill_cut(found: Found, intents: dict[int, list[Intent]], block_size: int) -> None:
    """Versions older than a truncate, beyond its size, are dead."""
    concerned = np.isin(found.file_id, np.array(list(intents), np.uint64)) & (found.state != FREE)
    for slot in np.flatnonzero(concerned).tolist():
        start, seq = int(found.block[slot]) * block_size, int(found.seq[slot])
        if any(seq < intent.seq and start >= intent.size for intent in intents[int(found.file_id[slot])]):
            found.dead[slot] = True


def _replaced(files: Files, catalog: Catalog) -> list[int]:
    """The ids of files whose handle has a newer id: the newest is the one, and versions of the others are dead.

    A handle gets a second id only after nothing is owed to the first one: what is there of that has been freed, and a
    crash has brought it back. Class ``disk`` of earlier releases left that behind.
    """
    newest: dict[bytes, int] = {}
    replaced: list[int] = []
    for file_id in np.sort(files.file_id[_several(files.handle_hash)]).tolist():
        handle = catalog.record(file_id).handle
        if handle in newest:
            replaced.append(newest[handle])
        newest[handle] = file_id
    return replaced


def _order(file_id: U64, block: U64, seq: U64) -> tuple[npt.NDArray[np.int64], Bools]:
    """Indices by (file id, block, seq), and which of them are followed by one of the same block.

    What lexsort says, in a tenth of its time where file id, block and index fit into one word, and in a third where the
    first two do.
    """
    count = len(block)
    span = int(block.max(initial=0)) + 1
    keys = (int(file_id.max(initial=0)) + 1) * span
    if keys >= 1 << 64:
        order = np.lexsort((seq, block, file_id))
        same = (file_id[order[1:]] == file_id[order[:-1]]) & (block[order[1:]] == block[order[:-1]])
        return order, np.append(same, np.zeros(min(count, 1), np.bool_))
    key = file_id * np.uint64(span) + block
    bits = count.bit_length()
    if keys << bits < 1 << 64:
        packed = key << np.uint64(bits)
        packed |= np.arange(count, dtype=np.uint64)
        packed.sort()
        order = (packed & np.uint64((1 << bits) - 1)).view(np.int64)
        packed >>= np.uint64(bits)
        ordered = packed
    else:
        order = np.argsort(key)
        ordered = key[order]
    same = np.zeros(count, np.bool_)
    np.equal(ordered[1:], ordered[:-1], out=same[:-1])
    if same.any():  # few blocks have several versions
        several = same.copy()
        several[1:] |= same[:-1]
        part = order[several]
        order[several] = part[np.lexsort((seq[part], key[part]))]
    return order, same


def _choose(found: Found) -> None:
    """Per block the highest seq wins whatever its state; the others are dead."""
    live = np.flatnonzero((found.state != FREE) & ~found.dead)
    order, same = _order(found.file_id[live], found.block[live], found.seq[live])
    order = live[order]
    superseded = np.flatnonzero(same)
    older, newer = order[superseded], order[superseded + 1]
    twins = older[found.seq[older] == found.seq[newer]]
    if len(twins):
        slot = int(twins[0])
        raise UserError(
            f"the pool names one version of block {int(found.block[slot])} of file "
            f"{int(found.file_id[slot])} twice: it is damaged, and was left as it is"
        )
    found.dead[older] = True
    found.winners = order[~same]


def _find_owners(found: Found, files: Files) -> None:
    """Blocks of files without a record: clean ones are dropped, dirty ones kept aside."""
    owners, _, counts = _files_of(found)
    unknown = ~np.isin(owners, files.file_id)
    if not unknown.any():
        return
    orphaned = found.winners[np.repeat(unknown, counts)]
    clean = found.state[orphaned] == CLEAN
    found.dead[orphaned[clean]] = True
    found.lost_owner[orphaned[~clean]] = True
    found.winners = found.winners[~(found.dead | found.lost_owner)[found.winners]]


def _files_of(found: Found) -> tuple[U64, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The files that have winners: their ids, ascending, where theirs begin, and how many there are."""
    owners = found.file_id[found.winners]
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]][: len(owners)])
    return owners[starts], starts, np.diff(starts, append=len(owners))


def _report(found: Found) -> None:
    damaged, aside = int(found.unusable.sum()), int(found.set_aside.sum())
    ownerless = int(found.lost_owner.sum()) - aside
    if damaged:
        log.error("%d damaged headers: their slots are set aside, dirty data in them is lost", damaged)
    if aside:
        log.warning("%d slots of the pool are on bad media and not used", aside)
    if ownerless:
        log.error("%d dirty blocks belong to files that the catalog does not know: kept aside", ownerless)


# ---- into memory


def _free_dead(cache: Cache, found: Found) -> None:
    """Store FREE in the headers of the dead, oldest first, and load the slots."""
    dead = np.flatnonzero(found.dead)
    retired = dead[np.argsort(found.seq[dead])].tolist()
    for slot in retired:
        cache.pool.set_state(slot, SlotState.FREE)
    state = np.where(found.dead, FREE, found.state)
    state = np.where(found.unusable | found.lost_owner, QUARANTINED, state)
    owner = np.where(found.unusable, NOBODY, found.file_id).astype(np.uint64)
    owner[found.set_aside] = SET_ASIDE
    cache.slots.load(state.astype(np.uint8), owner, found.block, retired)


def _build(cache: Cache, found: Found, files: Files, intents: dict[int, list[Intent]]) -> dict[int, FileRecord]:
    """Files with clean blocks only become dormant; the records of the others, to which something may be owed."""
    ids, starts, counts = _files_of(found)
    rows = np.searchsorted(files.file_id, ids)
    hashes = files.handle_hash[rows]
    awake = files.unlinked[rows] | np.isin(ids, np.array(list(intents), np.uint64)) | _several(hashes)
    if len(ids):
        awake |= np.logical_or.reduceat(found.state[found.winners] != CLEAN, starts)
    asleep = ~awake
    slots = found.winners[np.repeat(asleep, counts)].astype(np.int32)
    unsynced = np.zeros(int(asleep.sum()), np.bool_)
    cache.files.dormant.add(Rows(ids[asleep], hashes[asleep], counts[asleep].astype(np.int32), slots, unsynced))

    records: dict[int, FileRecord] = {}

    def wake(file_id: int) -> CachedFile:
        try:
            records[file_id] = record = cache.catalog.record(file_id)
        except CatalogError as error:
            raise UserError(str(error)) from error
        return _file_of(cache, record, intents.get(file_id, []))

    for file_id, start, count in zip(*(each[awake].tolist() for each in (ids, starts, counts)), strict=True):
        _fill(cache, wake(file_id), found, found.winners[start : start + count], records[file_id])
    unused = np.ones(len(files.file_id), np.bool_)
    unused[rows] = False
    for file_id in files.file_id[unused].tolist():
        if file_id in intents:
            wake(file_id)
        else:
            cache.files.forget_ids([file_id])
    return records


def _several(hashes: U64) -> Bools:
    """Which of the hashes are there more than once."""
    ordered = np.sort(hashes)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    result: Bools = np.isin(hashes, again) if len(again) else np.zeros(len(hashes), np.bool_)
    return result


def _file_of(cache: Cache, record: FileRecord, intents: list[Intent]) -> CachedFile:
    file = file_of(record, cache.backing.file(record.handle))
    if intents:
        file.mtime_ns = max(intents, key=lambda intent: intent.seq).mtime_ns
    file.intents = intents
    cache.files.add(file)
    if intents:
        cache.dirty.enqueue(file)
    return file


def _fill(cache: Cache, file: CachedFile, found: Found, slots: npt.NDArray[np.int64], record: FileRecord) -> None:
    """Blocks, visible size and mtime of a file, from its winning ``slots`` in block order."""
    file.table.put_many(found.block[slots], slots.astype(np.int32))
    file.dirty = int(np.count_nonzero(found.state[slots] == DIRTY))
    newest = slots[np.argmax(found.seq[slots])]
    last = max([record.attr_seq, *(intent.seq for intent in file.intents)])
    if found.seq[newest] > np.uint64(last):
        file.mtime_ns = from_word(int(found.mtime[newest]))
    owed = slots[found.state[slots] != CLEAN]  # what is lost counts too: that it is missing must show
    if len(owed):
        end = owed[-1]
        file.size = (int(found.block[end]) << cache.shift) + int(found.length[end])
    if file.dirty:
        cache.dirty.enqueue(file)
