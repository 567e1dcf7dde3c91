"""Which cache belongs to a backing, as the backing's mark and the cache's catalog say it (docs/design.md §9).

While a cache may have what its backing lacks, the backing carries a mark with the uuid of the cache and a *session*, a
random number that each start changes. The catalog knows the session in force and the one before it. So another cache is
told from the right one by the uuid, and an older or newer copy of the right one by the session.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

from cachefsd.backing import mark as marks
from cachefsd.backing import mountcalls
from cachefsd.backing.mark import DamagedMark, Mark
from cachefsd.backing.tree import require_free
from cachefsd.errors import ConfigError, UserError
from cachefsd.fuse import mounts
from cachefsd.media.pool import MappedPool
from cachefsd.media.ports import Catalog, CatalogError, Changes, Durability
from cachefsd.service import caches

log = logging.getLogger(__name__)
_SETTING = "mark"
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's number of this boot."""
    return _BOOT.read_text().strip()


def epoch(root_fd: int, backing: Path, mountpoint: Path) -> bytes:
    """Names the time in which the page cache over the backing keeps what was written: this boot, and the mounts of its
    file system. As long as one of them stays, the kernel has not let go of it."""
    everything = mounts.mounts()
    own = mounts.mount_of(root_fd)
    if own is None:  # of a dead mount, what is beneath was opened in a copy of the mounts, which have other numbers
        own = mounts.holder_of(os.fspath(backing), os.fspath(mountpoint), mounts.FSTYPE, everything)
    if own is None:
        return b""
    try:
        numbers = sorted(mountcalls.mounts_of(own.device))
    except OSError:  # these numbers may be used again
        numbers = sorted(entry.mount_id for entry in everything if entry.device == own.device)
    return " ".join([boot_id(), *map(str, numbers)]).encode()


@dataclass(frozen=True, slots=True)
class _State:
    """What the catalog says."""

    session: str = ""
    before: str = ""
    marked: bool = False
    """Whether the backing carries the mark."""


def require_unmarked(backing: Path, cache: Path, without: str) -> None:
    """See that no other cache has data of ``backing``, before a new cache is made for it.

    :raises UserError: one has, or is in use just now.
    """
    try:
        fd = os.open(backing, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return  # who opens it to use it will say why
    try:
        found = _read(fd, backing)
        if found is not None:
            require_free(os.fspath(backing))
            _require_given_up(found, backing, cache, without)
    finally:
        os.close(fd)


class Binding:
    """The mark of one mount, from the check before it to its end."""

    def __init__(self, root_fd: int, backing: Path, cache: Path, pool: MappedPool, catalog: Catalog) -> None:
        """
        :raises UserError: the catalog can't be read.
        """
        self._root_fd = root_fd
        self._backing = backing
        self._cache = cache
        self._pool = pool
        self._catalog = catalog
        self._uuid = pool.uuid.hex()
        self._state = self._stored()
        self._found: Mark | None = None
        self._first = False
        """Whether neither the backing nor the catalog knew of a mark before this session."""

    def check(self, without: str) -> None:
        """See that the cache and the backing fit. ``without``: the uuid of a cache that is given up, or nothing.

        :raises UserError: they do not; nothing has been changed.
        """
        found = _read(self._root_fd, self._backing)
        self._first = found is None and not self._state.marked
        if found is None:
            if self._state.marked and without != self._uuid and self._has_something():
                raise ConfigError(
                    f"the cache {self._cache} holds data for {self._backing}, which is not marked for it any more: this"
                    f" is an older copy of the cache, or the mark was removed; --without-cache {self._uuid} uses this"
                    " copy all the same, and it may write old data over new"
                )
            return
        if found.uuid != self._uuid:
            _require_given_up(found, self._backing, self._cache, without)
        elif found.session in (self._state.session, self._state.before):
            self._found = found
        elif without != self._uuid:
            raise ConfigError(
                f"the cache {self._cache} is a copy of the one that {self._backing} was mounted with last, at"
                f" {found.cache} since {found.since}: mount it with that one, or give up what that one holds with"
                f" --without-cache {self._uuid}"
            )

    def establish(self) -> list[str]:
        """Mark the backing for this session, durably. Lines for the user.

        :raises UserError: the catalog or the backing fails.
        """
        # The session of the mark stays known until the new mark is there: a crash may come in between.
        before = self._found.session if self._found is not None else ""
        session = secrets.token_hex(16)
        self._store(_State(session, before, marked=self._found is not None))
        boot = boot_id() if self._pool.durability is Durability.RAM else ""
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        mark = Mark(self._uuid, marks.for_people(os.fspath(self._cache)), session, since, boot)
        try:
            marks.write(self._root_fd, mark)
        except OSError as error:
            # The mark that is there, if there is one, stays valid: its session is the one before.
            return [
                f"the backing {self._backing} cannot be marked ({error.strerror}):"
                " it will not show that this cache has data of it"
            ]
        self._store(_State(session, before, marked=True))
        return []

    def release(self) -> None:
        """Take the mark away: the backing has everything, durably."""
        try:
            marks.remove(self._root_fd)
            self._store(_State(self._state.session, self._state.before, marked=False))
        except (OSError, UserError) as error:
            log.warning("the mark stays on %s: %s", self._backing, error)

    def undo(self) -> None:
        """Take back what :meth:`establish` has done, if there was no mark before. For a start that has not served: its
        new cache is taken away, and must not stay the right one."""
        if self._first:
            self.release()

    def _has_something(self) -> bool:
        """Whether the cache holds something that the backing may lack."""
        return bool(self._catalog.intents()) or caches.contents(self._pool).dirty > 0

    def _stored(self) -> _State:
        try:
            raw = self._catalog.setting(_SETTING)
            return _State(**json.loads(raw)) if raw else _State()
        except CatalogError as error:
            raise UserError(str(error)) from error
        except (ValueError, TypeError) as error:
            raise UserError(f"{self._cache}: what the catalog says of the backing's mark is damaged") from error

    def _store(self, state: _State) -> None:
        about = {"session": state.session, "before": state.before, "marked": state.marked}
        try:
            self._catalog.transact(Changes(settings={_SETTING: json.dumps(about).encode()}))
        except CatalogError as error:
            raise UserError(str(error)) from error
        self._state = state


def _read(root_fd: int, backing: Path) -> Mark | None:
    try:
        found = marks.read(root_fd)
    except DamagedMark:
        raise ConfigError(
            f"the mark on {backing} is damaged: find the cache that was used for it, or look at the mark"
            f" (getfattr -d {backing}, or the file .cachefsd in it) and remove it"
        ) from None
    except OSError as error:
        if error.errno == errno.ENOTCONN:
            return None  # a dead mount hides it: Binding.check looks beneath
        raise UserError(f"cannot read the mark on {backing}: {error.strerror}") from error
    if found is not None and found.boot and found.boot != boot_id():
        log.warning("the cache %s of %s was volatile, and is gone since the reboot", found.cache, backing)
        return None
    return found


def _require_given_up(found: Mark, backing: Path, cache: Path, without: str) -> None:
    if without == found.uuid:
        log.warning("what the cache %s holds of %s is given up, as was asked for", found.cache, backing)
        return
    if found.cache == marks.for_people(os.fspath(cache)):
        state = f"it is not there any more: {cache} is another one, or was formatted again"
    else:
        state = f"mount it with --cache {found.cache}"
    raise ConfigError(
        f"another cache may hold data that {backing} lacks: {found.cache}, since {found.since}; {state};"
        f" or give that data up with --without-cache {found.uuid}"
    )
