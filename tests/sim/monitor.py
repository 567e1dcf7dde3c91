"""The ordering rules O1 to O11 of docs/design.md, checked on a record directly: no crash is needed to see one broken.

For class ``pmem``, where a fence orders. The monitor knows the layout of headers, and nothing of the engine.
"""

from __future__ import annotations

import struct

from xxhash import xxh3_64_intdigest

from cachefsd.core.slots import NOBODY
from cachefsd.media.header import HEADER_SIZE
from cachefsd.media.ports import SlotState
from cachefsd.media.records import decode_record
from sim import log as events
from sim.crash import Image, Media
from sim.log import Event
from sim.media import BLOCK, LINE
from sim.oracle import WORD, Violation, tell
from sim.world import Setting, Trace

_STATES = {int(state) * 0x55: state for state in SlotState}


class Monitor:
    """Follows a record and raises :class:`Violation` at the first event that breaks a rule."""

    def __init__(self, image: Image, setting: Setting) -> None:
        self.media = Media(image, setting.durability, fsync_takes_names=setting.fsync_takes_names)
        self._live = bytearray(image.pool.content)
        """The pool as the program sees it."""
        self._data = setting.slots * HEADER_SIZE
        self._slots = setting.slots
        self._opened = False
        self._number = 0

    def follow(self, event: Event) -> None:
        """Check an event, and take it up."""
        kind, first, second = event
        if kind == events.STORE:
            self._store(first, second)
            self._live[first : first + len(second)] = second
        elif kind == events.SUPERBLOCK:
            self._superblock(first)
            if second.clean:
                self._require(not self.media.lines.pending, "O8", "the clean flag is set over what is still on its way")
            else:
                self._opened = True
        elif kind == events.ACK:
            self._acknowledge()
        self.media.follow(self._number, event)
        self._number += 1

    def _superblock(self, target: int) -> None:
        """While one copy is being written, the other one must be the newest."""
        overwritten, kept = self.media.superblocks[target], self.media.superblocks[1 - target]
        self._require(
            kept is not None and (overwritten is None or overwritten.generation < kept.generation),
            "H12",
            "the superblock in force is overwritten",
        )

    def _require(self, condition: bool, rule: str, text: str) -> None:
        if not condition:
            raise Violation(f"{rule}: {text} (event {self._number})")

    def _header(self, slot: int, content: bytes | bytearray) -> tuple[SlotState, int, int, int, int]:
        """State, seq, file id, block and checksum."""
        w0, seq, file_id, block, checksum = struct.unpack_from("<5Q", content, slot * HEADER_SIZE)
        return _STATES.get(w0 >> 56, SlotState.QUARANTINED), seq, file_id, block, checksum

    def _coming(self, offset: int, length: int) -> bool:
        """Whether some of these bytes have not arrived yet."""
        lines = range(offset // LINE, (offset + length + LINE - 1) // LINE)
        return any(line in self.media.lines.pending for line in lines)

    def _store(self, offset: int, data: bytes) -> None:
        self._require(self._opened, "O8", "a store before the clean flag has been cleared")
        if offset >= self._data:
            slot = (offset - self._data) // BLOCK
            for each in range(slot, slot + (len(data) + BLOCK - 1) // BLOCK):
                self._require_free(each, "data is stored into")
        elif offset % HEADER_SIZE:
            self._require_free(offset // HEADER_SIZE, "a header body is stored into")
        else:
            self._state_word(offset // HEADER_SIZE, _STATES.get(data[7], SlotState.QUARANTINED))

    def _require_free(self, slot: int, what: str) -> None:
        state = self._header(slot, self.media.lines.arrived)[0]
        live = self._header(slot, self._live)[0]
        self._require(
            state is SlotState.FREE and live is SlotState.FREE, "O4", f"{what} slot {slot}, which is not durably free"
        )

    def _state_word(self, slot: int, new: SlotState) -> None:
        old, seq, file_id, block, checksum = self._header(slot, self._live)
        set_aside = new is SlotState.QUARANTINED and file_id == NOBODY  # it holds nothing
        if old is SlotState.FREE and new is not SlotState.FREE and not set_aside:
            at = self._data + slot * BLOCK
            self._require(not self._coming(at, BLOCK), "O1", f"the header of slot {slot} comes before its data")
            stored = xxh3_64_intdigest(self._live[at : at + BLOCK])
            self._require(stored == checksum, "O1", f"slot {slot} is published with other data than its checksum says")
            self._require(file_id in self.media.catalog.files, "O6", f"no record of file {file_id} is durable")
        if new is SlotState.FREE and old is not SlotState.FREE:
            for other in range(self._slots):
                self._retired(slot, other, seq, file_id, block)
        if old is SlotState.DIRTY and new is SlotState.CLEAN:
            self._cleaned(slot, file_id, block)

    def _retired(self, slot: int, other: int, seq: int, file_id: int, block: int) -> None:
        """``slot`` becomes free: what about another one of the same block?"""
        state, its_seq, its_file, its_block, _ = self._header(other, self._live)
        if other == slot or (its_file, its_block) != (file_id, block):
            return
        if its_seq > seq and state is not SlotState.FREE:
            self._require(
                not self._coming(other * HEADER_SIZE, HEADER_SIZE),
                "O3",
                f"slot {slot} is freed before its successor's header has arrived",
            )
        arrived = self._header(other, self.media.lines.arrived)
        if arrived[1:4] == (its_seq, file_id, block) and its_seq < seq:
            self._require(
                arrived[0] is SlotState.FREE, "O11", f"slot {slot} is freed while its predecessor may come back"
            )

    def _cleaned(self, slot: int, file_id: int, block: int) -> None:
        record = self.media.catalog.files.get(file_id)
        self._require(record is not None, "O6", f"file {file_id} has no record")
        assert record is not None
        inode = self.media.disk.inodes.get(int(decode_record(file_id, record).handle))
        self._require(inode is not None, "O5", f"file {file_id} is not durable, and slot {slot} becomes clean")
        assert inode is not None
        durable = inode.content[block * BLOCK : (block + 1) * BLOCK]
        at = self._data + slot * BLOCK
        data = bytes(self._live[at : at + BLOCK])
        self._require(
            data.startswith(durable) and not data[len(durable) :].strip(b"\0"),
            "O5",
            f"slot {slot} becomes clean before a sync of the backing",
        )

    def _acknowledge(self) -> None:
        headers = [line for line in self.media.lines.pending if line < self._slots]
        for slot in headers:
            if (
                self._header(slot, self._live)[0] is SlotState.DIRTY
                and self._header(slot, self.media.lines.arrived)[0] is SlotState.FREE
            ):
                self._require(False, "O2", f"acknowledged before the header of slot {slot} has arrived")


def check_backing(trace: Trace) -> None:
    """Nothing reaches a file of the backing that was not written to this file, at this place, and is durable in the
    pool: where the backing is ahead, an older version wins after a crash, and its users have seen the newer one.

    :raises Violation:
    """
    setting = trace.setting
    media = Media(trace.image, setting.durability, fsync_takes_names=setting.fsync_takes_names)
    tokens = {file.ino: file.token for _, model in trace.oracle.history for file in model.values()}
    for number, event in enumerate(trace.log.events):
        kind, operation, _ = event
        if kind == events.BACKING and operation[0] == "data" and operation[1] in tokens:
            _, ino, offset, data = operation
            what = f"file {tokens[ino]} of the backing gets {tell(data)} at {offset} (event {number})"
            for at in range(0, len(data) - 7, 8):
                token, _, place = WORD.unpack_from(data, at)
                if token not in (0, tokens[ino]) or (token and place != (offset + at) // 8):
                    raise Violation(f"{what}, which is not its own")
            if not _in_pool(media.lines.arrived, setting.slots, offset // BLOCK, data):
                raise Violation(f"{what}, which is not durable in the pool")
        media.follow(number, event)


def _in_pool(content: bytes | bytearray, slots: int, block: int, data: bytes) -> bool:
    """Whether some slot is, or was the last time it was used, that of a block with this number that begins so."""
    for slot in range(slots):
        at = slots * HEADER_SIZE + slot * BLOCK
        if content[at : at + len(data)] == data:
            (its_block,) = struct.unpack_from("<Q", content, slot * HEADER_SIZE + 24)
            if its_block == block:
                return True
    return False


def check_order(trace: Trace) -> None:
    """:raises Violation: a rule is broken somewhere in the record."""
    monitor = Monitor(trace.image, trace.setting)
    for event in trace.log.events:
        monitor.follow(event)
