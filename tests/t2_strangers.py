"""Somebody changes the backing while nothing is mounted, at every moment at which a power cut may leave it.

A change that can be told from what the power cut has done parts the file in two, and neither version is touched. Else
dirty blocks win, block by block. Clean blocks of a file that was changed are dropped (docs/design.md §9). A file whose
inode number was used again is another file: it neither gets data of the old one nor hides it.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

import pytest
from sim.backing import LOST_FOUND, FsState, Inode
from sim.campaign import settings
from sim.crash import Image, Media
from sim.media import BLOCK
from sim.oracle import words
from sim.workloads import HALF
from sim.world import Findings, Setting, Step, examine, new_image, record, simulate

from cachefsd.media.records import decode_record

STRANGER = 900
"""The token of what strangers write."""
GENERATION = 1 << 32
"""The simulator's inode numbers are number and generation: this much apart, the same number is used again."""
IMAGES = 2
"""So many of those that a crash may leave at an event are looked at."""
PROGRAM: list[Step] = [
    ("write", "a", 0, 3 * BLOCK),
    ("write", "b", 0, BLOCK + HALF),
    ("fsync", "a"),
    ("flush",),
    ("write", "a", BLOCK, BLOCK),
    ("append", "b", HALF),
    ("fsync", "a"),
    ("fsync", "b"),
]


def with_inode(image: Image, name: str, inode: Inode) -> Image:
    fs = image.fs
    return image._replace(fs=fs._replace(inodes={**fs.inodes, fs.names[name]: inode}, clock=fs.clock + 100))


def now(fs: FsState) -> int:
    return 1_700_000_000_000_000_000 + fs.clock + 50


def changed(image: Image, name: str, size: int, *, keep_mtime: bool = False) -> tuple[Image, bytes]:
    """The file has other content, of this size."""
    old = image.fs.inodes[image.fs.names[name]]
    content = words(STRANGER, 1, 0, size)
    inode = Inode(content, old.mtime_ns if keep_mtime else now(image.fs), now(image.fs))
    return with_inode(image, name, inode), content


def changes(image: Image, name: str) -> Iterator[tuple[Image, bytes]]:
    """What strangers may do to the content of a file: the backing then, and that content."""
    inode = image.fs.inodes[image.fs.names[name]]
    size = len(inode.content)
    yield changed(image, name, size)
    yield changed(image, name, size, keep_mtime=True)
    yield changed(image, name, size + BLOCK + 8)
    yield changed(image, name, size // 16 * 8)
    yield changed(image, name, 0)
    yield with_inode(image, name, inode._replace(mtime_ns=now(image.fs), ctime_ns=now(image.fs))), inode.content


def merged(beneath: bytes, blocks: dict[int, bytes]) -> bytes:
    """The content of a file over which ``blocks`` win, and which is as long as either asks for."""
    size = max([len(beneath), *(block * BLOCK + len(data) for block, data in blocks.items())])
    content = bytearray(beneath.ljust(size, b"\0"))
    for block, data in blocks.items():
        part = slice(block * BLOCK, min((block + 1) * BLOCK, size))
        content[part] = data.ljust(BLOCK, b"\0")[: part.stop - part.start]
    return bytes(content)


async def crash_images(setting: Setting) -> list[Image]:
    """Some images of every moment of the program, each one once."""
    trace = await record(new_image(setting), setting, PROGRAM)
    media = Media(trace.image, setting.durability, fsync_takes_names=setting.fsync_takes_names)
    rng = random.Random(0)
    images: dict[bytes, Image] = {}
    for number, event in enumerate(trace.log.events):
        media.follow(number, event)
        choice = [image for image in media.images(rng, samples=1) if not image.torn]
        images.update((image.digest(), image) for image in rng.sample(choice, min(len(choice), IMAGES)))
    return list(images.values())


async def look(image: Image, setting: Setting) -> Findings:
    return await examine(image, setting, None, drain=True)


def parted(found: Findings, before: Findings, name: str, content: bytes) -> bool:
    """Whether a file was parted: then one is ``content``, and the other is what the cache's was."""
    copies = [other for other in found.contents if f"{name}.cachefsd-conflict-" in other]
    if not copies:
        return False
    (copy,) = copies
    assert found.contents[name] == content
    size = len(before.contents[name])
    beneath = content[:size].ljust(size, b"\0")  # where the cache lacks blocks
    assert found.contents[copy] == merged(beneath, before.clean[name] | before.dirty[name])
    found.contents.pop(copy)
    return True


def others(contents: dict[str, bytes], name: str) -> dict[str, bytes]:
    return {other: content for other, content in contents.items() if other != name}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", list(settings())[:2], ids=lambda setting: setting.durability.value)
def test_dirty_blocks_win_over_changes_and_clean_ones_do_not(
    setting: Setting, expect_logs: Callable[..., None]
) -> None:
    expect_logs("not in the backing any more: created again|was changed behind the mount")
    dirty = clean = edited = 0

    async def run() -> None:
        nonlocal dirty, clean, edited
        for image in await crash_images(setting):
            before = await look(image, setting)
            for name in image.fs.names:
                for meddled, content in changes(image, name):
                    found = await look(meddled, setting)
                    if parted(found, before, name, content):
                        edited += 1
                    else:
                        assert found.contents[name] == merged(content, before.dirty[name]), (image, content)
                    assert others(found.contents, name) == others(before.contents, name)
                    dirty += bool(before.dirty[name])
                    clean += bool(before.clean[name])

    simulate(run)
    assert dirty > 100
    assert clean > 100
    assert edited > 30


@pytest.mark.timeout(900)
@pytest.mark.parametrize("setting", list(settings())[:2], ids=lambda setting: setting.durability.value)
def test_a_file_whose_inode_number_is_used_again_is_another_file(
    setting: Setting, expect_logs: Callable[..., None]
) -> None:
    expect_logs("not in the backing any more: created again|was removed behind the mount")
    kept = dropped = removed = 0

    async def run() -> None:
        nonlocal kept, dropped, removed
        for image in await crash_images(setting):
            before = await look(image, setting)
            ids = {decode_record(file_id, raw).handle: file_id for file_id, raw in image.catalog.files.items()}
            for name, ino in image.fs.names.items():
                foreign = Inode(words(STRANGER, 1, 0, 2 * BLOCK), now(image.fs), now(image.fs))
                inodes = {number: inode for number, inode in image.fs.inodes.items() if number != ino}
                fs = image.fs._replace(
                    names={**image.fs.names, name: ino + GENERATION}, inodes={**inodes, ino + GENERATION: foreign}
                )
                found = await look(image._replace(fs=fs), setting)
                expected = {**before.contents, name: foreign.content}
                if before.dirty[name]:  # the old one is still owed to somebody, and has only what was cached
                    place = f"{LOST_FOUND}file-{ids[b'%d' % ino]}"
                    beneath = b""
                    if copies := [other for other in found.contents if f"{name}.cachefsd-conflict-" in other]:
                        (place,) = copies
                        beneath = bytes(len(before.contents[name]))
                        removed += 1
                    expected[place] = merged(beneath, before.clean[name] | before.dirty[name])
                assert found.contents == expected, image
                kept += bool(before.dirty[name])
                dropped += bool(before.clean[name] and not before.dirty[name])

    simulate(run)
    assert kept > 30
    assert dropped > 10
    assert removed > 10
