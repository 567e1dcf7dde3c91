"""What a file that comes from its record lacks, and the backing file says."""

from __future__ import annotations

from ..backing.ports import BackingStat
from ..media.ports import Stamp
from .cache import Cache
from .files import CachedFile


def settle(cache: Cache, file: CachedFile, stat: BackingStat) -> None:
    """Complete a file that comes from its record, now that its backing file is known: sizes, times, clean blocks.

    Clean blocks are kept only when the backing file is exactly as we left it (H42).
    """
    file.seen()
    seen = Stamp(stat.size, stat.mtime_ns, stat.ctime_ns)
    changed = file.stamp != seen
    file.doubtful |= file.touched
    if file.touched or file.stamp is None or file.stamp[:2] != seen[:2]:
        file.outdate_record()  # else it would be taken for a stranger's change after a crash
    if changed:
        cache.blocks.remove_all(file, only_clean=True)
    file.backing_size = stat.size
    file.size = max(file.size, stat.size)  # it was that of the last block that the backing has not got
    if file.dirty:
        # mtime and ctime hold what the newest headers say
        file.ctime_ns = max(file.mtime_ns, stat.ctime_ns)
    else:
        file.mtime_ns = stat.mtime_ns
        file.ctime_ns = stat.ctime_ns if changed else file.ctime_ns
    cache.records.note_stamp(file, stat, touches=file.touches)
    if changed:
        cache.files.stamp_later(file)  # the record would still have the old one when it wakes again
