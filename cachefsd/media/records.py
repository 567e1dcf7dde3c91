"""The keys and values of the catalog as bytes, and back. They are described in docs/format.md.

Nothing here knows how the catalog is stored: bytes go in and records come out, or records go in and bytes come out.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence
from itertools import accumulate, islice, pairwise

import numpy as np
import numpy.typing as npt

from cachefsd.media.ports import NUMBERS_END, FileRecord, Files, Intent, Stamp, hash_of_handle
from cachefsd.times import from_word, to_word

_HANDLE_MAX = 511  # Linux makes none of more than 128
_NAME_MAX = 255
_PATH_MAX = 1024
"""Of a longer path the end is kept: it is for people, and a hint where a file may be found."""
_CUT = b"(cut)/"
_RECORD_VERSION = 1
_RECORD = struct.Struct("<BBHHHHIIIQQQQQQ")
_HAS_STAMP = 1
_UNLINKED = 2
_TOUCHED = 4
_SYNCED = 8
_DOUBTFUL = 16
_FIXED = np.dtype(
    [
        *(("version", "u1"), ("flags", "u1")),
        *((name, "<u2") for name in ("handle", "parent", "name", "path")),
        *((name, "<u4") for name in ("mode", "uid", "gid")),
        *(("attr_seq", "<u8"), ("mtime", "<u8"), ("ctime", "<u8")),
        *(("stamp_size", "<u8"), ("stamp_mtime", "<u8"), ("stamp_ctime", "<u8")),
    ]
)
"""the same as ``_RECORD``, for many"""
_CHUNK = 4096  # records decoded together
_ID = struct.Struct(">Q")
_ID_SEQ = struct.Struct(">QQ")
_INTENT = struct.Struct("<QQ")  # size, mtime
_NO_FILES = Files(np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.uint64), np.empty(0, np.bool_))

DAMAGED = (struct.error, ValueError)
"""What the functions that decode raise, of keys and values that this version did not write."""


def file_key(file_id: int) -> bytes:
    """The key of a file's record. Keys sort as the numbers do."""
    return _ID.pack(file_id)


def file_id_of(key: bytes) -> int:
    """The inverse of :func:`file_key`.

    :raises struct.error: ``key`` is damaged.
    """
    file_id: int = _ID.unpack(key)[0]
    return file_id


def intent_key(file_id: int, seq: int) -> bytes:
    """The key of an intent. Keys sort by file id, and those of a file by seq."""
    return _ID_SEQ.pack(file_id, seq)


def encode_intent(intent: Intent) -> bytes:
    """The value of ``intent``."""
    return _INTENT.pack(intent.size, to_word(intent.mtime_ns))


def decode_intent(key: bytes, value: bytes) -> Intent:
    """The intent of a key and a value.

    :raises ValueError, struct.error: they are damaged.
    """
    file_id, seq = _ID_SEQ.unpack(key)
    size, mtime = _INTENT.unpack(value)
    intent = Intent(file_id, seq, size, from_word(mtime))
    _require_numbers(intent.file_id, intent.seq, intent.size)
    return intent


def _require_numbers(file_id: int, seq: int, size: int) -> None:
    if not 0 < file_id < NUMBERS_END or seq >= NUMBERS_END or size >= NUMBERS_END:
        raise ValueError("its numbers are impossible")


def encode_record(record: FileRecord) -> bytes:
    """The value of ``record``."""
    stamp = record.stamp or Stamp(0, 0, 0)
    flags = (_HAS_STAMP if record.stamp is not None else 0) | (_UNLINKED if record.unlinked else 0)
    flags |= (_TOUCHED if record.touched else 0) | (_SYNCED if record.synced else 0)
    flags |= _DOUBTFUL if record.doubtful else 0
    path = record.path
    if len(path) > _PATH_MAX:
        path = _CUT + path[len(_CUT) - _PATH_MAX :].partition(b"/")[2]
    texts = (record.handle, record.parent_handle, record.name, path)
    fixed = _RECORD.pack(
        _RECORD_VERSION, flags, *map(len, texts),
        record.mode, record.uid, record.gid,
        record.attr_seq, to_word(record.mtime_ns), to_word(record.ctime_ns),
        stamp.size, to_word(stamp.mtime_ns), to_word(stamp.ctime_ns),
    )  # fmt: skip
    return fixed + b"".join(texts)


def decode_record(file_id: int, value: bytes) -> FileRecord:
    """The inverse of :func:`encode_record`.

    :raises ValueError, struct.error: ``value`` is not a record that this version knows.
    """
    (
        version, flags, *lengths,
        mode, uid, gid, attr_seq, mtime, ctime, stamp_size, stamp_mtime, stamp_ctime,
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
        stamp=Stamp(stamp_size, from_word(stamp_mtime), from_word(stamp_ctime)) if flags & _HAS_STAMP else None,
        attr_seq=attr_seq,
        mtime_ns=from_word(mtime),
        ctime_ns=from_word(ctime),
        unlinked=bool(flags & _UNLINKED),
        touched=bool(flags & _TOUCHED),
        synced=bool(flags & _SYNCED),
        doubtful=bool(flags & _DOUBTFUL),
    )


def decode_all(items: Iterable[tuple[bytes, bytes]]) -> Files:
    """What :class:`Files` has of the records of all ``items``, which are keys and values.

    :raises ValueError, struct.error: a record is damaged.
    """
    parts: list[Files] = [_NO_FILES]
    rest = iter(items)
    while chunk := list(islice(rest, _CHUNK)):
        parts.append(decode_table([key for key, _ in chunk], [value for _, value in chunk]))
    return Files(*(np.concatenate(each) for each in zip(*parts, strict=True)))


def decode_table(keys: Sequence[bytes], values: Sequence[bytes]) -> Files:
    """What :class:`Files` has of n > 0 records, which are checked as :func:`decode_record` does, but many at once.

    Records that may be damaged are decoded one by one: that says whether they are, and how.

    :raises ValueError, struct.error: a record is damaged.
    """
    size = _RECORD.size
    if min(map(len, values)) < size:
        return _table_of([decode_record(file_id_of(key), value) for key, value in zip(keys, values, strict=True)])
    ids = np.array([file_id_of(key) for key in keys], np.uint64)
    data = np.frombuffer(b"".join(values), np.uint8)
    ends = np.cumsum([len(value) for value in values])
    starts = np.r_[0, ends[:-1]]
    fixed = data[starts[:, None] + np.arange(size)].view(_FIXED)[:, 0]
    handle, parent, name, path = (fixed[length].astype(np.int64) for length in ("handle", "parent", "name", "path"))
    doubtful = (fixed["version"] != _RECORD_VERSION) | (starts + size + handle + parent + name + path != ends)
    doubtful |= (handle == 0) | (handle > _HANDLE_MAX) | (parent > _HANDLE_MAX)
    doubtful |= (fixed["attr_seq"] >= NUMBERS_END) | (fixed["stamp_size"] >= NUMBERS_END)
    doubtful |= (ids == 0) | (ids >= NUMBERS_END)
    doubtful |= (name > _NAME_MAX) | (path > _NAME_MAX)  # a path may be longer, but not each of its components
    # Where the texts begin; of a record whose lengths do not add up this may be its end.
    names = np.minimum(starts + size + handle + parent, ends)
    paths = np.minimum(names + name, ends)
    slashes, dots, odd = data == ord("/"), data == ord("."), data == 0
    odd[1:] |= dots[1:] & slashes[:-1]  # a component that begins with a dot
    doubtful |= _any_in(odd, names, ends) | _any_in(slashes, names, paths)
    doubtful |= np.append(dots, False)[np.stack((names, paths))].any(axis=0)
    hashes = [hash_of_handle(value[size : size + end]) for value, end in zip(values, handle.tolist(), strict=True)]
    table = Files(ids, np.array(hashes, np.uint64), fixed["attr_seq"].copy(), (fixed["flags"] & _UNLINKED) != 0)
    if doubtful.any():
        places = np.flatnonzero(doubtful)
        records = [decode_record(int(ids[place]), values[place]) for place in places.tolist()]
        for column, found in zip(table, _table_of(records), strict=True):
            column[places] = found
    return table


def _table_of(records: Sequence[FileRecord]) -> Files:
    return Files(
        np.array([record.file_id for record in records], np.uint64),
        np.array([hash_of_handle(record.handle) for record in records], np.uint64),
        np.array([record.attr_seq for record in records], np.uint64),
        np.array([record.unlinked for record in records], np.bool_),
    )


def _any_in(
    marks: npt.NDArray[np.bool_], starts: npt.NDArray[np.int64], ends: npt.NDArray[np.int64]
) -> npt.NDArray[np.bool_]:
    """Whether one of ``marks`` is set between each start and end."""
    before = np.zeros(len(marks) + 1, np.int32)
    np.cumsum(marks, out=before[1:])
    found: npt.NDArray[np.bool_] = before[ends] != before[starts]
    return found
