"""The names of the backing: nothing escapes, nothing waits that must not, what is created has its owner."""

from __future__ import annotations

import errno
import os
import stat
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trio
from support_fs import area, drop_caches, ext4, ext4_area, file_system, run

from cachefsd.backing.identity import identify, same
from cachefsd.backing.tree import Caller, Found, Tree
from cachefsd.backing.workers import Workers
from cachefsd.errors import UserError
from cachefsd.media.superblock import IDENTITY_MAX

__all__ = ["area", "ext4", "ext4_area", "file_system"]

USER = Caller(12345, 23456)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root")


@pytest.fixture(autouse=True)
def no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


@pytest.fixture
async def tree(area: Path) -> AsyncIterator[Tree]:
    async with Workers(2, "metadata") as workers:
        result = Tree(os.fspath(area), workers)
        yield result
        result.close()


@contextmanager
def held(found: Found) -> Iterator[Found]:
    try:
        yield found
    finally:
        os.close(found.fd)


async def found_stat(tree: Tree, dirfd: int, name: bytes) -> os.stat_result:
    with held(await tree.lookup(dirfd, name)) as found:
        return found.stat


async def test_lookup_now_answers_from_memory_or_not_at_all(tree: Tree, area: Path) -> None:
    (area / "f").write_bytes(b"x")
    drop_caches()
    assert tree.lookup_now(tree.root_fd, b"f") is None
    with held(await tree.lookup(tree.root_fd, b"f")) as slow:
        fast = tree.lookup_now(tree.root_fd, b"f")
        assert fast is not None
        with held(fast):
            assert fast.handle == slow.handle
            assert fast.stat == tree.stat_now(slow.fd)
            assert fast.stat.st_size == 1


async def test_a_name_known_not_to_exist(tree: Tree) -> None:
    with pytest.raises(FileNotFoundError):
        await tree.lookup(tree.root_fd, b"none")
    with pytest.raises(FileNotFoundError):
        tree.lookup_now(tree.root_fd, b"none")


@pytest.mark.parametrize("name", [b"", b".", b"..", b"a/b", b"/etc", b"a\0b"])
async def test_a_name_is_one_component(tree: Tree, name: bytes) -> None:
    fd = tree.root_fd
    for call in (
        lambda: tree.lookup(fd, name),
        lambda: tree.create(fd, name, 0o600, USER),
        lambda: tree.mkdir(fd, name, 0o700, USER),
        lambda: tree.unlink(fd, name),
        lambda: tree.rename(fd, b"x", fd, name, 0),
    ):
        with pytest.raises(OSError, match="Invalid argument"):
            await call()
    with pytest.raises(OSError, match="Invalid argument"):
        tree.lookup_now(fd, name)


async def test_a_symlink_in_the_place_of_a_directory_leads_nowhere(tree: Tree, area: Path) -> None:
    outside = area.parent / f"outside-{area.name}"
    outside.mkdir()
    (outside / "secret").touch()
    (area / "d").symlink_to(outside)
    with held(await tree.lookup(tree.root_fd, b"d")) as link:
        assert stat.S_ISLNK(link.stat.st_mode)
        with pytest.raises(NotADirectoryError):
            await tree.lookup(link.fd, b"secret")
        with pytest.raises(NotADirectoryError):
            tree.lookup_now(link.fd, b"secret")
        with pytest.raises(NotADirectoryError):
            await tree.create(link.fd, b"new", 0o600, USER)
        with pytest.raises(OSError, match=r"Not a directory|Too many levels"):
            await tree.names(link.fd)
    (area / "dangling").symlink_to(outside / "victim")
    with pytest.raises(FileExistsError):
        await tree.create(tree.root_fd, b"dangling", 0o600, USER)
    assert sorted(os.listdir(outside)) == ["secret"]


async def test_a_directory_that_was_swapped_for_a_symlink_is_still_itself(tree: Tree, area: Path) -> None:
    (area / "d").mkdir()
    (area / "other").mkdir()
    with held(await tree.lookup(tree.root_fd, b"d")) as directory:
        (area / "d").rename(area / "moved")
        (area / "d").symlink_to("other")
        with held(await tree.create(directory.fd, b"f", 0o600, USER)):
            pass
    assert (area / "moved" / "f").exists()
    assert not (area / "other" / "f").exists()


async def test_another_file_system_is_not_entered(tree: Tree, area: Path) -> None:
    (area / "m").mkdir()
    (area / "f").touch()
    run("mount", "-t", "tmpfs", "none", area / "m")
    try:
        with pytest.raises(OSError, match="cross-device") as caught:
            await tree.lookup(tree.root_fd, b"m")
        assert caught.value.errno == errno.EXDEV
        assert tree.lookup_now(tree.root_fd, b"m") is None
        mounted, plain, gone = await tree.stat_many(tree.root_fd, [b"m", b"f", b"gone"])
    finally:
        run("umount", area / "m")
    assert (mounted, gone) == (None, None)
    assert isinstance(plain, Found)
    assert (plain.fd, plain.stat.st_ino) == (-1, (area / "f").stat().st_ino)


async def test_an_access_moves_nothing_but_atime(tree: Tree, area: Path) -> None:
    for name, content in (("full", b"x" * 5000), ("empty", b"")):
        path = area / name
        path.write_bytes(content)
        os.utime(path, ns=(10**9, 2 * 10**9))
        before = path.stat()
        found = await tree.lookup(tree.root_fd, os.fsencode(name))
        tree.close_later(found.fd)
        second = await tree.lookup(tree.root_fd, os.fsencode(name))
        assert path.stat().st_atime_ns == 10**9
        tree.close_later(second.fd, accessed=True)
        with trio.fail_after(30):
            while path.stat().st_atime_ns == 10**9:
                await trio.sleep(0.01)
        after = path.stat()
        assert after.st_atime_ns >= before.st_ctime_ns
        assert (after.st_mtime_ns, after.st_ctime_ns) == (before.st_mtime_ns, before.st_ctime_ns)
        os.utime(path, ns=(10**9, 2 * 10**9))
        tree.access_later(found.handle)
        with trio.fail_after(30):
            while path.stat().st_atime_ns == 10**9 and tree.can_reopen:
                await trio.sleep(0.01)
    tree.access_later(b"\1nonsense")  # nobody is told


async def test_a_subvolume_is_another_file_system(tree: Tree, area: Path) -> None:
    if run("stat", "-f", "-c", "%T", area).strip() != "btrfs":
        return
    run("btrfs", "subvolume", "create", area / "sub")
    with pytest.raises(OSError, match="cross-device"):
        await tree.lookup(tree.root_fd, b"sub")


async def test_the_tree_beneath_a_mount_over_its_root(tree: Tree, area: Path) -> None:
    (area / "d").mkdir()
    (area / "d" / "e").mkdir()
    run("mount", "-t", "tmpfs", "none", area)
    try:
        names, [found] = await tree.names(tree.root_fd, 1)
        assert names == [b"d"]
        assert isinstance(found, Found)
        assert found.fd == -1
        with held(await tree.lookup(tree.root_fd, b"d")) as d, held(await tree.lookup(d.fd, b"e")) as e:
            for below, above in ((d, tree.root), (e, d), (tree.root, tree.root)):
                with held(await tree.parent(below.fd)) as parent:
                    assert parent.handle == above.handle
        await tree.sync_dir(tree.root_fd)
        with held(await tree.create(tree.root_fd, b"f", 0o600, USER)):
            assert os.listdir(area) == []
        assert (await tree.statfs()).f_blocks == os.statvfs(area.parent).f_blocks
    finally:
        run("umount", area)
    assert sorted(os.listdir(area)) == ["d", "f"]


@needs_root
async def test_what_is_created_belongs_to_the_caller(tree: Tree, area: Path) -> None:
    fd = tree.root_fd
    area.chmod(0o700)  # the kernel has already checked the caller, who may have a group that is not told here
    made = [
        await tree.create(fd, b"f", 0o4640, USER),
        await tree.mkdir(fd, b"d", 0o750, USER),
        await tree.mknod(fd, b"p", stat.S_IFIFO | 0o622, 0, USER),
        await tree.mknod(fd, b"c", stat.S_IFCHR | 0o600, os.makedev(1, 3), USER),
        await tree.symlink(fd, b"l", b"/target", USER),
    ]
    for found, mode in zip(made, [0o104640, 0o40750, 0o10622, 0o20600, 0o120777], strict=True):
        with held(found):
            assert (found.stat.st_uid, found.stat.st_gid, found.stat.st_mode) == (USER.uid, USER.gid, mode)
    assert await found_stat(tree, fd, b"c") == (area / "c").lstat()
    assert (area / "c").stat().st_rdev == os.makedev(1, 3)
    with pytest.raises(FileExistsError):
        await tree.create(fd, b"f", 0o600, USER)
    with held(await tree.create(fd, b"roots", 0o600, Caller(0, 0))) as found:  # nothing of the above has stayed
        assert (found.stat.st_uid, found.stat.st_gid) == (0, 0)


@needs_root
async def test_a_setgid_directory_hands_its_group_down(tree: Tree, area: Path) -> None:
    os.chown(area, 0, 777)
    area.chmod(0o2755)
    with (
        held(await tree.create(tree.root_fd, b"f", 0o644, USER)) as file,
        held(await tree.mkdir(tree.root_fd, b"d", 0o755, USER)) as directory,
    ):
        assert (file.stat.st_uid, file.stat.st_gid) == (USER.uid, 777)
        assert (directory.stat.st_gid, directory.stat.st_mode) == (777, 0o42755)


@needs_root
async def test_a_default_acl_is_inherited(tree: Tree, area: Path) -> None:
    run("setfacl", "-d", "-m", "u:4242:rw,o::-", area)
    with held(await tree.create(tree.root_fd, b"f", 0o666, USER)) as found:
        assert b"system.posix_acl_access" in await tree.listxattr(found.fd)
        assert found.stat.st_mode & 0o7 == 0
    assert "user:4242:rw-" in run("getfacl", "-n", "-p", area / "f")


@needs_root
async def test_the_thread_is_root_again_after_a_failure(tree: Tree, area: Path) -> None:
    (area / "taken").touch()
    for _ in range(8):
        with pytest.raises(FileExistsError):
            await tree.mkdir(tree.root_fd, b"taken", 0o700, USER)

    def ids() -> tuple[str, ...]:
        wanted = ("Uid", "Gid", "CapEff")
        return tuple(
            line for line in Path("/proc/thread-self/status").read_text().splitlines() if line.startswith(wanted)
        )

    for _ in range(8):
        assert await tree.workers.run(ids) == ids()


async def test_attributes_by_descriptor(tree: Tree, area: Path) -> None:
    (area / "f").touch()
    (area / "l").symlink_to("f")
    before = (area / "f").stat()
    with (
        held(await tree.lookup(tree.root_fd, b"f")) as f,
        held(await tree.lookup(tree.root_fd, b"l")) as link,
    ):
        await tree.chmod(f.fd, 0o4711)
        assert (area / "f").stat().st_mode == 0o104711
        await tree.utimens(f.fd, None, 1_000_000_001)
        await tree.utimens(link.fd, 5, None)
        assert (area / "f").stat().st_mtime_ns == 1_000_000_001
        assert (area / "f").stat().st_atime_ns == before.st_atime_ns
        assert (area / "l").lstat().st_atime_ns == 5
        await tree.utimens(f.fd, -1_500_000_000, None)
        assert (area / "f").stat().st_atime_ns == -1_500_000_000
        if os.geteuid() == 0:
            await tree.chown(link.fd, 5, -1)
            await tree.chown(f.fd, -1, 6)
            assert ((area / "l").lstat().st_uid, (area / "l").lstat().st_gid) == (5, 0)
            assert ((area / "f").stat().st_uid, (area / "f").stat().st_gid) == (0, 6)
        assert await tree.readlink(link.fd) == b"f"


async def test_extended_attributes_hit_the_link_itself(tree: Tree, area: Path) -> None:
    (area / "f").touch()
    (area / "l").symlink_to("f")
    with (
        held(await tree.lookup(tree.root_fd, b"f")) as f,
        held(await tree.lookup(tree.root_fd, b"l")) as link,
    ):
        await tree.setxattr(f.fd, b"trusted.of", b"file", os.XATTR_CREATE)
        await tree.setxattr(link.fd, b"trusted.of", b"link", 0)
        assert await tree.getxattr(f.fd, b"trusted.of") == b"file"
        assert await tree.getxattr(link.fd, b"trusted.of") == b"link"
        assert os.getxattr(area / "l", "trusted.of") == b"file"
        with pytest.raises(FileExistsError):
            await tree.setxattr(f.fd, b"trusted.of", b"", os.XATTR_CREATE)
        await tree.removexattr(f.fd, b"trusted.of")
        assert await tree.listxattr(f.fd) == []
        with pytest.raises(OSError, match="No data available"):
            await tree.getxattr(f.fd, b"trusted.of")


async def test_names_come_and_go(tree: Tree, area: Path) -> None:
    fd = tree.root_fd
    odd = b"\xff name\n"
    with held(await tree.create(fd, b"a", 0o600, USER)) as file:
        with held(await tree.link(file.fd, fd, odd)) as linked:
            assert (linked.handle, linked.stat.st_nlink) == (file.handle, 2)
        await tree.rename(fd, b"a", fd, b"b", 0)
        with pytest.raises(FileExistsError):
            await tree.rename(fd, b"b", fd, odd, 1)
        assert sorted((await tree.names(fd))[0]) == sorted([b"b", odd])
        await tree.unlink(fd, odd)
        await tree.unlink(fd, b"b")
        assert tree.stat_now(file.fd).st_nlink == 0
        with pytest.raises(FileNotFoundError):
            await tree.link(file.fd, fd, b"again")
    with held(await tree.mkdir(fd, b"d", 0o700, USER)) as directory:
        await tree.sync_dir(directory.fd)
        with pytest.raises(IsADirectoryError):
            await tree.unlink(fd, b"d")
    await tree.rmdir(fd, b"d")
    assert await tree.names(fd, 24) == ([], [])


@needs_root
async def test_a_handle_survives_a_rename_and_not_a_removal(tree: Tree, area: Path) -> None:
    assert tree.can_reopen
    with held(await tree.create(tree.root_fd, b"a", 0o600, USER)) as file:
        handle, number = file.handle, file.stat.st_ino
        os.close(tree.take_created(handle))
        assert tree.take_created(handle) == -1
    (area / "d").mkdir()
    (area / "a").rename(area / "d" / "b")
    drop_caches()
    fd = await tree.reopen(handle)
    assert os.fstat(fd).st_ino == number
    os.close(fd)
    (area / "d" / "b").unlink()
    drop_caches()
    (area / "successor").touch()  # it may have the same inode number
    for gone in (handle, b"", b"\1", b"\0" + bytes(16), b"\1" + bytes(300)):
        with pytest.raises(OSError, match="Stale file handle") as caught:
            await tree.reopen(gone)
        assert caught.value.errno == errno.ESTALE


async def test_a_fifo_is_found_without_being_opened(tree: Tree, area: Path) -> None:
    os.mkfifo(area / "p")
    with held(await tree.lookup(tree.root_fd, b"p")) as found:
        assert stat.S_ISFIFO(found.stat.st_mode)


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.EOVERFLOW], ids=["none", "too long"])
async def test_a_file_system_without_handles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(fd: int) -> bytes:
        raise OSError(number, "no handles")

    monkeypatch.setattr("cachefsd.backing.syscalls.name_to_handle_at", refuse)
    async with Workers(1, "metadata") as workers:
        tree = Tree(os.fspath(tmp_path), workers)
        assert not tree.can_reopen
        with held(await tree.create(tree.root_fd, b"a", 0o600, USER)) as a:
            with held(await tree.lookup(tree.root_fd, b"a")) as again:
                assert again.handle == a.handle
            assert a.handle[1:9] == struct.pack("<Q", a.stat.st_ino)
            with pytest.raises(OSError, match="Stale file handle"):
                await tree.reopen(a.handle)
        tree.close()


async def test_refusals_say_why(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    async with Workers(1, "metadata") as workers:
        with pytest.raises(UserError, match=r"cannot open the backing .*: No such file or directory"):
            Tree(os.fspath(tmp_path / "missing"), workers)
        with pytest.raises(UserError, match=r"cannot open the backing .*: Not a directory"):
            Tree(os.fspath(tmp_path / "file"), workers)
        first = Tree(os.fspath(tmp_path), workers)
        with pytest.raises(UserError, match="is already cached by another daemon"):
            Tree(os.fspath(tmp_path), workers)
        first.close()
        Tree(os.fspath(tmp_path), workers).close()


@needs_root
def test_a_directory_that_may_not_be_read(tmp_path: Path) -> None:
    tmp_path.chmod(0)
    child = os.fork()
    if not child:
        status = 2
        try:
            os.chroot(tmp_path.parent)
            os.setgid(USER.gid)
            os.setuid(USER.uid)
            Tree("/" + tmp_path.name, Workers(0, "none"))
        except UserError as error:
            status = 0 if str(error).endswith("Permission denied") else 1
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


async def test_the_same_backing_is_recognised(tree: Tree, area: Path, tmp_path: Path) -> None:
    evidence = identify(tree)
    assert same(evidence, identify(tree))
    (area / "sub").mkdir()
    for path in (area / "sub", tmp_path):
        other = Tree(os.fspath(path), tree.workers)
        assert not same(evidence, identify(other))
        other.close()
    kind, fsid, uuid, handle = evidence[:8], evidence[8:16], evidence[16:32], evidence[32:]
    unknown = bytes(16)
    assert same(kind + bytes(8) + b"u" * 16 + handle, kind + fsid + b"u" * 16 + handle)  # the id may change
    assert not same(kind + fsid + b"u" * 16 + handle, kind + fsid + b"v" * 16 + handle)
    assert same(evidence, kind + fsid + unknown + handle)
    assert not same(evidence, kind + b"othersid" + unknown + handle)
    assert not same(evidence, kind + fsid + uuid + handle + b"x")
    assert not same(evidence, b"")


async def test_the_evidence_of_a_long_handle_fits_into_a_superblock(
    tree: Tree, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evidence_of(handle: bytes) -> bytes:
        monkeypatch.setattr(tree, "root", tree.root._replace(handle=handle))
        return identify(tree)

    longest = evidence_of(b"\1" + bytes(31))
    assert longest.endswith(b"\1" + bytes(31))  # as pools have it that were made before
    for size in (33, 41, 133):
        one = evidence_of(b"\1" + bytes(size - 1))
        assert len(one) == IDENTITY_MAX
        assert same(one, evidence_of(b"\1" + bytes(size - 1)))
        assert not same(one, evidence_of(b"\1" + bytes(size - 2) + b"x"))
        assert not same(one, longest)
