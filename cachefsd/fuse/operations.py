"""The FUSE protocol's side of cachefsd: requests in, calls of the engine and of the tree out.

Regular files' data, sizes and times belong to the engine, all else to the backing. The kernel checks
permissions (default_permissions), so everything here is done with the daemon's rights, but for what is
created: that belongs to the caller. The kernel also keeps operations apart that touch the same name, or
the number of names of the same inode.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import pyfuse3
import trio
from pyfuse3 import (
    EntryAttributes,
    FileHandleT,
    FileInfo,
    FileNameT,
    FlagT,
    FUSEError,
    InodeT,
    ModeT,
    ReaddirToken,
    RequestContext,
    SetattrFields,
    StatvfsData,
    XAttrNameT,
)

from cachefsd.backing.tree import RENAME_WHITEOUT, Caller, Found, Tree
from cachefsd.core.engine import Engine
from cachefsd.fuse.atimes import AccessTimes
from cachefsd.fuse.directories import Directories
from cachefsd.fuse.inode import Inode
from cachefsd.fuse.inodes import Inodes
from cachefsd.fuse.openfiles import OpenFiles
from cachefsd.fuse.privileges import CAPABILITY, Privileges, stripped_by
from cachefsd.fuse.replies import attributes, fuse_error, no_entry, reported
from cachefsd.times import clamp

_ACCESS_ACL = b"system.posix_acl_access"
_CHANGES = ("update_uid", "update_gid", "update_mode", "update_size", "update_atime", "update_mtime")


class Operations(pyfuse3.Operations):
    """The handlers. File handles are numbers of opens, those of directories are numbers of their own."""

    supports_dot_lookup = True
    enable_acl = True

    def __init__(self, engine: Engine, tree: Tree, *, writeback_cache: bool = False, noatime: bool = False) -> None:
        """``writeback_cache``: the kernel keeps what is written, with size and times, until it is synced.

        ``noatime``: no read moves the time of access.
        """
        super().__init__()
        self.enable_writeback_cache = writeback_cache
        self._engine: Final = engine
        self._reader: Final = engine.reader
        self._writer: Final = engine.writer
        self._tree: Final = tree
        self._inodes: Final = Inodes(engine, tree)
        self._table: Final = self._inodes.table
        self._files: Final = OpenFiles(engine, self._inodes)
        self._open_files: Final = self._files.table
        self._privileges: Final = Privileges(engine, tree, self._inodes)
        self._atimes: Final = AccessTimes(engine, tree, noatime=noatime)
        self._directories: Final = Directories(self._inodes, tree, self._attributes)
        self.serving: Final = trio.Event()
        """The kernel has got its first answer, and sends what users want from now on."""

    def init(self) -> None:
        self.serving.set()

    def attach(self, device: int, connection: str) -> None:
        """What is mounted is served by this descriptor of /dev/fuse; its connection has this name in /sys."""
        self._files.invalidator.attach(device, connection)

    def detach(self) -> None:
        """The file system is about to be unmounted: let go of the connection."""
        self._files.invalidator.close()

    def close(self) -> None:
        """Release everything that the kernel still referred to when it was unmounted."""
        self.detach()
        self._files.close_all()
        self._inodes.close()

    # ---- data: the hot path, without the decorator's frame

    async def read(self, fh: FileHandleT, off: int, size: int) -> bytes:
        """Data; short only at the end of the file."""
        try:
            opened = self._open_files[fh]
            data = self._reader.read(opened.file, off, size)
            if data is None:
                data = await self._reader.read_slow(opened.file, off, size)
            inode = opened.inode
            if inode.atime_due and opened.atime:
                self._atimes.read(inode)
            if inode.pages is not None and not opened.direct:
                inode.pages.note(off, len(data))
        except Exception as error:
            raise fuse_error("read", error) from None
        return data  # type: ignore[return-value]  # pyfuse3 replies from any buffer, before another task runs

    async def write(self, fh: FileHandleT, off: int, buf: bytes) -> int:
        """Store data durably; how many bytes."""
        try:
            opened = self._open_files[fh]
            inode = opened.inode
            if inode.stat.st_mode & opened.strips or inode.xattrs is None or CAPABILITY in inode.xattrs:
                await self._privileges.strip(inode, opened.strips)
            size = len(buf)
            if not self._writer.write(opened.file, off, buf):
                size = await self._writer.write_slow(opened.file, off, buf)
            inode.atime_due = True
            if inode.pages is not None:
                await self._files.written(opened, inode.pages, off, size)
            if opened.synchronous:
                await self._files.sync(fh)
            return size
        except Exception as error:
            raise fuse_error("write", error) from None

    # ---- attributes

    def _attributes(self, inode: Inode) -> EntryAttributes:
        return attributes(inode, self._engine.block_size)

    async def _look_again(self, inode: Inode) -> EntryAttributes:
        """The attributes of an inode as it is now."""
        if not self._inodes.current_stat(inode):
            async with self._inodes.fds.using(inode):
                self._inodes.current_stat(inode)
        return self._attributes(inode)

    async def getattr(self, inode: InodeT, ctx: RequestContext) -> EntryAttributes:
        """Attributes."""
        try:
            return await self._look_again(self._inodes.get(inode))
        except Exception as error:
            raise fuse_error("getattr", error) from None

    @reported
    async def setattr(
        self,
        inode: InodeT,
        attr: EntryAttributes,
        fields: SetattrFields,
        fh: FileHandleT | None,
        ctx: RequestContext,
    ) -> EntryAttributes:
        """Change owner, mode, size and times, in this order: a change of owner takes setuid away."""
        node = self._inodes.get(inode)
        node.atime_due = True
        async with self._inodes.fds.using(node) as fd:
            if fields.update_uid or fields.update_gid:
                uid = attr.st_uid if fields.update_uid else -1
                await self._privileges.chown(node, fd, uid, attr.st_gid if fields.update_gid else -1)
            if fields.update_mode:
                await self._privileges.chmod(node, fd, stat.S_IMODE(attr.st_mode))
            if fields.update_size:
                await self._privileges.strip(node, stripped_by(ctx.uid))
                await self._engine.attributes.truncate(await self._inodes.file(node), attr.st_size)
            if fields.update_atime or fields.update_mtime:
                await self._set_times(node, fd, attr, fields)
            if not any(getattr(fields, name) for name in _CHANGES):
                if self._may_strip(node, ctx.uid):
                    await self._privileges.strip(node, stripped_by(ctx.uid))
                await self._privileges.touch(node, fd)
            return await self._look_again(node)

    def _may_strip(self, inode: Inode, uid: int) -> bool:
        """Whether a request that changes nothing comes before a write that takes privileges away.

        It alone tells of a write by a user through what root has opened, and its answer tells the kernel at once that
        setuid has gone. But ``chown(path, -1, -1)`` makes the same request, and nobody may do that to others' programs.
        """
        return inode.is_file and (uid == inode.stat.st_uid or self._files.written_to(inode))

    async def _set_times(self, inode: Inode, fd: int, attr: EntryAttributes, fields: SetattrFields) -> None:
        atime = clamp(attr.st_atime_ns) if fields.update_atime else None
        mtime = clamp(attr.st_mtime_ns) if fields.update_mtime else None
        if mtime is not None and inode.file is None and inode.is_file:
            self._engine.require_usable(inode.handle)  # it would be taken for a stranger's change
        file = inode.file
        # With the kernel's writeback cache every fsync of new data comes with its time: that must not wait for the
        # backing. Nor must other times of new data: they go to the backing with it.
        if mtime is not None and file is not None and await self._engine.attributes.set_mtime_of_dirty(file, mtime):
            if atime is None:
                return
            mtime = None
        if mtime is not None and file is not None:
            async with self._engine.attributes.changing(file):
                kept = await self._tree.utimens(fd, atime, mtime)
                await self._engine.attributes.set_mtime(file, mtime, kept)
        else:
            kept = await self._tree.utimens(fd, atime, mtime)
            if mtime is not None and inode.file is not None:  # it was opened meanwhile
                async with self._engine.attributes.changing(inode.file):
                    await self._engine.attributes.set_mtime(inode.file, mtime, kept)
        if atime is not None:
            inode.atime_ns, inode.atime_owed = 0, False
        if inode.file is not None:
            self._engine.attributes.changed(inode.file)

    # ---- names

    @reported
    async def lookup(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> EntryAttributes:
        """Find a name; that there is none may be remembered as well."""
        if name == b".":
            return await self._look_again(await self._inodes.bring_back(parent_inode))
        parent = self._inodes.get(parent_inode)
        if name == b"..":
            async with self._inodes.fds.using(parent) as fd:
                return self._attributes(self._inodes.remember(await self._tree.parent(fd), None, b""))
        try:
            found = await self._find(parent, name)
        except FileNotFoundError:
            return no_entry()
        return self._attributes(self._inodes.remember(found, parent, name))

    async def _find(self, parent: Inode, name: bytes) -> Found:
        if parent.lacks_name(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT))
        found = self._tree.lookup_now(parent.fd, name) if parent.fd >= 0 else None
        if found is None:
            async with self._inodes.fds.using(parent) as fd:
                found = await self._tree.lookup(fd, name)
        return found

    async def forget(self, inode_list: Sequence[tuple[InodeT, int]]) -> None:
        """The kernel no longer refers to these inodes."""
        for number, lookups in inode_list:
            try:
                self._inodes.forget(number, lookups)
            except Exception as error:
                fuse_error("forget", error)

    def _created(self, found: Found, parent: Inode, name: bytes) -> Inode:
        inode = self._inodes.remember(found, parent, name)
        inode.name_changed(parent)
        return inode

    @reported
    async def mknod(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, rdev: int, ctx: RequestContext
    ) -> EntryAttributes:
        """Create a file of any type but a directory."""
        parent = self._inodes.get(parent_inode)
        async with self._inodes.fds.using(parent) as fd:
            found = await self._tree.mknod(fd, name, mode, rdev, Caller(ctx.uid, ctx.gid, ctx.umask))
        return self._attributes(self._created(found, parent, name))

    @reported
    async def mkdir(self, parent_inode: InodeT, name: FileNameT, mode: ModeT, ctx: RequestContext) -> EntryAttributes:
        """Create a directory."""
        parent = self._inodes.get(parent_inode)
        async with self._inodes.fds.using(parent) as fd:
            found = await self._tree.mkdir(fd, name, stat.S_IMODE(mode), Caller(ctx.uid, ctx.gid, ctx.umask))
        made = self._created(found, parent, name)
        made.names = set()
        return self._attributes(made)

    @reported
    async def symlink(
        self, parent_inode: InodeT, name: FileNameT, target: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Create a symbolic link."""
        parent = self._inodes.get(parent_inode)
        async with self._inodes.fds.using(parent) as fd:
            found = await self._tree.symlink(fd, name, target, Caller(ctx.uid, ctx.gid, ctx.umask))
        return self._attributes(self._created(found, parent, name))

    @reported
    async def readlink(self, inode: InodeT, ctx: RequestContext) -> FileNameT:
        """Where a symbolic link leads."""
        async with self._inodes.fds.using(self._inodes.get(inode)) as fd:
            return await self._tree.readlink(fd)

    @reported
    async def link(
        self, inode: InodeT, new_parent_inode: InodeT, new_name: FileNameT, ctx: RequestContext
    ) -> EntryAttributes:
        """Give an inode another name."""
        node, parent = self._inodes.get(inode), self._inodes.get(new_parent_inode)
        async with self._inodes.fds.using(node) as fd, self._inodes.fds.using(parent) as directory:
            found = await self._tree.link(fd, directory, new_name)
        linked = self._created(found, parent, new_name)
        self._inodes.changed(linked)
        return self._attributes(linked)

    @reported
    async def unlink(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove a name of anything but a directory."""
        parent = self._inodes.get(parent_inode)
        found = await self._find(parent, name)
        try:
            async with self._inodes.fds.using(parent) as fd:
                await self._losing(found, lambda: self._tree.unlink(fd, name))
        finally:
            inode = self._known(found)
        self._unnamed(inode, parent)

    async def _losing(self, found: Found, remove: Callable[[], Awaitable[None]]) -> None:
        """Call ``remove``, which takes a name from what was found; the engine is told if it is the last."""
        file = self._engine.find(found.handle)
        if file is None or found.stat.st_nlink > 1 or not stat.S_ISREG(found.stat.st_mode):
            await remove()
            return
        await self._engine.unlinking(file)
        try:
            await remove()
        except BaseException:
            await self._engine.unlink_failed(file)
            raise
        self._engine.unlinked(file)

    def _known(self, found: Found) -> Inode | None:
        """The kernel's inode for what was found, if it has one; takes over the descriptor.

        An inode whose last name goes needs one: nothing else would lead to it.
        """
        inode = self._table.get(self._inodes.number_of(found))
        if inode is None or inode.handle != found.handle:
            self._tree.close_fd(found.fd)
            return None
        self._inodes.fds.take(inode, found.fd)
        return inode

    def _unnamed(self, inode: Inode | None, parent: Inode) -> None:
        """A name of ``inode`` in ``parent`` has gone."""
        if inode is not None:
            self._inodes.current_stat(inode)
            inode.name_changed(parent)
            self._inodes.changed(inode)

    @reported
    async def rmdir(self, parent_inode: InodeT, name: FileNameT, ctx: RequestContext) -> None:
        """Remove an empty directory."""
        parent = self._inodes.get(parent_inode)
        found = await self._find(parent, name)
        try:
            async with self._inodes.fds.using(parent) as fd:
                await self._tree.rmdir(fd, name)
        finally:
            inode = self._known(found)
        self._unnamed(inode, parent)

    @reported
    async def rename(
        self,
        parent_inode_old: InodeT,
        name_old: FileNameT,
        parent_inode_new: InodeT,
        name_new: FileNameT,
        flags: FlagT,
        ctx: RequestContext,
    ) -> None:
        """Rename, with RENAME_NOREPLACE, RENAME_EXCHANGE or RENAME_WHITEOUT; a file of the new name may be lost."""
        keeps = pyfuse3.RENAME_EXCHANGE | pyfuse3.RENAME_NOREPLACE
        if flags & ~(keeps | RENAME_WHITEOUT):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        old_parent, new_parent = self._inodes.get(parent_inode_old), self._inodes.get(parent_inode_new)
        source = await self._find(old_parent, name_old)
        moved, target, lost = self._known(source), None, None
        with contextlib.suppress(FileNotFoundError):
            target = await self._find(new_parent, name_new)
            lost = self._known(target)
        new_parent.has_name(name_new)
        async with self._inodes.fds.using(old_parent) as old_fd, self._inodes.fds.using(new_parent) as new_fd:

            async def rename() -> None:
                caller = Caller(ctx.uid, ctx.gid) if flags & RENAME_WHITEOUT else None
                await self._tree.rename(old_fd, name_old, new_fd, name_new, flags, caller)

            # With two names of one inode rename(2) does nothing.
            if target is None or flags & keeps or target.handle == source.handle:
                await rename()
            else:
                await self._losing(target, rename)
        self._renamed(moved, old_parent, new_parent, name_new)
        if flags & pyfuse3.RENAME_EXCHANGE:
            self._renamed(lost, new_parent, old_parent, name_old)
        else:
            self._unnamed(lost, new_parent)

    def _renamed(self, inode: Inode | None, old: Inode, new: Inode, name: bytes) -> None:
        if inode is not None:
            self._unnamed(inode, old)
            inode.parent, inode.name = new, name
            inode.name_changed(new)

    # ---- open files

    @reported
    async def open(self, inode: InodeT, flags: FlagT, ctx: RequestContext) -> FileInfo:
        """Open a regular file; O_TRUNC is part of it."""
        return await self._open(self._inodes.get(inode), flags, ctx)

    async def _open(self, inode: Inode, flags: int, ctx: RequestContext) -> FileInfo:
        file = await self._inodes.file(inode)
        self._files.require_descriptors(file)
        handle = self._files.add(inode, file, flags, ctx.uid)
        try:
            # At once, so that the caller hears of EROFS, ETXTBSY and the like here and not at a writeback.
            await file.backing.open(write=flags & os.O_ACCMODE != os.O_RDONLY)
            if flags & os.O_TRUNC:
                await self._privileges.strip(inode, stripped_by(ctx.uid))
                await self._engine.attributes.truncate(file, 0)
        except BaseException:
            self._files.close(handle)
            raise
        return FileInfo(fh=FileHandleT(handle), keep_cache=True)

    @reported
    async def create(
        self, parent_inode: InodeT, name: FileNameT, mode: ModeT, flags: FlagT, ctx: RequestContext
    ) -> tuple[FileInfo, EntryAttributes]:
        """Create and open a regular file."""
        parent = self._inodes.get(parent_inode)
        caller, wanted = Caller(ctx.uid, ctx.gid, ctx.umask), stat.S_IMODE(mode)
        # Without root's rights a file that its owner may not write cannot be opened for writing again.
        extra = 0 if os.geteuid() == 0 else 0o600 & ~wanted
        self._files.require_descriptors(None)
        async with self._inodes.fds.using(parent) as fd:
            try:
                found = await self._tree.create(fd, name, wanted | extra, caller)
            except FileExistsError:
                if flags & os.O_EXCL:
                    raise
                extra = 0  # it came into being beneath us
                found = await self._tree.lookup(fd, name)
        inode = self._created(found, parent, name)
        try:
            if not inode.is_file:
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # the kernel will look the name up
            info = await self._open(inode, flags, ctx)
        except BaseException:
            self._inodes.forget(inode.number, 1)
            raise
        finally:
            if (unused := self._tree.take_created(found.handle)) >= 0:
                self._tree.close_fd(unused)
        if extra:
            await self._tree.chmod(inode.fd, wanted)
        return info, await self._look_again(inode)

    @reported
    async def flush(self, fh: FileHandleT) -> None:
        """One of the file's descriptors is being closed: what was written is kept, but was there an error?"""
        self._files.check_at_close(fh)

    @reported
    async def release(self, fh: FileHandleT) -> None:
        """The last descriptor of an open is closed."""
        self._files.close(fh)

    @reported
    async def fsync(self, fh: FileHandleT, datasync: bool) -> None:
        """Make data, attributes and names durable (P2)."""
        await self._files.sync(fh)

    # ---- directories

    @reported
    async def opendir(self, inode: InodeT, ctx: RequestContext) -> FileHandleT:
        """Open a directory."""
        return FileHandleT(self._directories.open(self._inodes.get(inode)))

    @reported
    async def readdir(self, fh: FileHandleT, start_id: int, token: ReaddirToken) -> None:
        """Entries from ``start_id`` on, with their attributes: as many as fit."""
        await self._directories.list(fh, start_id, token)

    @reported
    async def releasedir(self, fh: FileHandleT) -> None:
        """Close a directory."""
        self._directories.close(fh)

    @reported
    async def fsyncdir(self, fh: FileHandleT, datasync: bool) -> None:
        """Make the names in a directory durable, and its own."""
        inode = self._directories.inode(fh)
        async with self._inodes.fds.using(inode) as fd:
            await self._tree.sync_dir(fd)
        await self._inodes.names.sync(inode)

    # ---- the rest

    @reported
    async def statfs(self, ctx: RequestContext) -> StatvfsData:
        """The backing's space, less what the cache still owes it."""
        status = await self._tree.statfs()
        owed = -(-self._engine.space.owed // (status.f_frsize or 1))
        data = StatvfsData()
        data.f_bsize, data.f_frsize, data.f_blocks = status.f_bsize, status.f_frsize, status.f_blocks
        data.f_bfree, data.f_bavail = max(0, status.f_bfree - owed), max(0, status.f_bavail - owed)
        data.f_files, data.f_ffree, data.f_favail = status.f_files, status.f_ffree, status.f_favail
        data.f_namemax = status.f_namemax
        return data

    @reported
    async def access(self, inode: InodeT, mode: ModeT, ctx: RequestContext) -> bool:
        """The kernel decides (default_permissions), and asks only whether the file system objects."""
        self._inodes.get(inode)
        return True

    @reported
    async def getxattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> bytes:
        """The value of an extended attribute."""
        node = self._inodes.get(inode)
        if not await self._inodes.may_have_xattr(node, name):
            raise FUSEError(errno.ENODATA)
        async with self._inodes.fds.using(node) as fd:
            return await self._tree.getxattr(fd, name)

    @reported
    async def setxattr(self, inode: InodeT, name: XAttrNameT, value: bytes, ctx: RequestContext) -> None:
        """Set an extended attribute."""
        node = self._inodes.get(inode)
        async with self._inodes.fds.using(node) as fd:
            if name == CAPABILITY and node.is_file:
                # Every write to the backing takes capabilities away, that of what is dirty now as well.
                await self._engine.write_out(await self._inodes.file(node))
            await self._tree.setxattr(fd, name, value, 0)
            self._inodes.xattr_changed(node)
            if name == _ACCESS_ACL:
                await self._privileges.drop_setgid(node, fd, ctx)

    @reported
    async def listxattr(self, inode: InodeT, ctx: RequestContext) -> Sequence[XAttrNameT]:
        """The names of the extended attributes."""
        async with self._inodes.fds.using(self._inodes.get(inode)) as fd:
            return [XAttrNameT(name) for name in await self._tree.listxattr(fd)]

    @reported
    async def removexattr(self, inode: InodeT, name: XAttrNameT, ctx: RequestContext) -> None:
        """Remove an extended attribute."""
        node = self._inodes.get(inode)
        async with self._inodes.fds.using(node) as fd:
            await self._tree.removexattr(fd, name)
            self._inodes.xattr_changed(node)
            if name == CAPABILITY and node.is_file:
                await self._privileges.sync_lost(node)
