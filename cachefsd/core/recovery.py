"""Bringing the state in memory back from the media. It is idempotent, and may itself be interrupted.

The headers say which block of which file is where; the catalog says which file that is, what was cut from
it, and whether its last name was about to go. Nothing on the media is changed before everything has been
found to fit together.
"""

from __future__ import annotations

import errno
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import trio
from xxhash import xxh3_64_intdigest

from ..backing.ports import Backing, BackingStat, LostFile
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
from .cache import Cache, RunBlocking
from .dormant import Rows, file_of
from .engine import Engine
from .files import CachedFile
from .options import EngineOptions
from .slots import CLEAN, DIRTY, FREE, NOBODY, QUARANTINED, SET_ASIDE
from .upkeep import Upkeep, policy_settings

log = logging.getLogger(__name__)
NUMBERS_LEFT = 1 << 48  # years of writing
FILES_IN_PARALLEL = 16


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
) -> Engine:
    """The engine over what the media hold.

    :raises UserError: when the parts do not fit together, or the backing refuses what must be done.
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
        seqs = [found.max_seq, pool.seq_floor, pool.committed_seq]
        seqs += [int(files.attr_seq.max(initial=0))]
        seqs += [intent.seq for of_file in intents.values() for intent in of_file]
        cache.next_seq = max(seqs) + 1
        last_ids = [int(ids.max(initial=0)) for ids in (files.file_id, found.file_id)]
        cache.next_file_id = max(next_file_id - 1, *last_ids) + 1
        if max(cache.next_seq, cache.next_file_id) > NUMBERS_END - NUMBERS_LEFT:
            # Going on would end in versions that the next recovery takes for damaged.
            raise UserError("the cache counts more versions or files than there can have been: it is damaged")
        pool.mark_open()  # O8: before the first change
        _free_dead(cache, found)
        await cache.settle()  # losers first, and durably: only then may a winner become FREE (O11)
        cache.forgotten += replaced
        records = _build(cache, found, files, intents)
        if pool.was_clean:
            for piece, state in enumerate(policy_states):
                cache.slots.policy.load(piece, state)
        await _Resolver(cache, records).run()
    except BaseException:
        cache.close()
        raise
    stats = cache.stats.recovery
    stats.clean, stats.blocks = pool.was_clean, len(found.winners)
    stats.seconds = time.monotonic() - began
    _report(found)
    engine = Engine(cache)
    await engine.space.ask()
    return engine


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
    unsure = (found.state != FREE) & (found.seq > np.uint64(pool.committed_seq))
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
    cache.dormant.add(Rows(ids[asleep], hashes[asleep], counts[asleep].astype(np.int32), slots, unsynced))

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
            cache.forgotten.append(file_id)
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
    cache.files[file.file_id] = file
    cache.by_handle[file.handle] = file
    if intents:
        cache.mark_due(file)
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
        cache.mark_due(file)


# ---- files and the backing


class _Resolver:
    """Finds the files that something is owed to; the others are looked at when they are first used."""

    def __init__(self, cache: Cache, records: dict[int, FileRecord]) -> None:
        self._cache = cache
        self._records = records
        self._upkeep = Upkeep(cache)
        self._errors: list[str] = []

    async def run(self) -> None:
        """Resolve all files with dirty or lost blocks, intents or a tombstone.

        :raises UserError: when the backing fails for one of them.
        """
        cache = self._cache
        lost = {cache.slots.owner[slot] for slot in cache.slots.quarantined()}
        files = cache.files.values()
        wanted = [f for f in files if f.dirty or f.intents or f.tombstone or f.file_id in lost]
        limit = trio.CapacityLimiter(FILES_IN_PARALLEL)

        async def one(file: CachedFile) -> None:
            async with limit:
                try:
                    await self._resolve(file)
                except OSError as error:
                    self._errors.append(f"{cache.name_of(file)}: {error.strerror or error}")

        async with trio.open_nursery() as nursery:
            for file in wanted:
                nursery.start_soon(one, file)
        if self._errors:
            raise UserError(
                f"the backing fails for {len(self._errors)} files with data in the cache, which keeps it; "
                f"the first: {self._errors[0]}"
            )

    async def _resolve(self, file: CachedFile) -> None:
        cache = self._cache
        stat = await self._look(file)
        if file.tombstone and (stat is None or stat.nlink == 0):
            self._drop(file)
            return
        if stat is None:
            stat = await self._recreate(file)
        if file.tombstone:  # the unlink never happened: nobody was told that it had
            file.nlink_gone = False
            await cache.record(file)
        if file.intents:
            stat = await self._redo(file)
        self._upkeep.settle_recovered(file, stat)
        cache.rest(file)

    async def _look(self, file: CachedFile) -> BackingStat | None:
        """The backing file, opened; None when it is no more."""
        try:
            await file.backing.open(write=bool(file.intents))
            return await file.backing.stat()
        except OSError as error:
            if error.errno not in (errno.ESTALE, errno.ENOENT):
                raise
            return None

    def _drop(self, file: CachedFile) -> None:
        """The last name is gone, as its user was told: so is the data."""
        cache = self._cache
        cache.remove_all(file)
        file.intents.clear()
        cache.not_due(file)
        cache.rest(file)

    async def _recreate(self, file: CachedFile) -> BackingStat:
        """The backing has lost the file, but nobody unlinked it: create it again for its data (H40)."""
        cache = self._cache
        record = self._records[file.file_id]
        log.warning("%s is not in the backing any more: created again", cache.name_of(file))
        # Clean blocks are the only copy now, and what says how long the file is. They become dirty durably: with the
        # new record a clean one would be dropped.
        for blocks, slots in file.table.walk():
            for slot in slots.tolist():
                if cache.slots.state[slot] == CLEAN:
                    cache.slots.change(slot, SlotState.DIRTY)
                    file.dirty += 1
            length = int(cache.pool.scan(int(slots[-1]), 1).length[0])
            file.size = max(file.size, (int(blocks[-1]) << cache.shift) + length)
        await cache.commit()

        async def note(handle: bytes) -> None:
            if cache.by_handle.get(file.handle) is file:
                del cache.by_handle[file.handle]
            file.backing.close()
            file.handle, file.backing = handle, cache.backing.file(handle)
            file.stamp, file.unnamed_since = None, cache.syncs_begun
            cache.by_handle[handle] = file
            await cache.commit_catalog(lambda: Changes(put=[cache.record_of(file)]))

        fallback = b"file-%d" % file.file_id
        name = record.name or fallback
        lost = LostFile(record.parent_handle, name, fallback, record.mode, record.uid, record.gid)
        await cache.backing.recreate(lost, note)
        await file.backing.open(write=True)
        return await file.backing.stat()

    async def _redo(self, file: CachedFile) -> BackingStat:
        """Truncate the backing file as it was asked for, and zero what a truncate has cut from a block."""
        cache = self._cache
        for block in {intent.size >> cache.shift for intent in file.intents if intent.size & cache.mask}:
            self._zero_tail(file, block)
        for intent in file.intents:
            await file.backing.truncate(intent.size)
        await file.backing.set_mtime(file.mtime_ns)
        await file.backing.sync()
        if file.unnamed_since >= cache.syncs_done:  # a file that is lost with its name is as long as its last block
            await cache.sync_all()
        await cache.settle()
        last = file.intents[-1]
        file.attr_seq = last.seq  # from now on the record says the mtime, where the intent did
        drop = [(file.file_id, last.seq)]
        await cache.commit_catalog(lambda: Changes(put=[cache.record_of(file)], drop_intents=drop))
        file.intents.clear()
        cache.not_due(file)
        return await file.backing.stat()

    def _zero_tail(self, file: CachedFile, block: int) -> None:
        """If the version of ``block`` is from before a cut within it, publish a new one that is cut."""
        cache, size = self._cache, self._cache.block_size
        slot = file.table.get(block)
        if slot < 0:
            return
        header = cache.pool.scan(slot, 1)
        seq, start = int(header.seq[0]), block * size
        rest = min((intent.size for intent in file.intents if intent.seq > seq), default=start + size) - start
        if int(header.length[0]) <= rest:
            return
        if cache.slots.state[slot] == CLEAN:
            cache.remove(file, block, slot)
            return
        while (taken := cache.slots.take(1)) is None and cache.slots.searching:
            pass
        if taken is None:
            raise OSError(errno.ENOSPC, "no free slot to finish a truncate with")
        if _verified(cache, file, slot):
            image = bytearray(size)
            image[:rest] = cache.data[slot * size : slot * size + rest]
            cache.commit_blocks(file, block, [image], taken, start + rest, file.mtime_ns)
        else:
            cache.still_lost(file, block, taken[0], start + rest, file.mtime_ns)
        if file.size <= start + size:  # it was the last block that the cache has the only copy of
            file.size = start + rest


def _verified(cache: Cache, file: CachedFile, slot: int) -> bool:
    try:
        return cache.verify(file, cache.slots.block[slot], slot)
    except OSError:
        return False
