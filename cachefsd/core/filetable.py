"""The table of files: which are in memory, which are dormant, and how they come and go."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from ..backing.ports import Backing
from ..media.ports import U64, Catalog, CatalogError
from ..runs import equal_runs
from .dormant import Dormant, Rows, may_be_dormant
from .files import CachedFile
from .health import Health
from .slots import Slots

log = logging.getLogger(__name__)
T = TypeVar("T")


class Forgotten(NamedTuple):
    """What is left of files that nobody needs any more."""

    ids: list[int]
    """of files that have left memory: their records can go"""
    files: list[CachedFile]
    """Class ``disk``: those that keep their ids and handles, as a crash may bring old versions of their blocks back
    until the FREEs of their slots are durable."""
    dormant: list[int]
    """The same, by file id, for those that were dormant."""

    def __bool__(self) -> bool:
        return bool(self.ids or self.files or self.dormant)


class FileTable:
    """Every file that something is known of. Its parts may be read by all; they are changed by the methods here."""

    def __init__(self, catalog: Catalog, backing: Backing, slots: Slots, health: Health) -> None:
        self.by_id: dict[int, CachedFile] = {}
        """every file that has a record and is not dormant"""
        self.by_handle: dict[bytes, CachedFile] = {}
        self.dormant = Dormant(catalog, backing, slots)
        self.held: dict[CachedFile, None] = {}
        """files that could not be brought up to date after the start"""
        self.orphans: dict[CachedFile, None] = {}
        """files without names and users; their slots wait for the backing's unlink to be durable"""
        self.unstamped: dict[CachedFile, None] = {}
        """files whose backing inode we changed without noting its new stamp"""
        self.kept_open: dict[CachedFile, None] = {}
        """Idle files with something owed to them, in the order in which they became idle."""
        self.leaving_dormant: dict[int, None] = {}
        """see :class:`Forgotten`"""
        self._leaving: dict[CachedFile, None] = {}
        self._forgotten: list[int] = []
        self._unused: dict[CachedFile, None] = {}
        """Files without users that may become dormant: upkeep looks."""
        self._backing = backing
        self._slots = slots
        self._health = health
        health.on_failure(self._stop)

    # ---- coming

    def find(self, handle: bytes) -> CachedFile | None:
        """The file with this handle, if anything of it is known; a dormant one wakes.

        :raises OSError: EIO when the catalog can't be read; the cache has failed then.
        """
        return self.by_handle.get(handle) or self._wake(self.dormant.wake, handle)

    def find_id(self, file_id: int) -> CachedFile | None:
        """:meth:`find` by file id."""
        return self.by_id.get(file_id) or self._wake(self.dormant.wake_id, file_id)

    def _wake(self, wake: Callable[[T], CachedFile | None], key: T) -> CachedFile | None:
        if not self.dormant:
            return None
        try:
            file = wake(key)
        except CatalogError as error:
            self._health.fail(error)
            raise OSError(errno.EIO, str(error)) from error
        if file is not None:
            self.add(file)
            self._unused[file] = None
        return file

    def new(self, handle: bytes) -> CachedFile:
        """A file that nothing is known of."""
        file = self.by_handle[handle] = CachedFile(handle, self._backing.file(handle))
        return file

    def add(self, file: CachedFile) -> None:
        """Take up a file that has a record."""
        if self._health.failed is not None:
            file.stop()
        self.by_id[file.file_id] = file
        self.by_handle.setdefault(file.handle, file)  # where the backing gives handles out again

    def add_dormant(self, rows: Rows) -> None:
        """Take up files that have records and clean blocks, and nothing else."""
        self.dormant.add(rows)

    def change_handle(self, file: CachedFile, handle: bytes) -> None:
        """The file is another one in the backing from now on."""
        if file.handle == handle:
            return
        if self.by_handle.get(file.handle) is file:
            del self.by_handle[file.handle]
        file.backing.close()
        file.handle, file.backing = handle, self._backing.file(handle)
        self.by_handle[handle] = file

    def _stop(self) -> None:
        for file in self.by_id.values():
            file.stop()

    # ---- what is to be done about some of them

    def orphan(self, file: CachedFile) -> None:
        """A file has neither names nor users."""
        self.orphans[file] = None

    def not_orphaned(self, file: CachedFile) -> None:
        """It has one of them, or its slots have been dropped."""
        self.orphans.pop(file, None)

    def stamp_later(self, file: CachedFile) -> None:
        """The backing inode was changed, and its new stamp has yet to be noted."""
        self.unstamped[file] = None

    def stamped(self, file: CachedFile) -> None:
        """It has been noted, or will not be."""
        self.unstamped.pop(file, None)

    def hold(self, file: CachedFile, error: OSError) -> None:
        """Set aside a file that cannot be brought up to date: who wants to use it gets the error."""
        if self._health.failed is None and (file.held is None or file.held.errno != error.errno):
            log.warning("set aside, the data stays in the cache: %s: %s", file.label, error.strerror or error)
        file.error = OSError(error.errno, error.strerror or str(error))
        file.hold(file.error)
        file.failures += 1
        self.held[file] = None
        self.close_if_idle(file)

    def let_go(self, file: CachedFile) -> bool:
        """A file may be used; whether it was set aside."""
        if file not in self.held:
            return False
        del self.held[file]
        log.info("in use again: %s", file.label)
        file.let_go()
        file.error = None
        file.failures, file.retry_at = 0, 0.0
        return True

    # ---- descriptors

    def close_if_idle(self, file: CachedFile) -> None:
        """Close the backing file once nobody has it open and nothing is owed to it, or forget it all.

        Of those that are owed something the last ones stay open, for their writeback.
        """
        if not file.idle:
            return
        self.kept_open.pop(file, None)
        if file.dirty or file.intents:
            self._keep_open(file)
            return
        file.backing.close()
        self.forget(file)

    def _keep_open(self, file: CachedFile) -> None:
        """Keep the descriptors of an idle file that is owed something, and close those of the one that has had them
        for longest: small files come faster than a slow backing takes them."""
        self.kept_open[file] = None
        if len(self.kept_open) > self._backing.most_kept_open:
            oldest = next(iter(self.kept_open))
            del self.kept_open[oldest]
            # One that is busy comes again when it is not; the handle of one without a name may lead nowhere.
            if oldest.idle and not oldest.unlinked:
                oldest.backing.close()

    def close_idle(self) -> None:
        """Close the descriptors of idle files, where they can be opened again: somebody needs them more."""
        for file in list(self.kept_open):
            if file.idle and not file.unlinked:
                del self.kept_open[file]
                file.backing.close()

    # ---- going

    def evicted(self, owners: U64, blocks: U64) -> None:
        """Take blocks of files out of their tables: shape (n,), n > 0."""
        order = np.lexsort((blocks, owners))
        owners, blocks = owners[order], blocks[order]
        for first, end in equal_runs(owners):
            file_id = int(owners[first])
            file = self.by_id.get(file_id)
            if file is None:
                if self.dormant.evicted(file_id, end - first, leaving=self._slots.deferred):
                    if self._slots.deferred:
                        self.leaving_dormant[file_id] = None
                    else:
                        self._forgotten.append(file_id)
                continue
            file.table.remove(blocks[first:end])
            if not file.table.cached and not file.ref_count:
                self.forget(file)

    def forget(self, file: CachedFile) -> None:
        """Let a file leave memory that has neither users nor slots nor anything owed.

        In class ``disk`` it stays until upkeep calls :meth:`leave`. A second id for its handle would know nothing of
        old versions that a crash may bring back: they would outlive a truncate, and an unlink.
        """
        if not self._unneeded(file):
            if not file.ref_count:
                self._unused[file] = None
            return
        if self._slots.deferred and file.file_id:
            self._leaving[file] = None
            self.kept_open.pop(file, None)
            file.backing.close()
            return
        if file.file_id:
            self._forgotten.append(file.file_id)
        self._leave_memory(file)

    def forget_ids(self, ids: Iterable[int]) -> None:
        """Nobody needs the records of these, which are not in memory."""
        self._forgotten += ids

    def take_forgotten(self) -> Forgotten:
        """What has been forgotten since the last call. Whoever takes it deletes the records, or puts it back."""
        forgotten = Forgotten(self._forgotten, list(self._leaving), list(self.leaving_dormant))
        self._forgotten, self._leaving, self.leaving_dormant = [], {}, {}
        return forgotten

    def put_back(self, forgotten: Forgotten) -> None:
        """Undo :meth:`take_forgotten`."""
        self._forgotten[:0] = forgotten.ids
        self._leaving.update(dict.fromkeys(forgotten.files))
        self.leaving_dormant.update(dict.fromkeys(forgotten.dormant))

    def leave(self, files: Iterable[CachedFile], dormant: Iterable[int]) -> list[int]:
        """Let files leave memory whose FREEs are durable since they were forgotten; their ids. Those that somebody
        needs again stay. ``dormant`` are the ids of files that were dormant when they were forgotten."""
        gone = self.dormant.leave([file_id for file_id in dormant if file_id not in self.leaving_dormant])
        for file in files:
            # It was used meanwhile, and forgotten again, and waits for newer FREEs; or it fell asleep.
            if file in self._leaving or self.by_id.get(file.file_id) is not file:
                continue
            if self._unneeded(file):
                self._leave_memory(file)
                gone.append(file.file_id)
            elif not file.ref_count:
                self._leaving[file] = None  # an operation has it: the next round sees what has become of it
        return gone

    def _unneeded(self, file: CachedFile) -> bool:
        locked = file.lock.locked() or file.record_lock.locked()
        return not (file.ref_count or file.table.cached or file.dirty or file.intents or locked)

    def take_unused(self) -> list[CachedFile]:
        """Files that have lost their last user since the last call, or were busy then."""
        unused, self._unused = list(self._unused), {}
        return unused

    def make_dormant(self, files: Sequence[CachedFile]) -> None:
        """Make those of these files dormant that may be. Those that are busy are looked at again."""
        able = [file for file in files if file not in self.unstamped and may_be_dormant(file, self._slots)]
        for file in self.dormant.add_files(able):
            self._leave_memory(file)
        self._unused.update((file, None) for file in files if not file.ref_count and not file.idle)

    def _leave_memory(self, file: CachedFile) -> None:
        if self.by_handle.get(file.handle) is file:
            del self.by_handle[file.handle]
        self.by_id.pop(file.file_id, None)
        self.unstamped.pop(file, None)
        self.held.pop(file, None)
        self.kept_open.pop(file, None)
        self._unused.pop(file, None)
        self._leaving.pop(file, None)
        file.forget_record()
        file.backing.close()

    def close(self) -> None:
        """Close all backing files."""
        for file in self.by_handle.values():
            file.backing.close()
