"""Noting in records how backing files look that we have changed, so that a change of somebody else shows."""

from __future__ import annotations

import logging

import trio

from .cache import Cache
from .files import CachedFile
from .records import BATCH

log = logging.getLogger(__name__)


class Stamps:
    """Takes new stamps of backing files, outside of passes."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache

    async def renew(self, *, dirty_too: bool = False) -> None:
        """Note how backing files look that we changed (chmod, rename), so that a crash keeps their blocks.

        Dirty files wait: their next writeback notes it anyway.
        """
        cache = self._cache
        stamped: list[CachedFile] = []
        for number, file in enumerate(list(cache.files.unstamped), 1):
            if number % BATCH == 0:
                await trio.lowlevel.checkpoint()
            if not file.recorded or file.unlinked:
                cache.files.stamped(file)
                continue
            if file.lock.locked() or (file.dirty and not dirty_too):
                continue
            async with file.lock:
                if await self._stamp(file):
                    stamped.append(file)
            cache.files.close_if_idle(file)
        if stamped:
            # Clean blocks that the new stamp would keep after a crash must be gone before it is there.
            await cache.blocks.persist()
        for first in range(0, len(stamped), BATCH):
            batch = stamped[first : first + BATCH]
            try:
                await cache.records.renew(batch)
            except OSError:
                raise
            except Exception:
                for file in batch:  # find the one that no record can be made of
                    try:
                        await cache.records.renew([file])
                    except Exception as error:
                        cache.stats.faults.note(f"the record of {file.label}", error)
            await trio.lowlevel.checkpoint()

    async def note_dirty(self) -> None:
        """Note how the backing files of dirty data look, durably. Who changes one of them while nothing is mounted is
        found out by the next start then, also after a power cut."""
        cache = self._cache
        owed = [file for file in cache.dirty if file.recorded and not file.unlinked and file.held is None]
        owed = [
            file for file in owed if file.touched or file.intents or file in cache.files.unstamped or not file.synced
        ]
        if not owed:
            return
        try:
            await cache.syncs.sync_all()
        except OSError as error:
            log.warning("changes of dirty files behind the mount may go unnoticed: %s", error.strerror)
            return
        stamped = []
        for file in owed:
            async with file.lock:
                as_stamped = not (file.touched or file.intents or file in cache.files.unstamped)
                if as_stamped or await self._stamp(file):
                    file.synced = not file.doubtful and file.error is None
                    stamped.append(file)
            cache.files.close_if_idle(file)
        for first in range(0, len(stamped), BATCH):
            await cache.records.renew(stamped[first : first + BATCH])

    async def _stamp(self, file: CachedFile) -> bool:
        cache = self._cache
        try:
            if not file.backing.writable:
                await file.backing.open(write=False)
            touches = file.touches
            cache.records.note_stamp(file, await file.backing.stat(), touches=touches)
        except OSError:
            cache.files.stamped(file)  # its clean blocks will not outlive a crash, no more
            return False
        except Exception as error:
            cache.stats.faults.note(f"the stamp of {file.label}", error)
            cache.files.stamped(file)
            return False
        return True
