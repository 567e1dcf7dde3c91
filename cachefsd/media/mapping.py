"""The mapping of a pool, and how stores into it become durable."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from collections.abc import Callable
from typing import Any

import cffi

from cachefsd.errors import UserError
from cachefsd.filesystems import RAMFS, TMPFS, file_system_type
from cachefsd.media.ports import Buffer, Durability

_MAP_SHARED_VALIDATE = 0x03  # linux/mman.h; CPython's mmap passes these on, but does not name them
_MAP_SYNC = 0x80000
_MEMORY_FILE_SYSTEMS = {TMPFS: "tmpfs", RAMFS: "ramfs"}
_LIBPMEM = "libpmem.so.1"

# libpmem.h; addresses are declared as integers to save a cast per call, results as void to save an object.
_PMEM_F_MEM_NODRAIN = 1
_PMEM_F_MEM_NONTEMPORAL = 2
_COPY_FLAGS = _PMEM_F_MEM_NODRAIN | _PMEM_F_MEM_NONTEMPORAL

_ffi = cffi.FFI()
_ffi.cdef(
    """
    void pmem_memcpy(uintptr_t dest, const char *src, size_t len, unsigned flags);
    void pmem_flush(uintptr_t address, size_t len);
    void pmem_drain(void);
    """
)


def memory_file_system(fd: int) -> str | None:
    """The name of the file system of ``fd`` if it keeps its files in memory only."""
    return _MEMORY_FILE_SYSTEMS.get(file_system_type(fd))


class Mapping:
    """A pool in memory, and the three primitives of its durability class.

    ``view`` is the only memoryview of the map besides its slices; it lives as long as the mapping.
    """

    copy: Callable[[int, Buffer], None]
    """``copy(offset, data)``: store ``data`` at ``offset`` and persist it."""
    persist: Callable[[int, int], None]
    """``persist(offset, length)``: persist stored bytes."""
    fence: Callable[[], None]
    """``fence()``: wait until all that was persisted is durable."""

    def __init__(self, fd: int, size: int, *, name: str, volatile: bool, forced: Durability | None) -> None:
        """Map ``size`` bytes of ``fd``. ``forced`` makes an ordinary map of it and picks the primitives.

        :raises UserError: the class would be ``ram`` without ``volatile``, or libpmem is missing.
        """
        self._map, self.durability = _map(fd, size, name, volatile, forced)
        if self.durability is Durability.PMEM:
            try:
                pmem = _Pmem(self._map)
            except UserError:
                self._map.close()  # it holds the lock
                raise
            self.copy, self.persist, self.fence = pmem.copy, pmem.persist, pmem.drain
        else:
            self.copy, self.persist, self.fence = self._copy, nothing_to_persist, _nothing_to_wait_for
        self.view = memoryview(self._map)

    def _copy(self, offset: int, data: Buffer) -> None:
        self.view[offset : offset + len(data)] = data

    def close(self) -> None:
        """Unmap. All slices of ``view`` must have been released.

        :raises BufferError: one has not.
        """
        self.view.release()
        self._map.close()


def nothing_to_persist(offset: int, length: int) -> None:
    pass


def _nothing_to_wait_for() -> None:
    pass


def _map(fd: int, size: int, name: str, volatile: bool, forced: Durability | None) -> tuple[mmap.mmap, Durability]:
    if forced is not None:
        return mmap.mmap(fd, size), forced
    try:
        return mmap.mmap(fd, size, flags=_MAP_SHARED_VALIDATE | _MAP_SYNC), Durability.PMEM
    except OSError as error:
        # EINVAL comes from kernels and file systems that do not know MAP_SHARED_VALIDATE. For a device there is
        # no weaker class.
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL) or stat.S_ISCHR(os.fstat(fd).st_mode):
            raise
    memory = memory_file_system(fd)
    if memory is None:
        return mmap.mmap(fd, size), Durability.DISK
    if not volatile:
        raise UserError(f"{name}: nothing on {memory} survives a power cut; ask for that (volatile)")
    return mmap.mmap(fd, size), Durability.RAM


class _Pmem:
    """Stores that bypass or leave the CPU caches, by libpmem."""

    __slots__ = ("_address", "_flush", "_memcpy", "_size", "drain")

    def __init__(self, mapped: mmap.mmap) -> None:
        try:
            library: Any = _ffi.dlopen(_LIBPMEM)
        except OSError as error:
            raise UserError(f"persistent memory needs {_LIBPMEM}: install the package libpmem1") from error
        with _ffi.from_buffer(mapped) as buffer:
            self._address = int(_ffi.cast("uintptr_t", buffer))
        self._size = len(mapped)
        self._memcpy: Callable[[int, Any, int, int], None] = library.pmem_memcpy
        self._flush: Callable[[int, int], None] = library.pmem_flush
        self.drain: Callable[[], None] = library.pmem_drain

    def copy(self, offset: int, data: Buffer) -> None:
        length = len(data)
        if offset < 0 or offset + length > self._size:
            raise IndexError("copy outside of the pool")
        # Non-temporal, in one pass: 0.5 µs per 4 KiB in cache, against twice that for a store and a flush.
        # cffi takes bytes as they are; anything else costs 0.4 µs more.
        source = data if type(data) is bytes else _ffi.from_buffer(data)
        self._memcpy(self._address + offset, source, length, _COPY_FLAGS)

    def persist(self, offset: int, length: int) -> None:
        self._flush(self._address + offset, length)
