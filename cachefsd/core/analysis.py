"""What the headers of a pool say: which versions of blocks count, which are dead, and whose they are.

All of it is computed from arrays and tables of the catalog. Nothing here reads media or changes anything, so a tool
that only looks at a cache comes to the same verdicts as ``core/recovery.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from ..errors import UserError
from ..media.ports import NUMBERS_END, U8, U64, Bools, Files, Headers, Holding, Intent
from .slots import CLEAN, FREE


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
    """on bad media; among ``lost_owner`` from :func:`find_owners` on"""
    winners: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    """slots that hold the current version of a block, by (file id, block)"""


def found_in(headers: Headers, block_size: int) -> Found:
    """The headers of a whole pool. Those that claim what cannot be are among the unusable ones.

    The arrays of ``headers`` are taken over and changed.
    """
    state, seq, file_id, block = headers.state, headers.seq, headers.file_id, headers.block
    end = np.uint64(NUMBERS_END)
    known = headers.seq_known & (seq < end)
    holdings = headers.holdings()
    unusable = holdings == Holding.UNKNOWN
    unusable |= (state != FREE) & ((seq >= end) | (file_id >= end) | (block >= end // np.uint64(block_size)))
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
        dead=np.zeros(len(state), np.bool_),
        lost_owner=np.zeros(len(state), np.bool_),
        set_aside=(holdings == Holding.SET_ASIDE) & ~unusable,
    )


def not_covered(found: Found, persisted_seq: int) -> npt.NDArray[np.int64]:
    """Class ``disk``: the slots of versions newer than the last sync of the pool. Data may be missing there."""
    unsure = (found.state != FREE) & (found.seq > np.uint64(persisted_seq))
    return np.flatnonzero(unsure)


def kill_cut(found: Found, intents: dict[int, list[Intent]], block_size: int) -> None:
    """Versions older than a truncate, beyond its size, are dead."""
    concerned = np.isin(found.file_id, np.array(list(intents), np.uint64)) & (found.state != FREE)
    for slot in np.flatnonzero(concerned).tolist():
        start, seq = int(found.block[slot]) * block_size, int(found.seq[slot])
        if any(seq < intent.seq and start >= intent.size for intent in intents[int(found.file_id[slot])]):
            found.dead[slot] = True


def replaced_ids(files: Files, handle_of: Callable[[int], bytes]) -> list[int]:
    """The ids of files whose handle has a newer id: the newest is the one, and versions of the others are dead.

    A handle gets a second id only after nothing is owed to the first one: what is there of that has been freed, and a
    crash has brought it back. Class ``disk`` of earlier releases left that behind.
    """
    newest: dict[bytes, int] = {}
    replaced: list[int] = []
    for file_id in np.sort(files.file_id[several_of(files.handle_hash)]).tolist():
        handle = handle_of(file_id)
        if handle in newest:
            replaced.append(newest[handle])
        newest[handle] = file_id
    return replaced


def kill_replaced(found: Found, files: Files, replaced: list[int]) -> Files:
    """The versions of these files are dead; the table without them."""
    gone = np.array(replaced, np.uint64)
    found.dead |= np.isin(found.file_id, gone) & (found.state != FREE)
    kept = ~np.isin(files.file_id, gone)
    return Files(files.file_id[kept], files.handle_hash[kept], files.attr_seq[kept], files.unlinked[kept])


def order_versions(file_id: U64, block: U64, seq: U64) -> tuple[npt.NDArray[np.int64], Bools]:
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


def choose(found: Found) -> None:
    """Per block the highest seq wins whatever its state; the others are dead."""
    live = np.flatnonzero((found.state != FREE) & ~found.dead)
    order, same = order_versions(found.file_id[live], found.block[live], found.seq[live])
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


def find_owners(found: Found, files: Files) -> None:
    """Blocks of files without a record: clean ones are dropped, dirty ones kept aside."""
    owners, _, counts = files_of(found)
    unknown = ~np.isin(owners, files.file_id)
    if not unknown.any():
        return
    orphaned = found.winners[np.repeat(unknown, counts)]
    clean = found.state[orphaned] == CLEAN
    found.dead[orphaned[clean]] = True
    found.lost_owner[orphaned[~clean]] = True
    found.winners = found.winners[~(found.dead | found.lost_owner)[found.winners]]


def files_of(found: Found) -> tuple[U64, npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """The files that have winners: their ids, ascending, where theirs begin, and how many there are."""
    owners = found.file_id[found.winners]
    starts = np.flatnonzero(np.r_[True, owners[1:] != owners[:-1]][: len(owners)])
    return owners[starts], starts, np.diff(starts, append=len(owners))


def several_of(hashes: U64) -> Bools:
    """Which of the hashes are there more than once."""
    ordered = np.sort(hashes)
    again = ordered[1:][ordered[1:] == ordered[:-1]]
    result: Bools = np.isin(hashes, again) if len(again) else np.zeros(len(hashes), np.bool_)
    return result
