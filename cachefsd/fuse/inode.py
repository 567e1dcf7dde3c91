"""One inode of the backing that the kernel may refer to."""

from __future__ import annotations

import re
import stat
import zlib
from collections.abc import Iterator

from cachefsd.backing.tree import Found
from cachefsd.core.files import CachedFile, Hints
from cachefsd.fuse.invalidation import CachedPages

_MAX_DEPTH = 1024
_MAX_NAMES = 4096  # per directory; 100 bytes each
# What no file system takes for another name but for the case of its letters, or for none at all. Others have rules:
# Unicode's, the short names of FAT (LONGNA~1), dots at the end that do not count, or a length of 143.
_PLAIN = re.compile(rb"[A-Za-z0-9_.+-]{0,127}[A-Za-z0-9_+-]")


class Inode:
    """One inode of the backing that the kernel may refer to."""

    __slots__ = (
        "atime_due",
        "atime_ns",
        "atime_owed",
        "buffered_writers",
        "direct_writers",
        "fd",
        "file",
        "generation",
        "handle",
        "lookups",
        "name",
        "names",
        "number",
        "pages",
        "parent",
        "pins",
        "set_aside",
        "stat",
        "unsynced",
        "xattr_changes",
        "xattrs",
    )

    def __init__(self, number: int, found: Found, parent: Inode | None, name: bytes) -> None:
        self.number = number
        self.handle = found.handle
        self.generation = zlib.crc32(found.handle)
        self.stat = found.stat
        """The backing inode when it was last looked at."""
        self.fd = -1
        """O_PATH, or -1: :meth:`Inodes.using` opens it."""
        self.pins = 0
        """Operations under way that use ``fd``."""
        self.lookups = 0
        """How often the kernel was told of the inode, less what it has forgotten."""
        self.atime_due = True
        """The next read may have to move atime."""
        self.atime_ns = 0
        """When it was last read here, as far as that counts."""
        self.atime_owed = False
        """The backing has not been told of that."""
        self.direct_writers = 0
        """How many opens of it can write and have O_DIRECT."""
        self.buffered_writers = 0
        """How many can write and do not have it."""
        self.pages: CachedPages | None = None
        """While there are direct writers: what has come to the kernel's page cache meanwhile."""
        self.file: CachedFile | None = None
        """Of a regular file, from its first use on, or from the start if the cache holds data of it."""
        self.set_aside = False
        """Of a regular file: when the kernel was told of it, the engine had data of it and let nobody use it."""
        self.parent = parent
        self.name = name
        """The directory and name by which it was last found."""
        self.names: set[bytes] | None = None
        """Of a directory that was made through this mount: every name that has been in it since, in small letters, so
        that others need not be looked for. None where that is not known, or not worth knowing."""
        self.unsynced: dict[bytes, object] = {}
        """Handles of directories in which its names may not be durable, each with a token of the last change there."""
        if parent is not None:
            self.name_changed(parent)  # at first nobody knows
        self.xattrs = found.xattrs
        """Names of its extended attributes, None when not known. The kernel asks for some of them again and again,
        every write has to know of one, and they are hardly ever there."""
        self.xattr_changes = 0
        """What has been listed before one of them is out of date."""

    @property
    def is_file(self) -> bool:
        """Whether it is a regular file: only those are cached."""
        return stat.S_ISREG(self.stat.st_mode)

    def hints(self) -> Hints:
        """What helps to create the file again if the backing loses it."""
        handle = b"" if self.parent is None else self.parent.handle
        status = self.stat
        return Hints(handle, self.name, self.path(), status.st_mode, status.st_uid, status.st_gid)

    def name_changed(self, parent: Inode) -> None:
        """A name of the inode has come to the directory ``parent``, or gone from it."""
        self.unsynced[parent.handle] = object()

    def has_name(self, name: bytes) -> None:
        """A name has come to this directory, or is there."""
        if self.names is not None:
            self.names.add(name.lower())
            if len(self.names) > _MAX_NAMES or not _PLAIN.fullmatch(name):
                self.names = None

    def lacks_name(self, name: bytes) -> bool:
        """Whether it is known that this directory has no such name."""
        return self.names is not None and name.lower() not in self.names and _PLAIN.fullmatch(name) is not None

    def xattr_names_changed(self) -> None:
        """One of its extended attributes has come or gone, or may have."""
        self.xattrs = None
        self.xattr_changes += 1

    def lineage(self) -> Iterator[Inode]:
        """The inode and the directories above it, without the root, as far as they are known."""
        at = self
        for _ in range(_MAX_DEPTH):
            if at.parent is None:
                return
            yield at
            at = at.parent

    def path(self) -> bytes:
        """A path from the root, as far as it is known; a rename above may have made it old."""
        return b"/".join(reversed([inode.name for inode in self.lineage()]))
