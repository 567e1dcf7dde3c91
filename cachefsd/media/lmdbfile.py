"""A check of an LMDB file before LMDB maps it.

LMDB trusts its file: a page number beyond the end is a SIGBUS, a node that leaves its page reads or overwrites
memory, and other things are asserted, all of which kills the process. This looks at everything that is reachable
from the meta page in force, the free list included, by ``read``. The format is that of LMDB 0.9 on a 64-bit,
little endian machine (``mdb.c``), as far as the catalog uses it: no duplicate keys, no fixed address.
"""

from __future__ import annotations

import itertools
import os
import struct
from typing import Final, NamedTuple

_MAGIC, _VERSION = 0xBEEFC0DE, 1
_BRANCH, _LEAF, _OVERFLOW, _META = 1, 2, 4, 8  # page flags
_BIG, _SUBDATA = 1, 2  # node flags
_INTEGER_KEY = 8  # of the free list's database; the only flag there is
_NONE = (1 << 64) - 1  # the root of an empty tree
_MAX_DEPTH = 32
_MAX_KEY = 511
_FIRST_PAGE = 2

_PAGE = struct.Struct("<QHHHH")  # number, -, flags, lower and upper bound of the free space
_TREE = struct.Struct("<IHH4QQ")  # page size or 0, flags, depth, four counts, root
_META_FIELDS = struct.Struct(f"<IIQQ{_TREE.size}s{_TREE.size}sQQ")  # magic, version, -, map size, trees, last, txn
_NODE = struct.Struct("<HHHH")  # two halves of a size, flags, key size; in branches three parts of a page number
_U64 = struct.Struct("<Q")


class DamagedFile(Exception):
    """What is wrong with the file, in one line."""


class _Tree(NamedTuple):
    page_size: int
    flags: int
    depth: int
    root: int

    @classmethod
    def unpack(cls, raw: bytes) -> _Tree:
        page_size, flags, depth, *_, root = _TREE.unpack(raw)
        return cls(page_size, flags, depth, root)


def check_file(fd: int) -> None:
    """Check the file, for what LMDB would die of now or when it is written to.

    :raises DamagedFile: it must not be opened.
    :raises OSError: it cannot be read.
    """
    first = _read_meta(fd, 0)
    page_size = first.free.page_size
    if page_size not in (4096, 8192, 16384, 32768):
        raise DamagedFile(f"its pages have {page_size} bytes")
    second = _read_meta(fd, page_size)
    _Check(fd, page_size, first, second).run()


class _MetaPage(NamedTuple):
    map_size: int
    free: _Tree
    main: _Tree
    last_page: int
    txn: int


def _read_meta(fd: int, offset: int) -> _MetaPage:
    raw = os.pread(fd, _PAGE.size + _META_FIELDS.size, offset)
    if len(raw) < _PAGE.size + _META_FIELDS.size:
        raise DamagedFile("it is too short")
    _, _, flags, _, _ = _PAGE.unpack_from(raw)
    magic, version, _, map_size, free, main, last_page, txn = _META_FIELDS.unpack_from(raw, _PAGE.size)
    if flags != _META or magic != _MAGIC or version != _VERSION:
        raise DamagedFile("it is no LMDB file of the version that is used here, or its first pages are damaged")
    return _MetaPage(map_size, _Tree.unpack(free), _Tree.unpack(main), last_page, txn)


class _Check:
    def __init__(self, fd: int, page_size: int, first: _MetaPage, second: _MetaPage) -> None:
        self._fd: Final = fd
        self._page_size: Final = page_size
        self._node_max: Final = ((page_size - _PAGE.size) // 2 & ~1) - 2
        self._meta: Final = second if second.txn > first.txn else first
        self._metas: Final = (first, second)
        self._pages_in_file: Final = os.fstat(fd).st_size // page_size
        self._seen = bytearray()

    def run(self) -> None:
        meta = self._meta
        for index, each in enumerate(self._metas):
            if each.free.page_size != self._page_size or each.free.flags != _INTEGER_KEY or each.main.flags:
                raise DamagedFile("a meta page has impossible settings")
            # Transactions write the two in turn; LMDB finds the one in force by whether its number is odd.
            if each.txn and each.txn & 1 != index:
                raise DamagedFile("its meta pages are exchanged")
        if not 1 <= meta.last_page < meta.map_size // self._page_size:
            raise DamagedFile("its last page is beyond the end of its map")
        if meta.last_page - self._pages_in_file > 1 << 24:  # never written: pages of one transaction, at most
            raise DamagedFile("its last page is far beyond its end")
        self._seen = bytearray(meta.last_page + 1)
        for value in self._walk(meta.main, named=True):
            tree = _Tree.unpack(value)
            if tree.flags:
                raise DamagedFile("a database has flags that the catalog does not use")
            self._walk(tree)
        for value in self._walk(meta.free, is_free_list=True):
            self._check_free(value)

    def _walk(self, tree: _Tree, *, named: bool = False, is_free_list: bool = False) -> list[bytes]:
        """Check a tree; the values of its nodes, where its kind makes them matter."""
        values: list[bytes] = []
        if tree.root == _NONE:
            return values
        if not 1 <= tree.depth <= _MAX_DEPTH:
            raise DamagedFile(f"a tree has a depth of {tree.depth}")
        # Page, depth, and the range in which its keys are: from the first one on, to before the second one.
        stack: list[tuple[int, int, bytes, bytes | None]] = [(tree.root, 1, b"", None)]
        while stack:
            number, depth, low, high = stack.pop()
            is_leaf = depth == tree.depth
            page = self._page(number, _LEAF if is_leaf else _BRANCH)
            nodes = self._nodes(page, is_leaf)
            if not is_leaf and len(nodes) < 2 and not is_free_list:
                raise DamagedFile("a branch has a single child")
            keys = [self._key(page, at, size, is_free_list) for at, size, _, _ in nodes]
            if not is_leaf:
                keys[0] = low  # it has none of its own
            if any(a >= b for a, b in itertools.pairwise(keys)):
                raise DamagedFile("keys of a page are out of order")
            if keys[0] < low or (high is not None and keys[-1] >= high):
                raise DamagedFile("keys are in a page where nobody looks for them")
            for index, (at, key_size, flags, value) in enumerate(nodes):
                if is_leaf:
                    found = self._value(page, at + _NODE.size + key_size, flags, value, named)
                    if named or is_free_list:
                        values.append(found)
                else:
                    stack.append((value, depth + 1, keys[index], keys[index + 1] if index + 1 < len(keys) else high))
        return values

    def _page(self, number: int, kind: int) -> bytes:
        self._use(number)
        page = self._read(number, self._page_size)
        if _PAGE.unpack_from(page)[0] != number or _PAGE.unpack_from(page)[2] != kind:
            raise DamagedFile(f"page {number} is not what a page above says")
        return page

    def _use(self, number: int) -> None:
        """Note that a page is used, once."""
        if not _FIRST_PAGE <= number <= self._meta.last_page:
            raise DamagedFile("it refers to a page that it does not have")
        if self._seen[number]:
            raise DamagedFile(f"page {number} is used twice")
        self._seen[number] = 1

    def _read(self, number: int, size: int) -> bytes:
        data = b""
        if number < self._pages_in_file:
            data = os.pread(self._fd, size, number * self._page_size)
        if len(data) < size:
            raise DamagedFile("it ends before its last page")
        return data

    def _nodes(self, page: bytes, is_leaf: bool) -> list[tuple[int, int, int, int]]:
        """(offset, key size, flags, size of the value or number of the child) of each node of a page."""
        *_, lower, upper = _PAGE.unpack_from(page)
        if not _PAGE.size < lower <= upper <= len(page) or lower & 1 or upper & 1:
            raise DamagedFile("the bounds of a page are impossible")
        nodes, places = [], []
        for (at,) in struct.iter_unpack("<H", page[_PAGE.size : lower]):
            if at & 1 or not upper <= at <= len(page) - _NODE.size:
                raise DamagedFile("a node is outside of its page")
            low, high, flags, key_size = _NODE.unpack_from(page, at)
            value = low | high << 16
            size = _NODE.size + key_size
            if is_leaf:
                size += _U64.size if flags & _BIG else value
                if size > self._node_max:
                    raise DamagedFile("a node is too large for a page")
                nodes.append((at, key_size, flags, value))
            else:
                nodes.append((at, key_size, 0, value | flags << 32))
            places.append((at, at + size + (size & 1)))
        places.sort()
        if places[-1][1] > len(page) or any(a[1] > b[0] for a, b in itertools.pairwise(places)):
            raise DamagedFile("the nodes of a page overlap or leave it")
        return nodes

    def _key(self, page: bytes, at: int, size: int, is_free_list: bool) -> bytes:
        key = page[at + _NODE.size :][:size]
        if is_free_list:
            if size not in (0, _U64.size):
                raise DamagedFile("a key of the free list is no transaction")
            return key[::-1]  # so that bytes compare as the numbers do
        if size > _MAX_KEY:
            raise DamagedFile("a key is too long")
        return key

    def _value(self, page: bytes, at: int, flags: int, size: int, named: bool) -> bytes:
        if flags not in (0, _BIG, _SUBDATA) or (flags == _SUBDATA) != named or (named and size != _TREE.size):
            raise DamagedFile("a node is of a kind that the catalog does not use")
        if flags != _BIG:
            return page[at : at + size]
        number = _U64.unpack_from(page, at)[0]
        self._use(number)
        start = self._read(number, _PAGE.size)
        found, _, kind, low, high = _PAGE.unpack(start)
        count = low | high << 16
        if found != number or kind != _OVERFLOW or count * self._page_size < _PAGE.size + size:
            raise DamagedFile("a long value is not where it should be")
        if number + count - 1 > self._meta.last_page:
            raise DamagedFile("a long value is beyond the last page")
        for following in range(number + 1, number + count):
            self._use(following)
        return self._read(number, _PAGE.size + size)[_PAGE.size :]

    def _check_free(self, value: bytes) -> None:
        """A list of free pages: how many, and their numbers, descending."""
        if len(value) < _U64.size or len(value) % _U64.size:
            raise DamagedFile("a list of free pages has an impossible length")
        count, *numbers = struct.unpack(f"<{len(value) // _U64.size}Q", value)
        if count > len(numbers):
            raise DamagedFile("a list of free pages is longer than its record")
        numbers = numbers[:count]
        if any(a <= b for a, b in itertools.pairwise(numbers)):
            raise DamagedFile("a list of free pages is out of order")
        for number in numbers:
            self._use(number)
