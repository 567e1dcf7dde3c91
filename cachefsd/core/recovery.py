"""Bringing the state in memory back from the media. It is idempotent, and may itself be interrupted.

The headers say which block of which file is where; the catalog says which file that is, what was cut from
it, and whether its last name was about to go. ``core/analysis.py`` decides which of it counts. Nothing on the media
is changed before everything has been found to fit together.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..backing.ports import Backing
from ..errors import UserError
from ..media.ports import (
    NUMBERS_END,
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
from .analysis import (
    Found,
    choose,
    files_of,
    find_owners,
    found_in,
    kill_cut,
    kill_replaced,
    not_covered,
    replaced_ids,
    several_of,
)
from .cache import Cache
from .conflicts import load as conflicts_of
from .dormant import Rows
from .engine import Engine
from .files import CachedFile, file_of
from .offload import RunBlocking
from .options import EngineOptions
from .policy import settings_of
from .resolver import Resolver
from .slots import CLEAN, DIRTY, FREE, NOBODY, QUARANTINED, SET_ASIDE

log = logging.getLogger(__name__)
NUMBERS_LEFT = 1 << 48  # years of writing


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
        policy_states = [catalog.setting(name) or b"" for name in settings_of(pool.slots)]
        replaced = replaced_ids(files, lambda file_id: catalog.record(file_id).handle)
        conflicts = conflicts_of(catalog)
        noted_epoch = catalog.setting("epoch") or b""
        page_cache_kept = _one_epoch(noted_epoch, epoch)
    except CatalogError as error:
        raise UserError(str(error)) from error
    found = await _scan(pool)
    if pool.durability is Durability.DISK:
        _discard_torn(pool, found)
    kill_cut(found, intents, pool.block_size)
    if replaced:
        files = kill_replaced(found, files, replaced)
    choose(found)
    find_owners(found, files)

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


# ---- what the media hold


async def _scan(pool: Pool) -> Found:
    headers = pool.scan(0, pool.slots)
    await trio.lowlevel.checkpoint()
    return found_in(headers, pool.block_size)


def _discard_torn(pool: Pool, found: Found) -> None:
    """Class ``disk``: versions that no sync of the pool covers and whose data did not arrive were never promised."""
    for slot in not_covered(found, pool.persisted_seq).tolist():
        try:
            data = pool.read(slot)
        except OSError:
            continue  # it may have been acknowledged, and is taken for lost when it is first used
        if xxh3_64_intdigest(data) != pool.checksum_of(slot):
            found.dead[slot] = True


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
    ids, starts, counts = files_of(found)
    rows = np.searchsorted(files.file_id, ids)
    hashes = files.handle_hash[rows]
    awake = files.unlinked[rows] | np.isin(ids, np.array(list(intents), np.uint64)) | several_of(hashes)
    if len(ids):
        awake |= np.logical_or.reduceat(found.state[found.winners] != CLEAN, starts)
    asleep = ~awake
    slots = found.winners[np.repeat(asleep, counts)].astype(np.int32)
    unsynced = np.zeros(int(asleep.sum()), np.bool_)
    cache.files.add_dormant(Rows(ids[asleep], hashes[asleep], counts[asleep].astype(np.int32), slots, unsynced))

    records: dict[int, FileRecord] = {}

    def wake(file_id: int) -> CachedFile:
        try:
            records[file_id] = record = cache.catalog.record(file_id)
        except CatalogError as error:
            raise UserError(str(error)) from error
        return _file_of(cache, record, intents.get(file_id, []))

    for file_id, start, count in zip(*(each[awake].tolist() for each in (ids, starts, counts)), strict=True):
        _load(cache, wake(file_id), found, found.winners[start : start + count], records[file_id])
    unused = np.ones(len(files.file_id), np.bool_)
    unused[rows] = False
    for file_id in files.file_id[unused].tolist():
        if file_id in intents:
            wake(file_id)
        else:
            cache.files.forget_ids([file_id])
    return records


def _file_of(cache: Cache, record: FileRecord, intents: list[Intent]) -> CachedFile:
    file = file_of(record, cache.backing.file(record.handle))
    if intents:
        file.mtime_ns = max(intents, key=lambda intent: intent.seq).mtime_ns
    file.intents = intents
    cache.files.add(file)
    if intents:
        cache.dirty.enqueue(file)
    return file


def _load(cache: Cache, file: CachedFile, found: Found, slots: npt.NDArray[np.int64], record: FileRecord) -> None:
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
