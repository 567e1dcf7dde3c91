"""Open directories and how they are listed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import pyfuse3
from pyfuse3 import EntryAttributes, FileNameT, InodeT, ModeT, ReaddirToken

from cachefsd.backing.tree import Listed, Tree
from cachefsd.fuse.inode import Inode
from cachefsd.fuse.inodes import Inodes

_FIRST_BATCH = 24  # directory entries of average length that fit into one reply of 4 KiB
_DOTS = (b".", b"..")
_AT_ONCE = 4  # so many names are looked at in the loop, if that takes no waiting
_NO_NUMBER = (1 << 64) - 2  # no file has it


class _Directory:
    """An open directory: its names as they were when it was last read from the start."""

    __slots__ = ("batch", "inode", "names", "position", "sought")

    def __init__(self, inode: Inode) -> None:
        self.inode = inode
        self.names: list[bytes] = []
        self.batch = _FIRST_BATCH
        """About how many entries fit into one reply, or less after a seek."""
        self.position = 0
        """Where the last reply has ended."""
        self.sought = False
        """Whether replies are shorter than they could be, as somebody went to where that was not. Who seeks mostly
        wants one entry, and goes elsewhere then: the attributes of a whole reply would be looked at for nothing."""


class Directories:
    """The open ones, by file handle."""

    def __init__(self, inodes: Inodes, tree: Tree, attributes: Callable[[Inode], EntryAttributes]) -> None:
        self._inodes: Final = inodes
        self._tree: Final = tree
        self._attributes: Final = attributes
        self._open: dict[int, _Directory] = {}
        self._next = 1

    def open(self, inode: Inode) -> int:
        """A handle for one more open of the directory."""
        number = self._next
        self._next += 1
        self._open[number] = _Directory(inode)
        return number

    def close(self, handle: int) -> None:
        """The handle is no longer used."""
        del self._open[handle]

    def inode(self, handle: int) -> Inode:
        """The directory that was opened."""
        return self._open[handle].inode

    async def list(self, handle: int, start_id: int, token: ReaddirToken) -> None:
        """Reply with the entries from number ``start_id`` on, and their attributes: as many as fit."""
        directory = self._open[handle]
        async with self._inodes.fds.using(directory.inode) as fd:
            first: Sequence[Listed] | None = None
            if start_id == 0:
                if directory.sought:
                    directory.batch, directory.sought = _FIRST_BATCH, False
                names, first = await self._tree.names(fd, max(0, directory.batch - len(_DOTS)))
                directory.names = [*_DOTS, *names]
            elif start_id != directory.position:
                directory.batch, directory.sought = 1, True
            names = directory.names
            directory.position = start_id
            while start_id < len(names):
                batch = names[start_id : start_id + directory.batch]
                # Not kept for the next reply: attributes must not be older than the request for them.
                found, first = first, None
                if found is None:
                    found = await self._look(fd, [name for name in batch if name not in _DOTS])
                done = self._reply(directory.inode, token, start_id, batch, found)
                start_id += done
                directory.position = start_id
                if done < len(batch):
                    directory.batch, directory.sought = max(1, done), False
                    return
                if directory.sought:
                    directory.batch *= 2
                    if any(found):
                        return
                else:
                    directory.batch = max(4, directory.batch // 4)  # the reply is nearly full

    async def _look(self, fd: int, names: Sequence[bytes]) -> Sequence[Listed]:
        """What :meth:`Tree.stat_many` says."""
        if len(names) <= _AT_ONCE:
            found = []
            try:
                for name in names:
                    entry = self._tree.lookup_now(fd, name)
                    if entry is None:
                        break
                    found.append(entry)
                else:
                    return found
            except OSError:
                pass  # the other way tells of each name apart
            for entry in found:
                self._tree.close_fd(entry.fd)
        return await self._tree.stat_many(fd, names)

    def _reply(
        self, parent: Inode, token: ReaddirToken, start_id: int, batch: Sequence[bytes], found: Sequence[Listed]
    ) -> int:
        """Add entries to a reply; how many of ``batch`` are done. ``found`` has those of them that are no dots."""
        rest = iter(found)
        for index, name in enumerate(batch):
            next_id = start_id + index + 1
            if name in _DOTS:
                above = parent.parent if name == b".." and parent.parent is not None else parent
                if not pyfuse3.readdir_reply(token, FileNameT(name), self._attributes(above), next_id):
                    return index
                continue
            entry = next(rest)
            if entry is None:
                continue
            if isinstance(entry, OSError):
                if not pyfuse3.readdir_reply(token, FileNameT(name), _name_only(), next_id):
                    return index
                continue
            inode = self._inodes.remember(entry, parent, name)
            if not pyfuse3.readdir_reply(token, FileNameT(name), self._attributes(inode), next_id):
                self._inodes.forget(inode.number, 1)
                return index
        return len(batch)


def _name_only() -> EntryAttributes:
    """What is told of an entry that could not be looked at.

    The kernel hands the name on, with a type that is not known. It takes no inode of this type, but tells us
    that it has forgotten one of this number.
    """
    nothing = EntryAttributes()
    nothing.st_ino, nothing.st_mode = InodeT(_NO_NUMBER), ModeT(0)
    return nothing
