"""What the catalog says of files: transactions, records, and stamps of backing files."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable, Iterable, Sequence

import trio

from ..backing.ports import BackingStat
from ..media.ports import Catalog, CatalogError, CatalogFullError, Changes, FileRecord, Stamp
from .conflicts import Conflict
from .files import CachedFile, Hints
from .filetable import FileTable
from .health import Health
from .offload import RunBlocking
from .slots import Slots

BATCH = 1000  # records per transaction


class Records:
    """The records of one cache. A file's record is durable before the first header that names it (O6)."""

    def __init__(
        self,
        catalog: Catalog,
        files: FileTable,
        slots: Slots,
        health: Health,
        persist: Callable[[], Awaitable[None]],
        run_blocking: RunBlocking,
    ) -> None:
        """``persist`` makes all headers durable."""
        self.next_file_id = 1
        self.conflicts: dict[int, Conflict] = {}
        """by file id: files of which there are two versions that a person has yet to choose from"""
        self.lock = trio.Lock()
        """Class ``disk``: held by a transaction."""
        self._catalog = catalog
        self._files = files
        self._slots = slots
        self._health = health
        self._persist = persist
        self._run_blocking = run_blocking

    def begin_at(self, file_id: int, conflicts: dict[int, Conflict]) -> None:
        """What recovery has found: the first file id that nobody has, and the conflicts."""
        self.next_file_id, self.conflicts = file_id, conflicts

    async def transact(self, make: Callable[[], Changes], *, essential: bool = False) -> None:
        """One durable catalog transaction; off the loop where the catalog's disk is slow.

        ``make`` is called when its turn has come: a record that was made before it had to wait would overwrite
        what others have said of the file meanwhile, a tombstone for example. ``essential``: the caller can't go on
        without it, so that a full disk is like a broken one.

        :raises OSError: ENOSPC when the catalog's disk is full: nothing has changed. Else EIO; the cache then
            acknowledges nothing more (H50).
        """
        self._health.check()
        try:
            if self._slots.deferred:
                async with self.lock:
                    await self._run_blocking(self._catalog.transact, make())
            else:
                self._catalog.transact(make())
        except CatalogFullError as error:
            if essential:
                self._health.fail(error)
            raise OSError(errno.ENOSPC, str(error)) from error
        except CatalogError as error:
            self._health.fail(error)
            raise OSError(errno.EIO, str(error)) from error

    # ---- records of files

    async def record(self, file: CachedFile) -> None:
        """Make the file's record durable: before the first header that names it (O6)."""
        async with file.record_lock:
            self._health.check()
            if file.record_fits:
                return
            if not file.file_id:
                file.file_id = self.next_file_id
                self.next_file_id += 1
            tombstone, touched, touches = file.unlinked, False, 0
            await self.before_stamps([file])

            def changes() -> Changes:
                nonlocal touched, touches
                touched, touches = file.touched, file.touches
                next_file_id: dict[str, bytes | None] = {"next_file_id": b"%d" % self.next_file_id}
                return Changes(put=[self.record_of(file, tombstone)], settings=next_file_id)

            await self.transact(changes)
            self._files.add(file)
            file.announced = file.announced or (touched and file.touched)
            file.was_recorded(tombstone=tombstone, outdated=touches != file.touches and not file.announced)

    async def renew(self, files: Sequence[CachedFile]) -> None:
        """Put what is known of these files now into the catalog, as far as they have records.

        :raises OSError: of the catalog, see :meth:`transact`.
        """
        seen: dict[CachedFile, int] = {}

        def changes() -> Changes:
            # What has been forgotten meanwhile must not get a record again.
            seen.update((file, file.touches) for file in files if file.recorded)
            return Changes(put=[self.record_of(file) for file in seen])

        await self.transact(changes)
        for file, touches in seen.items():
            if file.touches == touches and not file.changing:
                file.renew_record()

    def record_of(self, file: CachedFile, unlinked: bool | None = None) -> FileRecord:
        """The record that says what is known of ``file`` now, to be committed."""
        if not file.touched:
            file.announced = False  # from now on, whenever it arrives
        hints = file.hints() if file.hints else Hints(b"", b"", b"", 0o100600, 0, 0)
        return FileRecord(
            file_id=file.file_id,
            handle=file.handle,
            parent_handle=hints.parent_handle,
            name=hints.name,
            path=hints.path,
            mode=hints.mode,
            uid=hints.uid,
            gid=hints.gid,
            stamp=file.stamp,
            attr_seq=file.attr_seq,
            mtime_ns=file.mtime_ns,
            ctime_ns=file.ctime_ns,
            unlinked=file.tombstone if unlinked is None else unlinked,
            touched=file.touched,
            synced=file.synced,
            doubtful=file.doubtful,
        )

    # ---- what the backing files look like

    async def before_stamps(self, files: Iterable[CachedFile]) -> None:
        """Class ``disk``: to be awaited before records of files are committed with new stamps. Clean blocks that such a
        stamp would keep after a crash are durably gone then."""
        if self._slots.deferred and any(file.recorded and file in self._files.unstamped for file in files):
            await self._persist()

    async def announce(self, files: Sequence[CachedFile]) -> None:
        """Say durably that we are about to change size or mtime of these backing files: what they look like after a
        crash is then no sign of a stranger. A new stamp ends it."""
        for file in files:
            file.touched = True
        if all(file.announced or not file.recorded for file in files):
            return
        named: list[CachedFile] = []
        await self.before_stamps(files)

        def changes() -> Changes:
            named[:] = [file for file in files if file.recorded and not file.announced]
            return Changes(put=[self.record_of(file) for file in named])

        await self.transact(changes)
        for file in named:
            file.announced = file.touched

    async def touch(self, file: CachedFile) -> None:
        """To be called before size or mtime of a backing file is changed by other ways than a pass or an intent."""
        file.touches += 1
        file.touched = True
        if file.announced:
            return
        # What is clean by now may be dirty again after a power cut, until the pool has been synced.
        if (
            file.dirty
            or file.intents
            or (self._slots.deferred and (self._slots.changed_since_persist or self._slots.unpersisted))
        ):
            await self.announce([file])
        else:
            file.outdate_record()  # the next version waits for a record that says so

    def note_stamp(self, file: CachedFile, stat: BackingStat, *, touches: int, synced: bool = False) -> None:
        """The backing file is now as ``stat`` says, and we know all that is in it.

        ``touches``: those of the file before it was synced and looked at. ``synced``: it was synced, names included.
        """
        seen = Stamp(stat.size, stat.mtime_ns, stat.ctime_ns)
        if touches == file.touches and not file.changing:
            same = file.stamp is not None and not file.touched and file.stamp[:2] == seen[:2]
            file.synced = synced or (same and file.synced)
            file.touched = False
            file.doubtful &= not synced
        file.stamp = seen
        self._files.stamped(file)

    # ---- conflicts

    def note_conflict(self, conflict: Conflict) -> None:
        """A conflict is in the catalog."""
        self.conflicts[conflict.file_id] = conflict

    async def forget_conflict(self, file_id: int) -> None:
        """A person has chosen from the two versions of a file, or keeps both.

        :raises OSError: ENOENT if there is no such conflict; EIO.
        """
        conflict = self.conflicts.get(file_id)
        if conflict is None:
            raise OSError(errno.ENOENT, "there is no such conflict")
        await self.transact(lambda: Changes(settings={conflict.key: None}))
        self.conflicts.pop(file_id, None)
