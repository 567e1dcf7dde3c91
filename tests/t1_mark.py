"""The mark on a backing: what is written is read, in an attribute or a file, and users of the mount do not see it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from support_fs import run

from cachefsd.backing import mark as marks
from cachefsd.backing import mountcalls
from cachefsd.backing.mark import DamagedMark, Mark
from cachefsd.backing.tree import Caller, Tree
from cachefsd.backing.workers import Workers

MARK = Mark("0123456789abcdef" * 2, "/srv/cache", "ab" * 16, "2030-01-02T03:04:05Z")


def not_before(version: tuple[int, int]) -> bool:
    """Whether the kernel is older."""
    major, minor = os.uname().release.split(".")[:2]
    return (int(major), int(minor)) < version


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@contextmanager
def opened(path: Path) -> Iterator[int]:
    fd = os.open(path, os.O_PATH | os.O_DIRECTORY)
    try:
        yield fd
    finally:
        os.close(fd)


@pytest.fixture
def bare(tmp_path: Path) -> Iterator[Path]:
    """A directory of a file system without extended attributes for users."""
    place = tmp_path / "bare"
    place.mkdir()
    run("mount", "-t", "ramfs", "ramfs", place)
    try:
        yield place
    finally:
        run("umount", "-l", place)


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError, match=r"\[Errno") as caught:
        call()
    return caught.value.errno


def test_a_mark_is_text_and_is_read_as_it_was_written() -> None:
    for mark in (MARK, Mark(MARK.uuid, "/with\\nnewline and ü", MARK.session, MARK.since, "some-boot")):
        text = mark.text()
        assert marks.parse(text.encode()) == mark
        assert "before you use it" in text
        assert mark.cache in text


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff\xfe",
        b"something else\n",
        MARK.text().encode()[:60],
        MARK.text().replace("version 1", "version 2").encode(),
        MARK.text().replace(MARK.uuid, "not a uuid").encode(),
        MARK.text().replace(MARK.session, "").encode(),
    ],
)
def test_what_is_no_mark_is_said_to_be_damaged(data: bytes) -> None:
    with pytest.raises(DamagedMark):
        marks.parse(data)


def test_paths_become_one_line_that_an_attribute_can_hold() -> None:
    assert marks.for_people("/plain/path") == "/plain/path"
    assert marks.for_people("/a\nb\x1b") == "/a\\nb\\x1b"
    assert "\n" not in marks.for_people(os.fsdecode(b"/\xff\xfe"))
    assert len(Mark(MARK.uuid, marks.for_people("/ü" * 4000), "a" * 64, MARK.since).text().encode()) < 3000


def test_written_replaced_and_removed(tmp_path: Path) -> None:
    with opened(tmp_path) as fd:
        assert marks.read(fd) is None
        marks.remove(fd)
        marks.write(fd, MARK)
        assert marks.read(fd) == MARK
        assert os.getxattr(tmp_path, marks.ATTRIBUTE).decode() == MARK.text()
        other = Mark("f" * 32, "/elsewhere", "1", "then")
        marks.write(fd, other)
        assert marks.read(fd) == other
        marks.remove(fd)
        assert marks.read(fd) is None
    assert os.listdir(tmp_path) == []
    assert marks.ATTRIBUTE not in os.listxattr(tmp_path)


@needs_root
def test_a_file_system_without_attributes_gets_a_file(bare: Path) -> None:
    with opened(bare) as fd:
        (bare / ".cachefsd.new").write_text("of a start that was killed")
        marks.write(fd, MARK)
        assert os.listdir(bare) == [".cachefsd"]
        assert marks.read(fd) == MARK
        (bare / ".cachefsd").write_bytes(b"cachefsd mark, version 1\nhalf")
        with pytest.raises(DamagedMark):
            marks.read(fd)
        marks.write(fd, MARK)
        marks.remove(fd)
        assert os.listdir(bare) == []


@needs_root
def test_files_that_are_no_marks_are_left_alone(bare: Path) -> None:
    with opened(bare) as fd:
        for make in (
            lambda path: path.write_text("notes of a user"),
            lambda path: path.mkdir(),
            lambda path: path.symlink_to("/etc/passwd"),
        ):
            make(bare / ".cachefsd")
            assert marks.read(fd) is None
            run("rm", "-r", bare / ".cachefsd")
        (bare / ".cachefsd").write_text(MARK.text())
        os.chown(bare / ".cachefsd", 12345, 12345)
        assert marks.read(fd) is None


async def test_users_of_the_tree_neither_see_nor_change_the_attribute(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    async with Workers(1, "metadata") as workers:
        tree = Tree(os.fspath(tmp_path), workers)
        try:
            marks.write(tree.root_fd, MARK)
            tree.hide_mark()
            name = os.fsencode(marks.ATTRIBUTE)
            assert name not in await tree.listxattr(tree.root_fd)
            for operation, expected in (
                (tree.getxattr(tree.root_fd, name), errno.ENODATA),
                (tree.removexattr(tree.root_fd, name), errno.ENODATA),
                (tree.setxattr(tree.root_fd, name, b"forged", 0), errno.EPERM),
            ):
                with pytest.raises(OSError, match=r"\[Errno") as caught:
                    await operation
                assert caught.value.errno == expected
            assert marks.read(tree.root_fd) == MARK
            below = await tree.lookup(tree.root_fd, b"sub")
            await tree.setxattr(below.fd, name, b"of the user", 0)
            assert await tree.getxattr(below.fd, name) == b"of the user"
            os.close(below.fd)
            made = await tree.create(tree.root_fd, marks.FILE, 0o600, Caller(0, 0))  # the mark is not a file here
            os.close(made.fd)
        finally:
            tree.close()


@needs_root
async def test_users_of_the_tree_neither_see_nor_change_the_file(bare: Path) -> None:
    (bare / "file").write_text("x")
    (bare / "sub").mkdir()
    async with Workers(1, "metadata") as workers:
        tree = Tree(os.fspath(bare), workers)
        root, name, caller = tree.root_fd, marks.FILE, Caller(0, 0)
        try:
            marks.write(root, MARK)
            tree.hide_mark()
            names, _ = await tree.names(root, 10)
            assert sorted(names) == [b"file", b"sub"]
            assert refused(lambda: tree.lookup_now(root, name)) == errno.ENOENT
            file, below = await tree.lookup(root, b"file"), await tree.lookup(root, b"sub")
            for operation, expected in (
                (tree.lookup(root, name), errno.ENOENT),
                (tree.unlink(root, name), errno.ENOENT),
                (tree.rename(root, name, root, b"other", 0), errno.ENOENT),
                (tree.rename(root, b"file", root, name, 0), errno.EPERM),
                (tree.link(file.fd, root, name), errno.EPERM),
                (tree.create(root, name, 0o600, caller), errno.EPERM),
                (tree.mkdir(root, name, 0o700, caller), errno.EPERM),
                (tree.symlink(root, name, b"target", caller), errno.EPERM),
            ):
                with pytest.raises(OSError, match=r"\[Errno") as caught:
                    await operation
                assert caught.value.errno == expected
            await tree.rename(root, b"file", below.fd, name, 0)  # elsewhere the name is anybody's
            os.close(file.fd)
            os.close(below.fd)
            assert marks.read(root) == MARK
        finally:
            tree.close()


@needs_root
@pytest.mark.skipif(not_before((6, 8)), reason="needs Linux 6.8")
def test_mounts_of_a_file_system_have_numbers_of_their_own(tmp_path: Path) -> None:
    """One that is mounted anew, at the same place, is not taken for what was there before."""
    place, again = tmp_path / "place", tmp_path / "again"
    place.mkdir()
    again.mkdir()
    seen: list[int] = []
    for _ in range(2):
        run("mount", "-t", "tmpfs", "none", place)
        try:
            number = place.stat().st_dev
            device = f"{os.major(number)}:{os.minor(number)}"
            (first,) = mountcalls.mounts_of(device)
            run("mount", "--bind", place, again)
            try:
                assert len(mountcalls.mounts_of(device)) == 2
                assert first in mountcalls.mounts_of(device)
            finally:
                run("umount", again)
        finally:
            run("umount", place)
        seen.append(first)
    assert seen[0] != seen[1]
