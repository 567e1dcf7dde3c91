"""Whether data in the pool is what was written, and what becomes of a block whose data is not."""

from __future__ import annotations

import errno
import logging

from xxhash import xxh3_64_intdigest

from ..media.ports import Pool, SlotState
from .commit import BlockStore
from .dirtyqueue import DirtyQueue
from .files import CachedFile
from .slots import CLEAN, DIRTY, QUARANTINED, Slots

log = logging.getLogger(__name__)


class Integrity:
    """Checks of the data in slots."""

    def __init__(self, pool: Pool, slots: Slots, blocks: BlockStore, queue: DirtyQueue) -> None:
        self._pool = pool
        self._slots = slots
        self._blocks = blocks
        self._queue = queue

    def verify(self, file: CachedFile, block: int, slot: int) -> bool:
        """Check a slot's data once after a start. A bad clean block is dropped (the backing has it): False.

        :raises OSError: EIO for a bad dirty block, now and until the block is written anew (P5, H11).
        """
        slots = self._slots
        if slots.verified[slot]:
            return True
        if slots.state[slot] != QUARANTINED:
            if self.matches(slot):
                return True
            if slots.state[slot] == CLEAN:
                log.warning("clean block %d of %s failed its checksum: dropped", block, file.label)
                self._blocks.remove(file, block, slot)
                return False
            self.lose(file, block, slot)
        raise OSError(errno.EIO, "the block is lost: its data was damaged in the cache")

    def matches(self, slot: int) -> bool:
        """Whether a slot's data is what was written; it is not looked at again then."""
        good = self.intact(slot)
        if good:
            self._slots.note_verified(slot)
        return good

    def intact(self, slot: int) -> bool:
        """Whether the data of a live slot is what was written. The first look at it after a start has to be this one.

        It is read and not loaded: a load of what the media can't give ends the process. Once it has been read, its
        pages are in memory.
        """
        try:
            data = self._pool.read(slot)
        except OSError as error:
            log.error("slot %d of the pool can't be read: %s", slot, error.strerror)
            self._slots.note_suspect(slot)
            return False
        return xxh3_64_intdigest(data) == self._pool.checksum_of(slot)

    def lose(self, file: CachedFile, block: int, slot: int) -> None:
        """Quarantine a dirty block whose data is not what was written, and say so.

        It reads as EIO until it is overwritten as a whole, or cut off, or the file is unlinked.
        """
        slots, size = self._slots, self._pool.block_size
        if slots.state[slot] == DIRTY:
            file.dirty -= 1
        slots.change(slice(slot, slot + 1), SlotState.QUARANTINED)
        slots.fence()
        self._queue.dequeue_if_clean(file)
        where = f"{file.label}: bytes {block * size} to {(block + 1) * size}"
        log.error("data in the cache is damaged, the block is lost: %s", where)
        file.errors.record(errno.EIO)

    def lost(self, file: CachedFile) -> list[int]:
        """The lost blocks of a file."""
        slots = self._slots
        return [slots.block[slot] for slot in slots.quarantined() if slots.owner[slot] == file.file_id]

    def still_lost(self, file: CachedFile, block: int, slot: int, size: int, now: int) -> None:
        """Publish a version, in ``slot``, of a lost block that a truncate to ``size`` has cut: it is lost as well.

        The length in the header says how long the file was; without this a restart would find the old one.
        """
        zeros = bytes(self._pool.block_size)
        self._pool.write(slot, zeros)
        self._slots.fence()
        length = size - block * self._pool.block_size
        self._blocks.publish_one(file, block, slot, SlotState.QUARANTINED, xxh3_64_intdigest(zeros), now, length)
        self._slots.note_lost(slot)
