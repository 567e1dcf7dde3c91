"""What a crash leaves: from a prefix of the record to the images of media that recovery may find.

:class:`Media` follows the record event by event and knows what has arrived for certain and what is still on its way;
:meth:`Media.images` enumerates the interesting choices of what has become of the latter. The models:

* pool, classes ``pmem`` and ``disk``: of the stores that no fence (sync) has covered per 64-byte line any prefix, as
  x86 has it, or any subset of its 8-byte words, which is all that the instruction set promises of a single store;
* pool, class ``disk``, also: any subset of the sectors, each as it was at some moment since the last sync: the kernel
  writes pages back whenever it likes. A sector holds eight headers or, scaled as blocks are, half a block;
* a superblock that is being written: the old copy, the new one, or none that is intact;
* backing: nothing, all, a prefix, or any subset of what no sync has covered; size and times apart from data.
"""

from __future__ import annotations

import bisect
import hashlib
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.ports import Durability
from cachefsd.media.superblock import Superblock
from sim import log as events
from sim.backing import FsState, apply
from sim.log import Event
from sim.media import LINE, CatalogState, PoolImage

EXHAUSTIVE_HEADER_CHOICES = 64
"""Up to so many combinations of what became of the headers on their way are all tried."""
SECTOR = 512

Arrived = Mapping[int, int | Sequence[int]]
"""What of the stores on their way has arrived: by line the first so many, or those with these indices, ascending; of
other lines none."""


class Image(NamedTuple):
    """Everything that outlives a crash."""

    pool: PoolImage
    catalog: CatalogState
    fs: FsState
    torn: int = 0
    """Headers of which the commit word has arrived before the rest. Stores to one line do not do that on x86, and
    docs/format.md relies on it. Where they did, the slot is set aside and reported, and nothing else may happen."""

    def digest(self) -> bytes:
        """Equal for images that recovery cannot tell apart, and of which the same is asked."""
        text = repr((self.pool.superblocks, self.catalog.key(), self.fs.key(), self.torn)).encode()
        text += repr(sorted(self.pool.unreadable)).encode()
        return hashlib.blake2b(text + self.pool.content, digest_size=12).digest()


Words = list[tuple[int, bytes]]


class _Lines:
    """The lines of the pool: what has arrived, and the stores on their way."""

    def __init__(self, content: bytes, durability: Durability) -> None:
        self.arrived = bytearray(content)
        self.pending: dict[int, Words] = {}
        """line → its stores since, word by word, in order"""
        self._flushed: dict[int, int] = {}
        self._marks: dict[int, list[int]] = {}
        self._disk = durability is Durability.DISK
        self._at_once = durability is Durability.RAM

    def store(self, number: int, offset: int, data: bytes) -> None:
        if self._at_once:
            self.arrived[offset : offset + len(data)] = data
            return
        for at in range(0, len(data), 8):
            line = (offset + at) // LINE
            self.pending.setdefault(line, []).append((offset + at, data[at : at + 8]))
            if self._disk:
                self._marks.setdefault(line, []).append(number)

    def flush(self, offset: int, length: int) -> None:
        for line in range(offset // LINE, (offset + length + LINE - 1) // LINE):
            if line in self.pending:
                self._flushed[line] = len(self.pending[line])

    def fence(self) -> None:
        if self._disk:
            return
        for line, count in self._flushed.items():
            self._arrive(line, count)
        self._flushed.clear()

    def sync(self, mark: int) -> None:
        for line in list(self.pending):
            marks = self._marks[line]
            count = sum(number < mark for number in marks)
            del marks[:count]
            self._arrive(line, count)

    def _arrive(self, line: int, count: int) -> None:
        words = self.pending[line]
        for offset, word in words[:count]:
            self.arrived[offset : offset + 8] = word
        del words[:count]
        if not words:
            del self.pending[line]
            self._marks.pop(line, None)

    def with_some(self, arrived: Arrived) -> bytearray:
        """The pool if of the stores on their way these have arrived."""
        content = bytearray(self.arrived)
        for line, chosen in arrived.items():
            words = self.pending[line]
            for offset, word in words[:chosen] if isinstance(chosen, int) else (words[index] for index in chosen):
                content[offset : offset + 8] = word
        return content

    def numbers(self, line: int) -> Sequence[int]:
        """Class ``disk``: the events of the stores on their way to a line."""
        return self._marks[line]

    def before(self, line: int, number: int) -> int:
        """Class ``disk``: how many of the stores on their way to a line were made before this event."""
        return bisect.bisect_left(self._marks[line], number)


@dataclass
class _Pending:
    """An operation of the backing that no sync has covered."""

    number: int
    operation: tuple[Any, ...]


_NAMESPACE = ("create", "unlink", "rename")


class Disk:
    """The backing: what has arrived, and the operations on their way, in order."""

    def __init__(self, state: FsState, *, fsync_takes_names: bool) -> None:
        self.names = dict(state.names)
        self.inodes = dict(state.inodes)
        self.next_ino, self.clock = state.next_ino, state.clock
        self.pending: list[_Pending] = []
        self._fsync_takes_names = fsync_takes_names

    def do(self, number: int, operation: tuple[Any, ...]) -> None:
        kind = operation[0]
        if kind == "sync":
            _, ino, mark = operation
            takes_names = self._fsync_takes_names
            # Names arrive all or not at all: one of them alone might be built on others that have not.
            self._arrive(
                lambda p: p.number < mark and (takes_names if p.operation[0] in _NAMESPACE else _inode_of(p) == ino),
                ino,
            )
        elif kind == "sync_failed":
            self._lose(*operation[1:])
        elif kind == "sync_names":
            self._arrive(lambda p: p.number < operation[1] and p.operation[0] in _NAMESPACE)
        elif kind == "sync_all":
            self._arrive(lambda p: p.number < operation[1])
        else:
            if kind == "create":
                self.next_ino = max(self.next_ino, operation[2] + 1)
            self.clock += 1
            self.pending.append(_Pending(number, operation))

    def _arrive(self, covered: Callable[[_Pending], bool], ino: int = 0) -> None:
        rest = []
        if ino and ino not in self.inodes:
            # The inode itself is durable now, with or without a name.
            created = next((p for p in self.pending if p.operation[0] == "create" and p.operation[2] == ino), None)
            if created is not None:
                self.inodes[ino] = created.operation[3]
        for entry in self.pending:
            if covered(entry):
                apply(self.inodes, self.names, entry.operation)
            else:
                rest.append(entry)
        self.pending = rest

    def seen(self, ino: int) -> bytes:
        """The content that programs see: what has arrived, and what is on its way."""
        inodes, names = dict(self.inodes), dict(self.names)
        for entry in self.pending:
            apply(inodes, names, entry.operation)
        return inodes[ino].content

    def _lose(self, ino: int, mark: int, seed: int) -> None:
        """A sync of the file has failed. Of the data before it some has arrived, and the rest counts as clean and never
        will; sizes and times are in the journal, and still on their way."""
        rng = random.Random(seed)
        rest = []
        for entry in self.pending:
            if entry.number < mark and entry.operation[0] == "data" and _inode_of(entry) == ino:
                if rng.random() < 0.5:
                    apply(self.inodes, self.names, entry.operation)
            else:
                rest.append(entry)
        self.pending = rest

    def with_some(self, kept: Sequence[bool]) -> FsState:
        """The file system if of the operations on their way these have arrived; inodes without names are gone."""
        names, inodes = dict(self.names), dict(self.inodes)
        for entry, keep in zip(self.pending, kept, strict=True):
            if keep:
                apply(inodes, names, entry.operation)
        used = set(names.values())
        return FsState(
            names,
            {ino: inode for ino, inode in inodes.items() if ino in used},
            self.next_ino + 100,  # never that of a file whose creation is lost
            self.clock + len(self.pending) + 1,
        )


def _inode_of(entry: _Pending) -> int:
    operation = entry.operation
    kind = operation[0]
    if kind == "rename":
        return int(operation[3])
    return int(operation[2] if kind in _NAMESPACE else operation[1])


class Media:
    """Follows a record: what has arrived, and what is on its way."""

    def __init__(self, image: Image, durability: Durability, *, fsync_takes_names: bool = False) -> None:
        self.durability = durability
        self.lines = _Lines(image.pool.content, durability)
        self.superblocks: list[Superblock | None] = list(image.pool.superblocks)
        self._coming: tuple[int, Superblock] | None = None
        self.catalog = image.catalog
        self._torn = image.torn
        self._unreadable = image.pool.unreadable
        self.disk = Disk(image.fs, fsync_takes_names=fsync_takes_names)
        self._header_lines = len(image.pool.content) * HEADER_SIZE // (HEADER_SIZE + 2 * LINE) // LINE

    def follow(self, number: int, event: Event) -> None:
        """Take up the next event."""
        kind, first, second = event
        if self._coming is not None:
            index, new = self._coming
            self.superblocks[index] = new
            self._coming = None
        if kind == events.STORE:
            self.lines.store(number, first, second)
        elif kind == events.FLUSH:
            self.lines.flush(first, second)
        elif kind == events.FENCE:
            self.lines.fence()
        elif kind == events.SYNC:
            self.lines.sync(first)
        elif kind == events.SUPERBLOCK:
            self._coming = first, second
        elif kind == events.CATALOG:
            self.catalog = first
        elif kind == events.BACKING:
            self.disk.do(number, first)

    @property
    def superblock_coming(self) -> bool:
        """Whether one is being written."""
        return self._coming is not None

    # ---- images

    def image(self, arrived: Arrived, kept: Sequence[bool], superblock: int = 0) -> Image:
        """One image. ``superblock``: of one that is being written 0 the old, 1 the new, 2 neither is there."""
        copies = list(self.superblocks)
        if self._coming is not None and superblock:
            index, new = self._coming
            copies[index] = new if superblock == 1 else None
        pool = PoolImage((copies[0], copies[1]), bytes(self.lines.with_some(arrived)), self._unreadable)
        return Image(pool, self.catalog, self.disk.with_some(kept), self._torn + self._count_torn(arrived))

    def _count_torn(self, arrived: Arrived) -> int:
        """Headers whose commit word has arrived without a store that was made before it."""
        torn = 0
        for line, chosen in arrived.items():
            if line < self._header_lines and not isinstance(chosen, int):
                words, kept = self.lines.pending[line], set(chosen)
                last = max((index for index in kept if words[index][0] % HEADER_SIZE == 0), default=0)
                torn += any(index not in kept and words[index][0] % HEADER_SIZE for index in range(last))
        return torn

    def images(self, rng: random.Random, samples: int = 2) -> Iterator[Image]:
        """Interesting images at this point: the headers on their way in every combination as far as these are few, data
        whole, absent or torn, words and sectors at random, and of the backing nothing, all, a prefix, and subsets at
        random."""
        count = len(self.disk.pending)
        backings = [[False] * count]
        if count:
            cut = rng.randint(0, count)
            backings += [[True] * count, [index < cut for index in range(count)]]
            backings += [[rng.random() < 0.5 for _ in range(count)] for _ in range(samples)]
        pools = list(self._pools(rng, samples))
        superblocks = (0, 1, 2) if self._coming is not None else (0,)
        # Not every pool with every backing: each of both at least once, and some pairs at random.
        longest = max(len(pools), len(backings))
        rng.shuffle(pools)
        for index in range(longest):
            for superblock in superblocks:
                yield self.image(pools[index % len(pools)], backings[index % len(backings)], superblock)

    def _pools(self, rng: random.Random, samples: int) -> Iterator[Arrived]:
        pending = self.lines.pending
        everything = {line: len(words) for line, words in pending.items()}
        yield {}
        if not pending:
            return
        yield everything
        headers = [line for line in pending if line < self._header_lines]
        data = [line for line in pending if line >= self._header_lines]
        combinations = 1
        for line in headers:
            combinations *= len(pending[line]) + 1
        if combinations <= EXHAUSTIVE_HEADER_CHOICES:
            for choice in itertools.product(*(range(len(pending[line]) + 1) for line in headers)):
                yield dict(zip(headers, choice, strict=True)) | {line: everything[line] for line in data}
        for line in everything:
            yield {line: everything[line]}  # alone
            yield {other: n for other, n in everything.items() if other != line}  # all but this one
        for _ in range(samples):
            yield {line: rng.randint(0, most) for line, most in everything.items()}
            yield {line: _subset(rng, most) for line, most in everything.items()}
            if self.durability is Durability.DISK:
                yield self._sectors(rng)
        for line in headers:
            # In class disk a page is copied line by line, and so many headers are on their way that a few will do.
            if len(pending[line]) > 1 and self.durability is not Durability.DISK:
                for words in self.header_words(line, rng, samples):
                    yield everything | {line: words}

    def header_words(self, line: int, rng: random.Random, samples: int) -> Iterator[Sequence[int]]:
        """Subsets of the words on their way to a header: its commit word against the others."""
        count = len(self.lines.pending[line])
        yield (count - 1,)
        for _ in range(samples):
            yield _subset(rng, count - 1)
            yield (*_subset(rng, count - 1), count - 1)

    def _sectors(self, rng: random.Random) -> Arrived:
        """Class ``disk``: each sector as it was at some moment since the last sync."""
        lines = self.lines
        numbers = sorted({number for line in lines.pending for number in lines.numbers(line)})
        moments: dict[int, int] = {}
        arrived: dict[int, int] = {}
        for line in lines.pending:
            sector = line * LINE // SECTOR if line < self._header_lines else -line
            moment = moments.setdefault(sector, rng.choice((0, rng.choice(numbers), numbers[-1] + 1)))
            arrived[line] = lines.before(line, moment)
        return arrived


def _subset(rng: random.Random, count: int) -> Sequence[int]:
    return [index for index in range(count) if rng.random() < 0.5]
