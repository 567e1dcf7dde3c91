"""Setuid, setgid and capabilities: who loses them, and that it is durable before the data that takes them away."""

from __future__ import annotations

import errno
import os
import stat
from typing import Final

import pyfuse3
from pyfuse3 import RequestContext

from cachefsd.backing.tree import Tree
from cachefsd.core.engine import Engine
from cachefsd.fuse.inode import Inode
from cachefsd.fuse.inodes import Inodes

CAPABILITY: Final = b"security.capability"
_SETID = stat.S_ISUID | stat.S_ISGID


def stripped_by(uid: int) -> int:
    """What of setuid and setgid a change by a user takes away: for root (who has CAP_FSETID) both stay, as in Linux."""
    return _SETID if uid else 0


class Privileges:
    """What changes owner and mode, and what happens to privileges at a write.

    :raises OSError: from the backing, in all methods.
    """

    def __init__(self, engine: Engine, tree: Tree, inodes: Inodes) -> None:
        self._engine: Final = engine
        self._tree: Final = tree
        self._inodes: Final = inodes

    async def strip(self, inode: Inode, bits: int) -> None:
        """Take capabilities away, and of setuid and setgid what ``bits`` has, durably.

        The kernel leaves that to us (``handshake.HANDLE_KILLPRIV_V2``), or has done it already but for what comes
        through a map or is truncated at open.
        """
        async with self._inodes.fds.using(inode) as fd:
            self._inodes.current_stat(inode)
            mode = inode.stat.st_mode
            # Setgid without the group's execution asks for mandatory locks, and gives nobody any rights.
            lost = mode & bits if mode & stat.S_IXGRP else mode & bits & stat.S_ISUID
            if lost:
                await self.chmod(inode, fd, stat.S_IMODE(mode) & ~lost)
            if await self._inodes.may_have_xattr(inode, CAPABILITY):
                try:
                    await self._tree.removexattr(fd, CAPABILITY)
                except OSError as error:
                    if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                        raise
                await self.sync_lost(inode)
                # Only now, as another write must not take them for gone before they are durably.
                inode.xattr_names_changed()

    async def chown(self, inode: Inode, fd: int, uid: int, gid: int) -> None:
        """Change owner and group, -1 to leave one as it is; takes privileges of a file away, as in Linux."""
        self._inodes.current_stat(inode)
        loses = inode.is_file and (inode.stat.st_mode & _SETID or await self._inodes.may_have_xattr(inode, CAPABILITY))
        await self._tree.chown(fd, uid, gid)
        self._inodes.xattr_changed(inode)
        if loses:
            await self.sync_lost(inode)

    async def chmod(self, inode: Inode, fd: int, mode: int) -> None:
        """Change the permissions."""
        self._inodes.current_stat(inode)
        lost = inode.stat.st_mode & ~mode & _SETID
        if mode & _SETID and inode.is_file and os.geteuid() != 0:
            # Without root's rights, a write to the backing later on would take setuid away again.
            await self._engine.write_out(await self._inodes.file(inode))
        await self._tree.chmod(fd, mode)
        self._inodes.current_stat(inode)
        self._inodes.changed(inode)
        if lost and inode.is_file:
            await self.sync_lost(inode)

    async def touch(self, inode: Inode, fd: int) -> None:
        """Let ctime be now. chown(2) without owner and group asks for this.

        Only the owner may ask for it of what is setuid or setgid, and has been answered by :meth:`strip`.
        """
        self._inodes.current_stat(inode)
        mode = inode.stat.st_mode
        if stat.S_ISLNK(mode):
            await self._tree.chown(fd, -1, -1)
        elif not (inode.is_file and mode & _SETID):
            await self._tree.chmod(fd, stat.S_IMODE(mode))
        self._inodes.changed(inode)

    async def sync_lost(self, inode: Inode) -> None:
        """Make it durable that a file has no setuid, setgid or capabilities any more.

        They go before a write, whose data will be durable at once. A power cut must not bring them back over data of
        somebody else (O10).
        """
        file = await self._inodes.file(inode)
        self._engine.attributes.changed(file)
        await self._engine.sync_inode(file)

    async def drop_setgid(self, inode: Inode, fd: int, ctx: RequestContext) -> None:
        """Do what the backing's kernel would have done, had the caller and not the daemon set the ACL."""
        self._inodes.current_stat(inode)
        mode, gid = inode.stat.st_mode, inode.stat.st_gid
        if not mode & stat.S_ISGID or ctx.uid == 0 or ctx.gid == gid:
            return
        if gid not in pyfuse3.get_sup_groups(ctx.pid):
            await self.chmod(inode, fd, stat.S_IMODE(mode) & ~stat.S_ISGID)
