"""The catalog port over LMDB. The databases are described in docs/format.md, and what is in them is in ``records``."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import cffi
import lmdb

from cachefsd.errors import UserError
from cachefsd.media.cachedir import READ_ONLY, PrivateDirectory, sync_directory
from cachefsd.media.lmdbfile import DamagedFile, check_file
from cachefsd.media.ports import CatalogError, CatalogFullError, Changes, FileRecord, Files, Intent
from cachefsd.media.records import (
    DAMAGED,
    decode_all,
    decode_intent,
    decode_record,
    encode_intent,
    encode_record,
    file_id_of,
    file_key,
    intent_key,
)

CATALOG = "catalog"
CATALOG_FILES = _DATA, _LOCK = "data.mdb", "lock.mdb"
_LIB_VERSION = 0  # py-lmdb 3 holds engines 0.9 and 1.0, whose files are incompatible
_VERSION = b"1"
_SETTING_VERSION = b"catalog.version"
_SETTING_ENGINE = b"catalog.engine"
_SETTING_POOL = b"catalog.pool"

_MAP_MIN = 64 << 20
_MAP_PER_SLOT = 4 << 10
_MAP_MAX = 1 << 40
"""of a new catalog: enough for a pool of 1 TiB. It is addresses only, and a map that is full grows beyond."""
_RESERVE = 4 << 20
"""So many bytes of the disk are kept for what the catalog will need next."""
_FULL = 1 << 20
"""A disk with less room than this, in bytes, is full."""
_FALLOC_FL_KEEP_SIZE = 1  # linux/falloc.h

_ffi = cffi.FFI()
_ffi.cdef("int fallocate(int fd, int mode, long offset, long length);")
_libc: Any = _ffi.dlopen(None)


def create_catalog(cache: Path, pool_uuid: bytes, slots: int) -> None:
    """Make an empty catalog, durably, for the pool ``pool_uuid`` in the same cache directory.

    One whose creation was interrupted is finished. The room reserved is of addresses only.

    :raises CatalogError: there is one already, or it can't be made.
    """
    path = cache / CATALOG
    try:
        with PrivateDirectory.create(path) as directory:
            if directory.has(_DATA):
                _check_files(directory)
            env = _open_env(directory, min(_MAP_MIN + slots * _MAP_PER_SLOT, _MAP_MAX))
            try:
                _fill(env, path, pool_uuid)
            finally:
                env.close()
            directory.sync()
        sync_directory(cache)
    except (lmdb.Error, OSError, UserError) as error:
        raise CatalogError(f"{path}: can't create the catalog: {error}") from error


def _fill(env: lmdb.Environment, path: Path, pool_uuid: bytes) -> None:
    for name in (b"files", b"intents"):
        env.open_db(name)
    with env.begin(write=True, db=env.open_db(b"settings")) as txn:
        if txn.get(_SETTING_POOL) is not None:
            raise CatalogError(f"{path}: there is a catalog already; remove it first")
        txn.put(_SETTING_VERSION, _VERSION)
        txn.put(_SETTING_ENGINE, _engine(env))
        txn.put(_SETTING_POOL, pool_uuid)


def remove_catalog(cache: PrivateDirectory) -> None:
    """Remove the catalog in a cache directory that the caller has locked, if there is one.

    :raises OSError, UserError: it can't be removed.
    """
    try:
        directory = PrivateDirectory(cache.path / CATALOG, above=cache)
    except FileNotFoundError:
        return
    with directory:
        for name in (_DATA, _LOCK):
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=directory.fd)


def open_catalog(cache: Path, pool_uuid: bytes) -> LmdbCatalog:
    """Open the catalog of the pool ``pool_uuid``; once in a process, and not before a fork.

    :raises CatalogError: it is missing, unreadable, of another pool or of another version.
    """
    path = cache / CATALOG
    try:
        with ExitStack() as undo:
            directory = undo.enter_context(PrivateDirectory(path))
            _check_files(directory)
            fd = directory.open_file(_DATA, os.O_RDWR)
            undo.callback(os.close, fd)
            env = _open_env(directory, 0)  # 0: what it was created with
            undo.callback(env.close)
            catalog = LmdbCatalog(path, env, fd)
            _require_usable(catalog, path, pool_uuid, _engine(env))
            catalog.reserve()
            undo.pop_all()
    except FileNotFoundError:
        raise CatalogError(f"{path}: the catalog is missing") from None
    except lmdb.NotFoundError as error:
        raise CatalogError(f"{path}: the catalog was never finished") from error
    except (lmdb.Error, OSError, UserError, DamagedFile) as error:
        raise CatalogError(f"{path}: can't open the catalog: {error}") from error
    directory.close()
    return catalog


def peek_paths(cache: Path, pool_uuid: bytes, file_ids: Collection[int]) -> dict[int, bytes]:
    """The paths of some files, without any change: neither a lock nor a lock file. Nobody may be writing to it.

    :raises CatalogError: it is missing, unreadable, of another pool or of another version.
    """
    path = cache / CATALOG
    try:
        fd = os.open(path / _DATA, READ_ONLY)
        try:
            check_file(fd)
        finally:
            os.close(fd)
        with lmdb.Environment(
            os.fspath(path), max_dbs=3, readonly=True, lock=False, create=False, lib_version=_LIB_VERSION
        ) as env:
            catalog = LmdbCatalog(path, env, -1)
            _require_usable(catalog, path, pool_uuid, _engine(env))
            return {record.file_id: record.path for record in catalog.files() if record.file_id in file_ids}
    except (lmdb.Error, OSError, DamagedFile) as error:
        raise CatalogError(f"{path}: can't read the catalog: {error}") from error


def _check_files(directory: PrivateDirectory) -> None:
    """See that LMDB, which trusts what it maps and opens files by name, meets nothing that it could die of."""
    with suppress(FileNotFoundError):
        os.close(directory.open_file(_LOCK, os.O_RDWR))
    fd = directory.open_file(_DATA, os.O_RDWR)
    try:
        check_file(fd)
    finally:
        os.close(fd)


def _open_env(directory: PrivateDirectory, map_size: int) -> lmdb.Environment:
    path = os.fspath(directory.within("."))
    return lmdb.Environment(path, map_size=map_size, max_dbs=3, mode=0o600, create=False, lib_version=_LIB_VERSION)


def _engine(env: lmdb.Environment) -> bytes:
    major, minor, _ = env.lib_version()
    return f"lmdb {major}.{minor}".encode()


def _require_usable(catalog: LmdbCatalog, path: Path, pool_uuid: bytes, engine: bytes) -> None:
    found = [catalog.setting(name.decode()) for name in (_SETTING_VERSION, _SETTING_ENGINE, _SETTING_POOL)]
    version, found_engine, found_pool = found
    if version is None or found_engine is None or found_pool is None:
        raise CatalogError(f"{path}: the catalog was never finished")
    if version != _VERSION:
        raise CatalogError(f"{path}: the catalog has version {_text(version)}, this cachefsd knows {_text(_VERSION)}")
    if found_engine != engine:
        raise CatalogError(f"{path}: the catalog was made by {_text(found_engine)}, this is {_text(engine)}")
    if found_pool != pool_uuid:
        raise CatalogError(f"{path}: the catalog belongs to another pool")


def _text(value: bytes) -> str:
    return value.decode(errors="backslashreplace")


class LmdbCatalog:
    """A :class:`cachefsd.media.ports.Catalog`; see there. Every method may raise :class:`CatalogError`."""

    def __init__(self, path: Path, env: lmdb.Environment, fd: int) -> None:
        """``fd`` is that of the file, or -1 if nothing will be committed; both are closed with the catalog."""
        self._path = path
        self._fd = fd
        self._env = env
        self._failed = False
        self._reading = threading.Lock()
        """Other threads read records, and the environment must not be closed or mapped anew meanwhile."""
        self._reserved = 0
        """up to here, in bytes, the file has got its space"""
        self._files = env.open_db(b"files", create=False)
        self._intents = env.open_db(b"intents", create=False)
        self._settings = env.open_db(b"settings", create=False)
        self._page_size: int = env.stat()["psize"]

    def files(self) -> Iterator[FileRecord]:
        try:
            return iter([decode_record(file_id_of(key), value) for key, value in self._items(self._files)])
        except DAMAGED as error:
            raise CatalogError(f"{self._path}: a file record of the catalog is damaged: {error}") from error

    def table(self) -> Files:
        try:
            with self._env.begin(db=self._files) as txn, txn.cursor() as cursor:
                return decode_all(cursor)
        except lmdb.Error as error:
            raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error
        except DAMAGED as error:
            raise CatalogError(f"{self._path}: a file record of the catalog is damaged: {error}") from error

    def record(self, file_id: int) -> FileRecord:
        with self._reading:
            try:
                with self._env.begin(db=self._files) as txn:
                    value = txn.get(file_key(file_id))
            except lmdb.Error as error:
                raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error
        if value is None:
            raise CatalogError(f"{self._path}: the catalog has no record of file {file_id}")
        try:
            return decode_record(file_id, value)
        except DAMAGED as error:
            raise CatalogError(f"{self._path}: a file record of the catalog is damaged: {error}") from error

    def intents(self) -> Sequence[Intent]:
        try:
            return [decode_intent(key, value) for key, value in self._items(self._intents)]
        except DAMAGED as error:
            raise CatalogError(f"{self._path}: an intent of the catalog is damaged") from error

    def setting(self, name: str) -> bytes | None:
        try:
            with self._env.begin(db=self._settings) as txn:
                return txn.get(name.encode())
        except lmdb.Error as error:
            raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error

    def settings(self, prefix: str) -> dict[str, bytes]:
        start = prefix.encode()
        found: dict[str, bytes] = {}
        try:
            with self._env.begin(db=self._settings) as txn, txn.cursor() as cursor:
                more = cursor.set_range(start)
                while more and cursor.key().startswith(start):
                    found[cursor.key().decode()] = cursor.value()
                    more = cursor.next()
        except lmdb.Error as error:
            raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error
        except UnicodeDecodeError as error:
            raise CatalogError(f"{self._path}: a setting of the catalog is damaged") from error
        return found

    def transact(self, changes: Changes) -> None:
        if self._failed:
            raise CatalogError(f"{self._path}: an earlier commit of the catalog failed")
        before = self._env.info()["last_txnid"]
        try:
            while True:
                try:
                    self._commit(changes)
                    break
                except lmdb.MapFullError:
                    self._grow()
        except lmdb.Error as error:
            if self._nothing_applied(before) and self._is_full(error):
                raise CatalogFullError(f"{self._path}: no space for the catalog on its disk") from error
            self._failed = True
            raise CatalogError(f"{self._path}: can't commit to the catalog: {error}") from error
        self.reserve()

    def _nothing_applied(self, before: int) -> bool:
        """Whether a transaction that failed has left everything as it was; ``before`` is the last one before it.

        The meta page says which one is the last. It is written after everything else is durable, and LMDB begins no
        more transactions when that fails: then nobody knows.
        """
        if self._env.info()["last_txnid"] != before:
            return False
        try:
            self._env.begin(write=True).abort()
        except lmdb.Error:
            return False
        return True

    def _is_full(self, error: lmdb.Error) -> bool:
        """Whether a transaction has failed because the disk is full. LMDB takes a write that was cut short for EIO."""
        if isinstance(error, lmdb.DiskError):
            return True
        disk = os.fstatvfs(self._fd)
        return os.strerror(errno.EIO) in str(error) and disk.f_bavail * disk.f_frsize < _FULL

    def _commit(self, changes: Changes) -> None:
        with self._env.begin(write=True) as txn:
            for file_id in changes.delete:
                txn.delete(file_key(file_id), db=self._files)
                self._drop_intents(txn, file_id, (1 << 64) - 1)
            for file_id, seq in changes.drop_intents:
                self._drop_intents(txn, file_id, seq)
            for record in changes.put:
                txn.put(file_key(record.file_id), encode_record(record), db=self._files)
            for intent in changes.add_intents:
                txn.put(intent_key(intent.file_id, intent.seq), encode_intent(intent), db=self._intents)
            for name, setting in changes.settings.items():
                if setting is None:
                    txn.delete(name.encode(), db=self._settings)
                else:
                    txn.put(name.encode(), setting, db=self._settings)

    def _grow(self) -> None:
        """Map more of the file. No transaction may be open: each method ends its own, and other threads only read
        records."""
        with self._reading:
            self._env.set_mapsize(2 * self._env.info()["map_size"])

    def reserve(self) -> None:
        """Let the file have the space that it will need next, as far as the file system can do that."""
        end = (self._env.info()["last_pgno"] + 1) * self._page_size
        if end + _RESERVE // 2 <= self._reserved:
            return
        self._reserved = end + _RESERVE
        _libc.fallocate(self._fd, _FALLOC_FL_KEEP_SIZE, 0, self._reserved)

    def close(self) -> None:
        with self._reading:
            self._env.close()
            if self._fd >= 0:
                os.close(self._fd)
            self._fd = -1

    def _items(self, database: lmdb._Database) -> list[tuple[bytes, bytes]]:
        try:
            with self._env.begin(db=database) as txn, txn.cursor() as cursor:
                return list(cursor)
        except lmdb.Error as error:
            raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error

    def _drop_intents(self, txn: lmdb.Transaction[bytes], file_id: int, last_seq: int) -> None:
        with txn.cursor(db=self._intents) as cursor:
            found = cursor.set_range(intent_key(file_id, 0))
            while found and cursor.key() <= intent_key(file_id, last_seq):
                found = cursor.delete()
