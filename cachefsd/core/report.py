"""What the engine tells a person: the notes of a start, and its part of ``cachefsd status``."""

from __future__ import annotations

import errno
from itertools import islice
from typing import Any

import trio

from .cache import Cache
from .files import CachedFile
from .losses import losses, unknown_losses
from .slots import CLEAN, DIRTY, QUARANTINED
from .space import Space

MAX_LISTED = 1000  # files, or ranges of them, in status


def notes(cache: Cache) -> list[str]:
    """What a person should know when the mount begins, one line each."""
    lines = []
    if cache.records.conflicts:
        first = next(iter(cache.records.conflicts.values()))
        text = (
            f"{len(cache.records.conflicts)} files were changed behind the mount while data for them waited"
            f" (conflicts), see `cachefsd resolve`; the first: {first.path}, the cache's version is {first.copy}"
        )
        lines.append(text.encode("utf-8", "backslashreplace").decode())
    if cache.files.held:
        first_held = next(iter(cache.files.held))
        reason = first_held.held.strerror if first_held.held is not None else ""
        lines.append(
            f"the backing fails for {len(cache.files.held)} files with data in the cache, which keeps it and tries"
            f" again; the first: {first_held.label}: {reason}"
        )
    return lines


def status(cache: Cache, space: Space) -> dict[str, Any]:
    """The engine's part of ``cachefsd status``."""
    stats, counts = cache.stats, cache.slots.counts
    # They are in order but for those that have been written back in part meanwhile.
    oldest = min((file.due_since for file in islice(cache.dirty, MAX_LISTED) if file.dirty), default=None)
    back = stats.writeback
    lost = list(losses(cache))
    failing = [*cache.files.held]
    if back.errors:
        failing += [file for file in cache.dirty if file.error is not None and file.held is None]
    return {
        "durability": cache.pool.durability.value,
        "pool": cache.pool.place,
        "block_size": cache.block_size,
        "slots": {
            "total": cache.pool.slots,
            "free": cache.slots.reusable,
            "clean": counts[CLEAN],
            "dirty": counts[DIRTY],
            "quarantined": counts[QUARANTINED],
        },
        "files": {"in_memory": len(cache.files.by_handle), "dormant": len(cache.files.dormant)},
        "dirty_bytes": counts[DIRTY] << cache.shift,
        "space": {"owed_bytes": space.owed, "room_bytes": max(0, space.budget) << cache.shift},
        "oldest_dirty_s": 0.0 if oldest is None else round(trio.current_time() - oldest, 3),
        "requests": {
            "read_hits": stats.read_hits,
            "read_misses": stats.read_misses,
            "write_hits": stats.write_hits,
            "write_misses": stats.write_misses,
            "bypassed": stats.bypassed,
        },
        "promotions": stats.promotions,
        "evictions": cache.slots.evictions,
        "writeback": {
            "bytes": back.bytes,
            "direct_bytes": back.direct_bytes,
            "bounced_bytes": back.bounced_bytes,
            "runs": back.runs,
            "errors": back.errors,
            "last_error": back.last_error if failing else None,
            "failing_files": len(failing),
            "failing": [_about_failing(cache, file) for file in failing[:MAX_LISTED]],
        },
        "faults": stats.faults.listed(),
        "recovery": {
            "clean": stats.recovery.clean,
            "seconds": round(stats.recovery.seconds, 4),
            "blocks": stats.recovery.blocks,
        },
        "conflicts": [
            {"path": each.path, "copy": each.copy, "since": each.since, "why": each.why, "id": each.file_id}
            for each in list(cache.records.conflicts.values())[:MAX_LISTED]
        ],
        "conflict_files": len(cache.records.conflicts),
        "lost_blocks": [{"path": path, "from": start, "to": end} for path, start, end in lost[:MAX_LISTED]],
        "lost_ranges": len(lost),
        "lost_unknown": unknown_losses(cache),
        "failed": None if cache.health.failed is None else str(cache.health.failed),
    }


def _about_failing(cache: Cache, file: CachedFile) -> dict[str, Any]:
    assert file.error is not None
    return {
        "path": file.label,
        "errno": errno.errorcode.get(file.error.errno or errno.EIO, str(file.error.errno)),
        "error": file.error.strerror,
        "dirty_bytes": file.dirty << cache.shift,
        "tries": file.failures,
        "retry_in_s": round(max(0.0, file.retry_at - trio.current_time()), 1),
    }
