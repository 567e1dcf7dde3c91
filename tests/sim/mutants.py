"""Seeded faults: each breaks one invariant in one small way, and the simulator has to notice.

A fault is an edit of the source of ``cachefsd``: the functions that it touches are compiled anew and exchanged while it
is in force, so production code has no switches for it. An edit whose text is not there exactly once is refused: when
the code moves on, so must its row here.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any, NamedTuple

Edit = tuple[str, str]
"""(text that is there exactly once, what stands there instead)"""


class Mutant(NamedTuple):
    """One seeded fault."""

    name: str
    breaks: str
    """the rules O of docs/design.md §6, promises P of its §2, or what else must hold"""
    module: str
    """a path within ``cachefsd``"""
    edits: tuple[Edit, ...]
    killer: str
    """the scenario that notices, see sim/scenarios.py"""


class StaleMutant(Exception):
    """An edit does not fit the source any more."""


def _codes(code: CodeType) -> Iterator[CodeType]:
    """All code objects in ``code``."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _codes(constant)


def _functions(tree: ast.Module) -> Iterator[tuple[str, int, int]]:
    """Functions of the module and of its classes: (qualified name, first line, last line)."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) else [node]
        for member in members:
            if isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef):
                prefix = f"{node.name}." if isinstance(node, ast.ClassDef) else ""
                yield prefix + member.name, member.lineno, member.end_lineno or member.lineno


def _find(module: ModuleType, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = getattr(found, part)
    if isinstance(found, property):
        found = found.fget
    found = getattr(found, "__wrapped__", found)
    assert isinstance(found, FunctionType), name
    return found


def _mutated(module: ModuleType, edits: tuple[Edit, ...]) -> dict[FunctionType, CodeType]:
    """The functions that the edits touch, and their new code.

    :raises StaleMutant:
    """
    assert module.__file__ is not None
    source = changed = Path(module.__file__).read_text()
    functions = list(_functions(ast.parse(source)))
    touched: set[str] = set()
    for old, new in edits:
        if source.count(old) != 1:
            raise StaleMutant(f"{module.__name__} has this text {source.count(old)} times, not once: {old!r}")
        first = source[: source.index(old)].count("\n") + 1
        last = first + old.rstrip("\n").count("\n")
        names = [name for name, start, end in functions if start <= first and last <= end]
        if len(names) != 1:
            raise StaleMutant(f"{module.__name__}: not within one function: {old!r}")
        touched.update(names)
        changed = changed.replace(old, new)
    codes = {code.co_qualname: code for code in _codes(compile(changed, module.__file__, "exec", dont_inherit=True))}
    return {_find(module, name): codes[name] for name in touched}


@contextmanager
def seeded(mutant: Mutant) -> Iterator[None]:
    """The fault is in force.

    :raises StaleMutant: the edits do not fit the source.
    """
    module = importlib.import_module("cachefsd." + mutant.module.removesuffix(".py").replace("/", "."))
    changed = _mutated(module, mutant.edits)
    originals = {function: function.__code__ for function in changed}
    try:
        for function, code in changed.items():
            function.__code__ = code
        yield
    finally:
        for function, code in originals.items():
            function.__code__ = code


COMMIT, SLOTS, ENGINE, FETCH = "core/commit.py", "core/slots.py", "core/engine.py", "core/fetch.py"
FILES, FILETABLE, RECORDS, INTEGRITY = "core/files.py", "core/filetable.py", "core/records.py", "core/integrity.py"
ATTRIBUTES, GROUPS, STEPS = "core/attributes.py", "core/groups.py", "core/steps.py"
RECOVERY, UPKEEP, STAMPS, SETTLE = "core/recovery.py", "core/upkeep.py", "core/stamps.py", "core/settle.py"
WRITEBACK = "core/writeback.py"
DORMANT, ANALYSIS, PASSES = "core/dormant.py", "core/analysis.py", "core/passes.py"
WRITING = "core/writing.py"
RESOLVER = "core/resolver.py"
POOL, SUPERBLOCK, POOLFILE = "media/pool.py", "media/superblock.py", "media/poolfile.py"

_FENCE_A = "        self._slots.fence()  # A: data before header (O1); also what was retired before becomes reusable\n"
_FENCE_B = "            pool.fence()  # B: headers before acknowledgement (O2) and before the predecessors' FREE (O3)\n"
_FENCE_ONE = "        pool.fence()  # B: header before acknowledgement (O2) and before the predecessor's FREE (O3)\n"
_FENCE_MANY = "            pool.fence()  # B\n"
_INSTALL = """\
            for block, slot in enumerate(slots, first):
                self._install(file, block, slot, state)
"""
_INSTALL_ONE = "        return self._install(file, block, slot, state)\n"
_INSTALL_MANY = "            self._install_run(file, first, slots, state)\n"
_SYNC_FAILED_MEANWHILE = """\
            if file.backing.sync_failures != part.failures_before:
                raise OSError(errno.EIO, "a sync of the file failed meanwhile")
"""

MUTANTS: tuple[Mutant, ...] = (
    # -- the commit protocol
    Mutant(
        "headers are stored without a fence after the data",
        "O1",
        COMMIT,
        ((_FENCE_A, ""),),
        "overwrites",
    ),
    Mutant("a write is acknowledged without a fence after its header", "O2", COMMIT, ((_FENCE_B, ""),), "overwrites"),
    Mutant(
        "the header of a single block is stored without a fence after its data",
        "O1",
        COMMIT,
        (("        self._slots.fence()  # A\n", ""),),
        "overwrites",
    ),
    Mutant(
        "a single block is acknowledged without a fence after its header",
        "O2",
        COMMIT,
        ((_FENCE_ONE, ""),),
        "overwrites",
    ),
    Mutant(
        "many blocks are acknowledged without a fence after their headers",
        "O2",
        COMMIT,
        ((_FENCE_MANY, ""),),
        "overwrites, at once",
    ),
    Mutant(
        "the old version is freed before the fence after the new header",
        "O3",
        COMMIT,
        ((_FENCE_B + _INSTALL, _INSTALL + _FENCE_B),),
        "overwrites",
    ),
    Mutant(
        "the old version of a single block is freed before the fence after the new header",
        "O3",
        COMMIT,
        (
            (
                _FENCE_ONE + _INSTALL_ONE,
                _INSTALL_ONE.replace("return", "replaced =") + _FENCE_ONE + "        return replaced\n",
            ),
        ),
        "overwrites",
    ),
    Mutant(
        "the old version is freed before the new header is stored",
        "O3",
        COMMIT,
        (
            (
                "        self.next_seq = seq + 1\n",
                "        self.next_seq = seq + 1\n"
                "        if (old := file.table.get(block)) >= 0:\n"
                "            pool.set_state(old, SlotState.FREE)\n",
            ),
        ),
        "overwrites",
    ),
    Mutant(
        "a slot is used again before its FREE is fenced",
        "O4",
        SLOTS,
        (
            (
                "        self._pool.set_state(slot, SlotState.FREE)\n        self.retired.append(slot)\n",
                "        self._pool.set_state(slot, SlotState.FREE)\n        self._release(array('i', [slot]))\n",
            ),
        ),
        "overwrites",
    ),
    Mutant(
        "FREE is stored and never persisted",
        "O4",
        POOL,
        (("        self._persist(self._header_offset + slot * HEADER_SIZE, 8)\n", ""),),
        "overwrites",
    ),
    Mutant(
        "the state of a header is stored before the rest of it",
        "O1",
        POOL,
        (
            (
                "        self._header_bytes[offset + 8 : offset + HEADER_SIZE] = body\n"
                "        self._words[slot * WORDS_PER_HEADER] = state_word\n",
                "        self._words[slot * WORDS_PER_HEADER] = state_word\n"
                "        self._header_bytes[offset + 8 : offset + HEADER_SIZE] = body\n",
            ),
        ),
        "overwrites",
    ),
    Mutant(
        "a new header is stored and not persisted",
        "O2",
        POOL,
        (("        self._persist(self._header_offset + offset, HEADER_SIZE)\n", ""),),
        "overwrites",
    ),
    # -- the same for many blocks at once
    Mutant(
        "many old versions are freed before the fence after the new headers",
        "O3",
        COMMIT,
        ((_FENCE_MANY + _INSTALL_MANY, _INSTALL_MANY + _FENCE_MANY),),
        "overwrites, at once",
    ),
    Mutant(
        "many slots are used again before their FREE is fenced",
        "O4",
        SLOTS,
        (
            (
                "        self.retired.frombytes(numbers_of(places, np.int32).tobytes())\n",
                '        self._release(array("i", numbers_of(places, np.int32).tobytes()))\n',
            ),
        ),
        "overwrites, at once",
    ),
    Mutant(
        "many FREE are stored and never persisted",
        "O4",
        POOL,
        (
            (
                "self._headers[places, 0], slots)\n        self._persist_headers(places)\n",
                "self._headers[places, 0], slots)\n",
            ),
        ),
        "overwrites, at once",
    ),
    Mutant(
        "the states of many headers are stored before the rest of them",
        "O1",
        POOL,
        (
            (
                "        self._headers[places, 1:] = words[:, 1:]\n        self._headers[places, 0] = words[:, 0]\n",
                "        self._headers[places, 0] = words[:, 0]\n        self._headers[places, 1:] = words[:, 1:]\n",
            ),
        ),
        "overwrites, at once",
    ),
    Mutant(
        "many new headers are stored and not persisted",
        "O2",
        POOL,
        (
            (
                "        self._headers[places, 0] = words[:, 0]\n        self._persist_headers(places)\n",
                "        self._headers[places, 0] = words[:, 0]\n",
            ),
        ),
        "overwrites, at once",
    ),
    Mutant(
        "only the first of several runs of headers is persisted",
        "O2",
        POOL,
        (("        for first, count in stretches(places):\n", "        for first, count in stretches(places)[:1]:\n"),),
        "overwrites, at once",
    ),
    Mutant(
        "of several runs of slots only the first gets its data",
        "O1",
        COMMIT,
        (
            (
                "            for slot, count in stretches(slot_index(places)):\n",
                "            for slot, count in stretches(slot_index(places))[:1]:\n",
            ),
        ),
        "overwrites, at once",
    ),
    Mutant(
        "blocks that were written meanwhile leave an older read in force",
        "H26",
        COMMIT,
        (
            (
                "                for block in range(first, first + count):\n"
                "                    file.fetches.pop(block, None)\n",
                "                pass\n",
            ),
        ),
        "write during a read, at once",
    ),
    Mutant(
        "a new version is freed while its predecessor may come back",
        "O11",
        SLOTS,
        (
            (
                "        if self.retired and not self.deferred:\n"
                "            self.fence()\n"
                "        return self._retire_all(",
                "        return self._retire_all(",
            ),
        ),
        "truncate",
    ),
    Mutant(
        "a header comes before the record of its file",
        "O6",
        RECORDS,
        (
            (
                "            await self.transact(changes)\n            self._files.add(file)\n",
                "            changes()\n            self._files.add(file)\n",
            ),
        ),
        "overwrites",
    ),
    Mutant(
        "the superblock in force is overwritten",
        "H12",
        SUPERBLOCK,
        (("        target = 1 - self._active\n", "        target = self._active\n"),),
        "shutdown",
    ),
    Mutant(
        "a superblock is written before the pool is durably zero",
        "O9",
        POOLFILE,
        (("    medium.sync()\n", ""),),
        "format",
    ),
    # -- start and end
    Mutant(
        "the clean flag is not cleared",
        "O8",
        RECOVERY,
        (("        pool.mark_open()  # O8: before the first change\n", ""),),
        "overwrites",
    ),
    Mutant(
        "the clean flag is cleared after the first change",
        "O8",
        RECOVERY,
        (
            (
                "        pool.mark_open()  # O8: before the first change\n        _free_dead(cache, found)\n",
                "        _free_dead(cache, found)\n        pool.mark_open()\n",
            ),
        ),
        "two lives",
    ),
    Mutant(
        "the clean flag is set over what is still on its way",
        "O8",
        UPKEEP,
        (
            (
                "            await cache.blocks.persist_frees()\n            await self._stamps.note_dirty()\n",
                "            await self._stamps.note_dirty()\n",
            ),
        ),
        "shutdown",
    ),
    # -- writeback
    Mutant(
        "blocks become clean without a sync of the backing",
        "O5",
        PASSES,
        (("            await file.backing.sync()\n", ""),),
        "writeback",
    ),
    Mutant(
        "blocks become clean before the sync of the names",
        "O5",
        PASSES,
        (("            await sync_names(cache, file)\n", ""),),
        "writeback",
    ),
    Mutant(
        "blocks of a file without users become clean before its names are durable",
        "O5",
        STEPS,
        (("    elif file.unnamed_since >= cache.syncs.done:\n        await cache.syncs.sync_all()\n", ""),),
        "writeback of a closed file",
    ),
    Mutant(
        "a block that was written meanwhile becomes clean",
        "H16",
        PASSES,
        (
            (
                "            current = stride[slots.in_state(stride, DIRTY)]\n",
                "            now = [file.table.get(block) for block in part.blocks.tolist()]\n"
                "            current = np.array([s for s in now if s >= 0 and slots.state[s] == DIRTY], np.int32)\n",
            ),
        ),
        "overwrite during writeback",
    ),
    Mutant(
        "a pass ignores a run that failed",
        "H23",
        PASSES,
        (("        if errors:\n            raise errors[0]\n", ""),),
        "write fails",
    ),
    Mutant(
        "the error of a sync is ignored",
        "H18",
        PASSES,
        (
            (
                "            await file.backing.sync()\n",
                "            try:\n"
                "                await file.backing.sync()\n"
                "            except OSError:\n"
                "                pass\n",
            ),
            (_SYNC_FAILED_MEANWHILE, ""),
        ),
        "sync fails",
    ),
    Mutant(
        "a sync that failed is repeated, and not the writes",
        "H19",
        PASSES,
        (
            (
                "            await file.backing.sync()\n",
                "            try:\n"
                "                await file.backing.sync()\n"
                "            except OSError:\n"
                "                await file.backing.sync()\n",
            ),
            (_SYNC_FAILED_MEANWHILE, ""),
        ),
        "sync fails",
    ),
    Mutant(
        "a pass does not hear of the sync of a user that failed",
        "H19",
        PASSES,
        ((_SYNC_FAILED_MEANWHILE, ""),),
        "sync fails for a user",
    ),
    Mutant(
        "what failed is never tried again",
        "H23",
        WRITEBACK,
        (("        file.retry_at = trio.current_time() + pause\n", '        file.retry_at = float("inf") + pause\n'),),
        "errors, then none",
    ),
    Mutant(
        "writeback does not restore the mtime",
        "H44",
        PASSES,
        (("            await file.backing.set_mtime(part.mtime_ns)\n", "            pass\n"),),
        "writeback",
    ),
    Mutant(
        "the end of a file is not written back",
        "H8",
        PASSES,
        (("        if whole < len(part.blocks):\n", "        if whole > len(part.blocks):\n"),),
        "writeback",
    ),
    Mutant(
        "writeback goes beyond the end of the file",
        "H34",
        PASSES,
        (
            (
                "        whole = int(np.searchsorted(part.blocks, size >> self._cache.shift))\n",
                "        whole = len(part.blocks)\n",
            ),
        ),
        "writeback",
    ),
    Mutant(
        "files of a group become clean without a sync of the backing",
        "O5",
        GROUPS,
        (("            await self._sync_all(len(files))\n", ""),),
        "writeback of many files",
    ),
    Mutant(
        "a group takes a sync of everything that had begun before its writes",
        "O5",
        GROUPS,
        (("        begun = cache.syncs.begun\n", "        begun = cache.syncs.begun - 1\n"),),
        "syncs of everything overlap",
    ),
    Mutant(
        "a sync of everything that failed is taken for good",
        "H18",
        GROUPS,
        (("            together = False\n", "            together = True\n"),),
        "sync of many files fails",
    ),
    Mutant(
        "an error that a sync of everything has met in a file is ignored",
        "H18",
        GROUPS,
        (
            (
                "            if isinstance(result, OSError):\n                leave(member, result)\n",
                "            if isinstance(result, OSError):\n                done.append(member)\n",
            ),
        ),
        "sync of many files fails",
    ),
    Mutant(
        "names of a group are not synced after a sync of everything has failed",
        "O5",
        GROUPS,
        (("                        await sync_names(self._cache, file)\n", "                        pass\n"),),
        "sync of many files fails",
    ),
    Mutant(
        "a group does not hear of the sync of a user that failed",
        "H19",
        GROUPS,
        (
            (
                "member.file.backing.sync_failures != member.failures_before:\n",
                "member.file.backing.sync_failures < member.failures_before:\n",
            ),
        ),
        "sync of many files fails for a user",
    ),
    Mutant(
        "a file of a group whose write has failed is taken for written",
        "H23",
        GROUPS,
        (
            (
                "                if error is not None:\n"
                "                    leave(member, error)\n"
                "                else:",
                "                if error is not None and error.errno is None:\n"
                "                    leave(member, error)\n"
                "                else:",
            ),
        ),
        "write of one of many files fails",
    ),
    Mutant(
        "a block of a group that was written meanwhile becomes clean",
        "H16",
        GROUPS,
        (
            (
                "        pinned = np.concatenate([member.slots for member in members])\n        dirty",
                "        pinned = np.array([m.file.table.get(int(b)) for m in members for b in m.blocks], np.int32)\n"
                "        dirty",
            ),
        ),
        "overwrite during writeback of many files",
    ),
    Mutant(
        "a group does not restore the mtime",
        "H44",
        GROUPS,
        (
            (
                "        return SmallWrite(file.backing, runs, tail, member.mtime_ns)\n",
                "        return SmallWrite(file.backing, runs, tail, member.mtime_ns + 1)\n",
            ),
        ),
        "writeback of many files",
    ),
    Mutant(
        "damaged blocks of a group are written",
        "P5",
        GROUPS,
        (("            member.lost = ~good[first:end]\n", "            member.lost = good[first:end] & False\n"),),
        "damage in flight, many files",
    ),
    Mutant(
        "slots that are being written back are used again",
        "H21",
        SLOTS,
        (
            ("        ready = [slot for slot in slots if not pins[slot]]\n", "        ready = list(slots)\n"),
            (
                "        if len(ready) != len(slots):\n"
                "            self._limbo.update(slot for slot in slots if pins[slot])\n",
                "        del pins\n",
            ),
        ),
        "slots in flight",
    ),
    Mutant(
        "dirty blocks are evicted",
        "H28",
        SLOTS,
        (
            (
                "        clean = self._state_np[start:stop] == CLEAN\n",
                "        clean = self._state_np[start:stop] != FREE\n",
            ),
            ("        if short > 0 and self.counts[CLEAN]:\n", "        if short > 0:\n"),
            ("        found = self.state.find(CLEAN, start, stop)\n", "        found = start\n"),
        ),
        "overwrites, tight",
    ),
    # -- reading, merging, damage
    Mutant(
        "what is fetched overwrites what was written meanwhile",
        "H26",
        COMMIT,
        (
            (
                "                file.fetches.pop(block, None)  # what",
                "                pass  # what",
            ),
        ),
        "write during a read",
    ),
    Mutant(
        "what is fetched brings back what was cut off meanwhile",
        "H31",
        ATTRIBUTES,
        (
            (
                "        for block in [b for b in file.fetches if b >= size >> self._shift]:\n"
                "            del file.fetches[block]\n",
                "",
            ),
        ),
        "truncate during a read",
    ),
    Mutant(
        "a write is merged with old content that was cut off meanwhile",
        "H26",
        WRITING,
        (
            (
                "                if fetch is None or memory is None or file.fetches.get(block) is not fetch:\n",
                "                if fetch is None or memory is None:\n",
            ),
        ),
        "stale fill",
    ),
    Mutant(
        "a fetched block is published before its data is persisted",
        "O1",
        FETCH,
        (
            (
                "        for slot, count in stretches(slot_index(taken)):\n"
                "            cache.pool.persist(slot, count)\n",
                "",
            ),
        ),
        "two files, tight",
    ),
    Mutant(
        "a fetched block keeps what its slot held beyond the end of the file",
        "P4",
        FETCH,
        (("            self._zero_from(views, count)\n", ""),),
        "partial last block",
    ),
    Mutant(
        "checksums are not verified when blocks are read",
        "H11",
        INTEGRITY,
        (
            (
                "        return xxh3_64_intdigest(data) == self._pool.checksum_of(slot)\n",
                "        return xxh3_64_intdigest(data) >= 0\n",
            ),
        ),
        "damaged dirty block",
    ),
    Mutant(
        "checksums are not verified when blocks are written back",
        "P5",
        STEPS,
        (("= expected == np.array(found, np.uint64)\n", "= expected == expected\n"),),
        "damage in flight",
    ),
    Mutant(
        "a damaged block is merged with a write",
        "P5",
        WRITING,
        (
            (
                "            if slot >= 0 and cache.integrity.verify(file, block, slot):\n                image[:]",
                "            if slot >= 0:\n                image[:]",
            ),
        ),
        "damaged dirty block, merged",
    ),
    Mutant(
        "a damaged block is published again with a new time",
        "P5",
        ATTRIBUTES,
        (
            (
                "            cache.integrity.verify(file, block, slot)\n        except",
                "            pass\n        except",
            ),
        ),
        "damaged dirty block, another time",
    ),
    Mutant(
        "a damaged block is cut and published again by recovery",
        "P5",
        RESOLVER,
        (("        if _verified(cache, file, slot):\n", "        if slot >= 0:\n"),),
        "damaged block, cut",
    ),
    Mutant(
        "a damaged clean block is served",
        "H11",
        INTEGRITY,
        (
            (
                "                self._blocks.remove(file, block, slot)\n                return False\n",
                "                return True\n",
            ),
        ),
        "damaged clean block",
    ),
    Mutant(
        "a damaged dirty block is dropped in silence",
        "P5",
        INTEGRITY,
        (("            if slots.state[slot] == CLEAN:\n", "            if slots.state[slot] != QUARANTINED:\n"),),
        "damaged dirty block",
    ),
    Mutant(
        "the slot of a lost block is used again",
        "P5",
        SLOTS,
        (
            (
                "        clean = self._state_np[start:stop] == CLEAN\n",
                "        clean = (self._state_np[start:stop] == CLEAN) | (self._state_np[start:stop] == QUARANTINED)\n",
            ),
            ("        found = self.state.find(CLEAN, start, stop)\n", "        found = start\n"),
        ),
        "damaged dirty block, tight",
    ),
    Mutant(
        "a full disk of the catalog ends the cache",
        "P1",
        RECORDS,
        (
            (
                "            if essential:\n                self._health.fail(error)\n",
                "            self._health.fail(error)\n",
            ),
        ),
        "catalog full for a while",
    ),
    Mutant(
        "data is loaded, and not read, when it is first looked at",
        "P5",
        INTEGRITY,
        (("            data = self._pool.read(slot)\n", "            data = self._pool.view(slot)\n"),),
        "unreadable block",
    ),
    Mutant(
        "a slot on bad media is used again",
        "P5",
        INTEGRITY,
        (("            self._slots.note_suspect(slot)\n", ""),),
        "unreadable block",
    ),
    Mutant(
        "disk: a store goes to a page that may be on bad media",
        "P5",
        SLOTS,
        (("            self.untouched = stack\n", "            self.free = stack\n"),),
        "unreadable block, disk",
    ),
    Mutant(
        "disk: a store goes to a page that may be on bad media, of many slots that were freed",
        "P5",
        SLOTS,
        (("np.frombuffer(touched, np.uint8)[stack] != 0", "np.ones(len(stack), np.bool_)"),),
        "freed after a start, at once, disk",
    ),
    Mutant(
        "what is fetched within a truncate is published",
        "O7",
        FETCH,
        (("            if file.life is CUT:\n", "            if fetch is None:\n"),),
        "truncate during a read",
    ),
    # -- truncate
    Mutant(
        "a truncate commits no intent",
        "O7",
        ATTRIBUTES,
        (
            (
                "            await cache.records.transact(lambda: Changes(add_intents=[intent]))\n        else:\n",
                "        else:\n",
            ),
        ),
        "truncate",
    ),
    Mutant(
        "the intent of a truncate is dropped before the backing is synced",
        "O7",
        ATTRIBUTES,
        (
            (
                "            file.intents.append(intent)\n",
                "            done = [(file.file_id, intent.seq)]\n"
                "            await cache.records.transact(lambda: Changes(drop_intents=done))\n",
            ),
        ),
        "truncate",
    ),
    Mutant(
        "a truncate does not wait for a writeback",
        "H32",
        ATTRIBUTES,
        (
            (
                "            async with file.lock:\n                with file.cut",
                "            async with trio.Lock():\n                with file.cut",
            ),
        ),
        "truncate during writeback",
    ),
    Mutant(
        "writes go on between the intent of a truncate and its end",
        "O7",
        ATTRIBUTES,
        (
            (
                "                with file.cut():\n",
                "                with suppress():\n",
            ),
        ),
        "write during truncate",
    ),
    Mutant(
        "the rest of the last block is not zeroed by a truncate",
        "H31",
        ATTRIBUTES,
        (
            (
                "            image[:rest] = cache.data[slot * block_size : slot * block_size + rest]\n            self",
                "            image[:] = cache.data[slot * block_size : (slot + 1) * block_size]\n            self",
            ),
        ),
        "truncate within a block",
    ),
    Mutant(
        "a truncate keeps the clean block that it cuts within",
        "H31",
        ATTRIBUTES,
        (
            (
                "            cache.blocks.remove(file, block, slot)  # the backing has zeroed the rest\n",
                "            pass\n",
            ),
        ),
        "truncate within a block",
    ),
    Mutant(
        "a truncate that makes a file larger again has no intent over an older one",
        "H31",
        ATTRIBUTES,
        (("        if shrinks or file.intents:\n", "        if shrinks:\n"),),
        "truncate, then larger",
    ),
    Mutant(
        "a truncate that failed leaves its intent",
        "O7",
        ATTRIBUTES,
        (
            (
                "Changes(drop_intents=drop, add_intents=list(file.intents))",
                "Changes(add_intents=list(file.intents))",
            ),
        ),
        "truncate fails",
    ),
    Mutant(
        "a new time is published between the intent of a truncate and its end",
        "O7",
        ATTRIBUTES,
        (
            (
                "            await file.until_truncate_done()\n            spare = await self._spare_slot()\n",
                "            file.life, file._truncate_done = type(file.life).USABLE, None\n"
                "            spare = await self._spare_slot()\n",
            ),
        ),
        "time during truncate",
    ),
    Mutant(
        "a truncate to the same size publishes a new time within another one",
        "O7",
        ATTRIBUTES,
        (
            (
                "        await file.until_truncate_done()\n        if size == file.size and file.dirty:\n",
                "        file.life, file._truncate_done = type(file.life).USABLE, None\n"
                "        if size == file.size and file.dirty:\n",
            ),
        ),
        "truncate during truncate",
    ),
    Mutant(
        "a new time does not wait for a truncate, and nothing but the assertion notices",
        "O7",
        ATTRIBUTES,
        (
            ("            await file.until_truncate_done()\n            spare", "            spare"),
            (
                "                if file.life is CUT:\n",
                "                if file.life is spare:\n",
            ),
        ),
        "time during truncate",
    ),
    # -- names and times
    Mutant(
        "an unlink has no tombstone",
        "H40",
        ENGINE,
        (("        if file.recorded and (owed or self.cache.slots.deferred):\n", "        if owed is None:\n"),),
        "unlink",
    ),
    Mutant(
        "slots of unlinked files are freed before the unlink is durable",
        "H38",
        UPKEEP,
        (("        await cache.syncs.sync_all()\n        for file in dead:\n", "        for file in dead:\n"),),
        "unlink",
    ),
    Mutant(
        "the tombstone of an unlink that failed is not withdrawn",
        "H40",
        ENGINE,
        (
            (
                "it was not due\n        if file.recorded:\n",
                "it was not due\n        if not file.recorded:\n",
            ),
        ),
        "unlink fails",
    ),
    Mutant(
        "a flush does not sync names",
        "P2",
        ENGINE,
        (
            (
                "        await self.cache.syncs.sync_all()\n        self.cache.health.check()\n        if",
                "        self.cache.health.check()\n        if",
            ),
        ),
        "rename",
    ),
    Mutant(
        "fsync forgets the inode",
        "P2",
        ENGINE,
        (("a crash would find\n        await self.sync_inode(file)\n", "a crash would find\n"),),
        "size by fsync",
    ),
    Mutant(
        "fsync does not commit",
        "P1",
        ENGINE,
        (
            (
                "        await self.cache.blocks.persist()\n        self.cache.health.check()  # after",
                "        self.cache.health.check()  # after",
            ),
        ),
        "overwrites, disk",
    ),
    Mutant(
        "a new time leaves the older one in the headers",
        "H44",
        ATTRIBUTES,
        (("block >= 0 and self._retime(file, block, spare, mtime_ns):\n", "block >= 0:\n"),),
        "times",
    ),
    Mutant(
        "the record does not say which versions no longer decide the time",
        "H44",
        STEPS,
        (("    file.attr_seq = part.attr_seq\n", ""),),
        "times",
    ),
    # -- recovery
    Mutant(
        "sequence numbers start again after recovery",
        "H13",
        RECOVERY,
        (("        cache.blocks.begin_at(max(seqs) + 1)\n", "        cache.blocks.begin_at(1)\n"),),
        "two lives",
    ),
    Mutant(
        "sequence numbers of records are given out again",
        "H13",
        RECOVERY,
        (("        seqs += [int(files.attr_seq.max(initial=0))]\n", ""),),
        "times, two lives",
    ),
    Mutant(
        "file ids are given out again",
        "H39",
        RECOVERY,
        (
            (
                "begin_at(max(next_file_id - 1, *last_ids) + 1, conflicts)\n",
                "begin_at(next_file_id // next_file_id, conflicts)\n",
            ),
        ),
        "two lives",
    ),
    Mutant(
        "recovery takes the lowest sequence number",
        "H13",
        ANALYSIS,
        (("part[np.lexsort((seq[part], key[part]))]", "part[np.lexsort((~seq[part], key[part]))]"),),
        "overwrites",
    ),
    Mutant(
        "recovery ignores intents",
        "O7",
        RECOVERY,
        (("        for intent in catalog.intents():\n", "        for intent in []:\n"),),
        "truncate",
    ),
    Mutant(
        "recovery keeps versions that an intent has cut off",
        "O7",
        RECOVERY,
        (("    kill_cut(found, intents, pool.block_size)\n", ""),),
        "truncate",
    ),
    Mutant(
        "recovery repeats the last truncate only",
        "H31",
        RESOLVER,
        (
            (
                "        for intent in file.intents:\n            await",
                "        for intent in file.intents[-1:]:\n            await",
            ),
        ),
        "truncate, then larger",
    ),
    Mutant(
        "recovery ends intents before the backing is synced",
        "O7",
        RESOLVER,
        (
            (
                "        await file.backing.sync()\n        if file.unnamed_since >= cache.syncs.done:  # a file",
                "        if file.unnamed_since < 0:  # a file",
            ),
        ),
        "truncate, two crashes",
    ),
    Mutant(
        "recovery does not zero what a truncate has cut from a block",
        "H31",
        RESOLVER,
        (("            self._zero_tail(file, block)\n", "            pass\n"),),
        "truncate, disk",
    ),
    Mutant(
        "recovery ignores tombstones",
        "H38",
        RESOLVER,
        (
            (
                "        if file.tombstone and (stat is None or stat.nlink == 0):\n",
                "        if file.tombstone and stat is not None and stat.nlink == 0:\n",
            ),
        ),
        "unlink",
    ),
    Mutant(
        "recovery drops a file whose unlink was lost",
        "H38",
        RESOLVER,
        (("        if file.tombstone and (stat is None or stat.nlink == 0):\n", "        if file.tombstone:\n"),),
        "unlink",
    ),
    Mutant(
        "recovery drops dirty blocks without a record",
        "H40",
        ANALYSIS,
        (("    clean = found.state[orphaned] == CLEAN\n", "    clean = found.state[orphaned] != FREE\n"),),
        "catalog lost",
    ),
    Mutant(
        "recovery drops files that the backing has lost",
        "H40",
        RESOLVER,
        (
            (
                "        if file.tombstone and (stat is None or stat.nlink == 0):\n",
                "        if stat is None or (file.tombstone and stat.nlink == 0):\n",
            ),
        ),
        "writeback",
    ),
    Mutant(
        "a file created again loses its clean blocks",
        "H40",
        RESOLVER,
        (
            (
                "            clean = slots[cache.slots.in_state(slots, CLEAN)]\n",
                "            clean = slots[:0]\n",
            ),
        ),
        "lost by the backing",
    ),
    Mutant(
        "a file created again is as long as its dirty blocks",
        "H34",
        RESOLVER,
        (
            (
                "            file.size = max(file.size, (int(blocks[-1]) << cache.shift) + length)\n",
                "            del length\n",
            ),
            ("            size = max(size, file.stamp.size if file.stamp is not None else 0)\n", ""),
        ),
        "lost by the backing",
    ),
    Mutant(
        "blocks that are lost are dropped with the clean ones",
        "P5",
        COMMIT,
        (
            (
                "                clean = self._slots.in_state(slots, CLEAN)  #",
                "                clean = ~self._slots.in_state(slots, DIRTY)  #",
            ),
        ),
        "damaged block, cut",
    ),
    Mutant(
        "a lost block at the end makes the file shorter",
        "P5",
        RECOVERY,
        (("    owed = slots[found.state[slots] != CLEAN]", "    owed = slots[found.state[slots] == DIRTY]"),),
        "damaged committed block, disk",
    ),
    Mutant(
        "the size is not that of the last dirty block",
        "H34",
        RECOVERY,
        (
            (
                "        file.size = (int(found.block[end]) << cache.shift) + int(found.length[end])\n",
                "        del end\n",
            ),
        ),
        "overwrites",
    ),
    Mutant(
        "the size is only that of the last dirty block",
        "H34",
        SETTLE,
        (("    file.size = max(file.size, stat.size)  #", "    #"),),
        "writeback, one block again",
    ),
    Mutant(
        "the times in headers are ignored",
        "H44",
        RECOVERY,
        (("    if found.seq[newest] > np.uint64(last):\n", "    if found.seq[newest] < np.uint64(last):\n"),),
        "times",
    ),
    Mutant(
        "times in headers are taken for signed numbers",
        "H44",
        RECOVERY,
        (("from_word(int(found.mtime[newest]))", "int(found.mtime[newest].astype(np.int64))"),),
        "times after 2262",
    ),
    Mutant(
        "clean blocks are kept though a stranger has changed the file",
        "H42",
        SETTLE,
        (
            (
                "    changed = file.stamp != seen\n",
                "    changed = file.stamp is None\n",
            ),
        ),
        "changed by a stranger",
    ),
    # -- dormant files
    Mutant(
        "a file that wakes takes slots that have been used again",
        "P4",
        DORMANT,
        (("        return slots[self._slots.clean_of(slots, rows.file_ids[row])]\n", "        return slots\n"),),
        "dormant files, evicted in part",
    ),
    Mutant(
        "a file that wakes takes slots that are free",
        "P4",
        SLOTS,
        (
            (
                "= (self._state_np[slots] == CLEAN) & (self._owner_np[slots] == owners)",
                "= self._owner_np[slots] == owners",
            ),
        ),
        "dormant files, evicted in part",
    ),
    Mutant(
        "a file that wakes keeps its blocks though a stranger has changed it",
        "H42",
        FILES,
        (("    file.life = Life.UNSEEN\n", "    file.life = Life.USABLE\n"),),
        "changed by a stranger",
    ),
    Mutant(
        "a file becomes dormant with dirty blocks",
        "P1",
        DORMANT,
        (
            ("    if file.dirty or file.intents or", "    if file.intents or"),
            (
                "    if file.record is not Record.CURRENT or file.error is not None or file.errors.untold:\n",
                "    if file.record is not Record.CURRENT:\n",
            ),
            (
                "    return bool(slots.in_state(np.frombuffer(file.table.slots(), np.int32), CLEAN).all())\n",
                "    return True\n",
            ),
        ),
        "dormant files",
    ),
    Mutant(
        "a dormant file forgets that its inode is not synced",
        "P2",
        DORMANT,
        (("        file.needs_sync = bool(rows.unsynced[row])\n", ""),),
        "dormant files",
    ),
    Mutant(
        "evicted slots of a dormant file are not counted",
        "invariant 2",
        DORMANT,
        (("                rows.left[row] -= count\n", "                rows.left[row] -= 0 * count\n"),),
        "dormant files, tight",
    ),
    Mutant(
        "the unlink of a dormant file has no tombstone",
        "H40",
        ENGINE,
        (
            (
                "        return self.cache.files.find(handle)\n",
                "        return self.cache.files.by_handle.get(handle)\n",
            ),
        ),
        "dormant files, unlinked, disk",
    ),
    # -- strangers
    Mutant(
        "dirty blocks go over what a stranger has written",
        "P4",
        RESOLVER,
        (("        elif self._was_edited(file, stat):\n", "        elif stat.size < 0:\n"),),
        "edited behind the mount",
    ),
    Mutant(
        "a file that a stranger has removed comes back under its name",
        "P4",
        RESOLVER,
        (("        return self._is_known(file) or file.file_id", "        return file.file_id"),),
        "removed behind the mount",
    ),
    Mutant(
        "an orderly end does not note how the files beneath dirty data look",
        "P4",
        UPKEEP,
        (("            await self._stamps.note_dirty()\n", ""),),
        "edited after an orderly end",
    ),
    Mutant(
        "what the cache lacks of its version of an edited file becomes zeros",
        "P4",
        RESOLVER,
        (('            copy_of=b"" if complete else handle,\n', '            copy_of=b"",\n'),),
        "edited, and the cache has not all of it",
    ),
    Mutant(
        "a pass does not announce that it changes the file",
        "P4",
        PASSES,
        (("            await cache.records.announce([file])\n", ""),),
        "no strangers",
    ),
    Mutant(
        "a group does not announce that it changes its files",
        "P4",
        GROUPS,
        (("        await cache.records.announce([member.file for member in members])\n", ""),),
        "no strangers, many files",
    ),
    Mutant(
        "a change of the time for a user is not announced",
        "P4",
        RECORDS,
        (
            (
                "        file.touches += 1\n        file.touched = True\n        if file.announced:\n",
                "        file.touches += 1\n        if file.touches:\n",
            ),
        ),
        "no strangers",
    ),
    Mutant(
        "a stamp that was not synced is trusted after a power cut",
        "P4",
        RECORDS,
        (("            file.synced = synced or (same and file.synced)\n", "            file.synced = True\n"),),
        "no strangers",
    ),
    Mutant(
        "what was not synced is trusted after a power cut",
        "P4",
        RECOVERY,
        (("page_cache_kept = _one_epoch(noted_epoch, epoch)\n", "page_cache_kept = noted_epoch != b''\n"),),
        "no strangers",
    ),
    Mutant(
        "recovery does not note how the files look that it has accepted",
        "P4",
        RESOLVER,
        (("        await self._note([file for file in wanted if file.record is Record.OUTDATED])\n", ""),),
        "no strangers, and a power cut",
    ),
    Mutant(
        "a file that looks otherwise after a power cut takes new data with its old stamp",
        "P4",
        SETTLE,
        (("        file.outdate_record()  # else", "        pass  # else"),),
        "no strangers, and a power cut",
    ),
    # -- class disk
    Mutant(
        "disk: the old version is freed before the new one is durable",
        "O3",
        SLOTS,
        (
            (
                "        if self.deferred:\n            self._forget(old)\n",
                "        if old < 0:\n            self._forget(old)\n",
            ),
        ),
        "overwrites, disk",
    ),
    Mutant(
        "disk: writeback is ahead of what is durable in the pool",
        "P4",
        PASSES,
        (("                await cache.blocks.persist()\n", "                pass\n"),),
        "eviction, at once, disk",
    ),
    Mutant(
        "disk: a group is ahead of what is durable in the pool",
        "P4",
        GROUPS,
        (("            await cache.blocks.persist()\n", "            pass\n"),),
        "writeback of many files at once, disk",
    ),
    Mutant(
        "disk: a commit does not cover what was there before it",
        "P1",
        COMMIT,
        (("        wanted = self.next_seq - 1\n", "        wanted = self.persisted_seq\n"),),
        "truncate, disk",
    ),
    Mutant(
        "disk: a commit is noted before it is done",
        "O2",
        COMMIT,
        (
            (
                "                await self._run_blocking(self._pool.sync)\n"
                "                await self._run_blocking(self._pool.mark_persisted, seq)\n",
                "                await self._run_blocking(self._pool.mark_persisted, seq)\n"
                "                await self._run_blocking(self._pool.sync)\n",
            ),
        ),
        "overwrites, disk",
    ),
    Mutant(
        "disk: a commit covers what was stored after it had begun",
        "O2",
        COMMIT,
        (
            (
                "            seq, covered = self.next_seq - 1, self._slots.persist_begin()\n",
                "            covered = self._slots.persist_begin()\n",
            ),
            (
                "                await self._run_blocking(self._pool.mark_persisted, seq)\n",
                "                seq = self.next_seq - 1\n"
                "                await self._run_blocking(self._pool.mark_persisted, seq)\n",
            ),
        ),
        "writes during commits, disk",
    ),
    Mutant(
        "disk: recovery takes a version that did not arrive",
        "P3",
        RECOVERY,
        (("        _discard_torn(pool, found)\n", "        pass\n"),),
        "overwrites, disk",
    ),
    Mutant(
        "disk: a damaged version is taken for one that did not arrive",
        "H11",
        ANALYSIS,
        (
            (
                "    unsure = (found.state != FREE) & (found.seq > np.uint64(persisted_seq))\n",
                "    unsure = found.state != FREE\n",
            ),
        ),
        "damaged committed block, disk",
    ),
    Mutant(
        "disk: a forgotten file loses its id before its slots are durably free",
        "P4",
        FILETABLE,
        (("        if self._slots.deferred and file.file_id:\n", "        if file.file_id < 0:\n"),),
        "forgotten, then used again, disk",
    ),
    Mutant(
        "disk: a dormant file loses its id before its slots are durably free",
        "P4",
        FILETABLE,
        (("end - first, leaving=self._slots.deferred):\n", "end - first, leaving=False):\n"),),
        "forgotten while dormant, then used again, disk",
    ),
    Mutant(
        "disk: the record of a forgotten file is deleted before its slots are durably free",
        "P4",
        UPKEEP,
        (("            await cache.blocks.persist_frees()\n            for first", "            for first"),),
        "forgotten, then used again, disk",
    ),
    Mutant(
        "recovery keeps versions of a file whose handle has another id by now",
        "P4",
        ANALYSIS,
        (
            (
                "    found.dead |= np.isin(found.file_id, gone) & (found.state != FREE)\n",
                "    replaced.clear()\n",
            ),
        ),
        "two ids of a handle",
    ),
    Mutant(
        "disk: a stamp that is announced is durable before the clean blocks of the old one are gone",
        "H42",
        RECORDS,
        (("for file in files):\n            await self._persist()\n", "for file in files):\n            pass\n"),),
        "changed by a stranger, then by a user, disk",
    ),
    Mutant(
        "disk: a new stamp is durable before the clean blocks of the old one are gone",
        "H42",
        STAMPS,
        (("            await cache.blocks.persist()\n        for first", "            pass\n        for first"),),
        "changed by a stranger, then by a user, disk",
    ),
)


def table() -> str:
    """All of them as docs/durability.md has them."""
    rows = [f"| {mutant.name} | {mutant.breaks} | {mutant.killer} |" for mutant in MUTANTS]
    return "\n".join(["| fault | breaks | found by |", "|---|---|---|", *rows])
