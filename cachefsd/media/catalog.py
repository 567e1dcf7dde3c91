"""The catalog port over LMDB. The databases and the record are described in docs/format.md."""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from itertools import accumulate, pairwise
from pathlib import Path

import lmdb

from cachefsd.errors import UserError
from cachefsd.media.cachedir import PrivateDirectory, sync_directory
from cachefsd.media.lmdbfile import DamagedFile, check_file
from cachefsd.media.ports import NUMBERS_END, CatalogError, Changes, FileRecord, Intent, Stamp

CATALOG = "catalog"
CATALOG_FILES = _DATA, _LOCK = "data.mdb", "lock.mdb"
_LIB_VERSION = 0  # py-lmdb 3 holds engines 0.9 and 1.0, whose files are incompatible
_VERSION = b"1"
_SETTING_VERSION = b"catalog.version"
_SETTING_ENGINE = b"catalog.engine"
_SETTING_POOL = b"catalog.pool"

_MAP_MIN = 64 << 20
_MAP_PER_SLOT = 4 << 10
_MAP_MAX = 16 << 30

_HANDLE_MAX = 511  # Linux makes none of more than 128
_NAME_MAX = 255
_RECORD_VERSION = 1
_RECORD = struct.Struct("<BBHHHHIIIQqqQqq")
_HAS_STAMP = 1
_UNLINKED = 2
_ID = struct.Struct(">Q")
_ID_SEQ = struct.Struct(">QQ")
_INTENT = struct.Struct("<Qq")  # size, mtime


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
        with PrivateDirectory(path) as directory:
            _check_files(directory)
            env = _open_env(directory, 0)  # 0: what it was created with
    except FileNotFoundError:
        raise CatalogError(f"{path}: the catalog is missing") from None
    except (lmdb.Error, OSError, UserError, DamagedFile) as error:
        raise CatalogError(f"{path}: can't open the catalog: {error}") from error
    try:
        catalog = LmdbCatalog(path, env)
        _require_usable(catalog, path, pool_uuid, _engine(env))
    except lmdb.NotFoundError as error:
        env.close()
        raise CatalogError(f"{path}: the catalog was never finished") from error
    except lmdb.Error as error:
        env.close()
        raise CatalogError(f"{path}: can't read the catalog: {error}") from error
    except BaseException:
        env.close()
        raise
    return catalog


def peek_paths(cache: Path, pool_uuid: bytes, file_ids: Collection[int]) -> dict[int, bytes]:
    """The paths of some files, without any change: neither a lock nor a lock file. Nobody may be writing to it.

    :raises CatalogError: it is missing, unreadable, of another pool or of another version.
    """
    path = cache / CATALOG
    try:
        fd = os.open(path / _DATA, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            check_file(fd)
        finally:
            os.close(fd)
        with lmdb.Environment(
            os.fspath(path), max_dbs=3, readonly=True, lock=False, create=False, lib_version=_LIB_VERSION
        ) as env:
            catalog = LmdbCatalog(path, env)
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

    def __init__(self, path: Path, env: lmdb.Environment) -> None:
        self._path = path
        self._env = env
        self._failed = False
        self._files = env.open_db(b"files", create=False)
        self._intents = env.open_db(b"intents", create=False)
        self._settings = env.open_db(b"settings", create=False)

    def files(self) -> Iterator[FileRecord]:
        try:
            return iter([decode_record(_ID.unpack(key)[0], value) for key, value in self._items(self._files)])
        except (struct.error, ValueError) as error:
            raise CatalogError(f"{self._path}: a file record of the catalog is damaged: {error}") from error

    def intents(self) -> Sequence[Intent]:
        try:
            return [_decode_intent(key, value) for key, value in self._items(self._intents)]
        except (struct.error, ValueError) as error:
            raise CatalogError(f"{self._path}: an intent of the catalog is damaged") from error

    def setting(self, name: str) -> bytes | None:
        try:
            with self._env.begin(db=self._settings) as txn:
                return txn.get(name.encode())
        except lmdb.Error as error:
            raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error

    def commit(self, changes: Changes) -> None:
        if self._failed:
            raise CatalogError(f"{self._path}: an earlier commit of the catalog failed")
        try:
            with self._env.begin(write=True) as txn:
                for file_id in changes.delete:
                    txn.delete(_ID.pack(file_id), db=self._files)
                    self._drop_intents(txn, file_id, (1 << 64) - 1)
                for file_id, seq in changes.drop_intents:
                    self._drop_intents(txn, file_id, seq)
                for record in changes.put:
                    txn.put(_ID.pack(record.file_id), encode_record(record), db=self._files)
                for intent in changes.add_intents:
                    key = _ID_SEQ.pack(intent.file_id, intent.seq)
                    value = _INTENT.pack(intent.size, intent.mtime_ns)
                    txn.put(key, value, db=self._intents)
                for name, value in changes.settings.items():
                    txn.put(name.encode(), value, db=self._settings)
        except lmdb.Error as error:
            self._failed = True
            raise CatalogError(f"{self._path}: can't commit to the catalog: {error}") from error

    def close(self) -> None:
        self._env.close()

    def _items(self, database: lmdb._Database) -> list[tuple[bytes, bytes]]:
        try:
            with self._env.begin(db=database) as txn, txn.cursor() as cursor:
                return list(cursor)
        except lmdb.Error as error:
            raise CatalogError(f"{self._path}: can't read the catalog: {error}") from error

    def _drop_intents(self, txn: lmdb.Transaction[bytes], file_id: int, last_seq: int) -> None:
        with txn.cursor(db=self._intents) as cursor:
            found = cursor.set_range(_ID_SEQ.pack(file_id, 0))
            while found and cursor.key() <= _ID_SEQ.pack(file_id, last_seq):
                found = cursor.delete()


def _decode_intent(key: bytes, value: bytes) -> Intent:
    intent = Intent(*_ID_SEQ.unpack(key), *_INTENT.unpack(value))
    _require_numbers(intent.file_id, intent.seq, intent.size)
    return intent


def _require_numbers(file_id: int, seq: int, size: int) -> None:
    if not 0 < file_id < NUMBERS_END or seq >= NUMBERS_END or size >= NUMBERS_END:
        raise ValueError("its numbers are impossible")


def encode_record(record: FileRecord) -> bytes:
    """The value of ``record`` in the database ``files``."""
    stamp = record.stamp or Stamp(0, 0, 0)
    flags = (_HAS_STAMP if record.stamp is not None else 0) | (_UNLINKED if record.unlinked else 0)
    path = record.path if len(record.path) < 1 << 16 else b""  # deeper than any path that a system call takes
    texts = (record.handle, record.parent_handle, record.name, path)
    fixed = _RECORD.pack(
        _RECORD_VERSION, flags, *map(len, texts),
        record.mode, record.uid, record.gid,
        record.attr_seq, record.mtime_ns, record.ctime_ns, *stamp,
    )  # fmt: skip
    return fixed + b"".join(texts)


def decode_record(file_id: int, value: bytes) -> FileRecord:
    """The inverse of :func:`encode_record`.

    :raises ValueError, struct.error: ``value`` is not a record that this version knows.
    """
    (
        version, flags, *lengths,
        mode, uid, gid, attr_seq, mtime_ns, ctime_ns, stamp_size, stamp_mtime, stamp_ctime,
    ) = _RECORD.unpack_from(value)  # fmt: skip
    if version != _RECORD_VERSION:
        raise ValueError(f"record version {version} is unknown")
    if len(value) != _RECORD.size + sum(lengths):
        raise ValueError("its lengths do not add up")
    ends = list(accumulate(lengths, initial=_RECORD.size))
    handle, parent_handle, name, path = (value[start:end] for start, end in pairwise(ends))
    _require_numbers(file_id, attr_seq, stamp_size)
    if not 0 < len(handle) <= _HANDLE_MAX or len(parent_handle) > _HANDLE_MAX:
        raise ValueError("a handle has an impossible length")
    for component in [name, *path.split(b"/")] if path else [name]:
        if len(component) > _NAME_MAX or component in (b".", b"..") or b"/" in component or b"\0" in component:
            raise ValueError("its name is impossible")
    return FileRecord(
        file_id=file_id,
        handle=handle,
        parent_handle=parent_handle,
        name=name,
        path=path,
        mode=mode,
        uid=uid,
        gid=gid,
        stamp=Stamp(stamp_size, stamp_mtime, stamp_ctime) if flags & _HAS_STAMP else None,
        attr_seq=attr_seq,
        mtime_ns=mtime_ns,
        ctime_ns=ctime_ns,
        unlinked=bool(flags & _UNLINKED),
    )
