"""Times of access: FUSE leaves them to us, and what the cache answers does not reach the backing.

They move in memory, as the mount options of the backing have it (noatime, relatime, strictatime). They are handed on
when the kernel forgets the inode. Then the backing is told of one access, which moves nothing but atime: a time that is
set moves ctime as well. What the kernel answers from its page cache is never seen here.
"""

from __future__ import annotations

import os
from typing import Final

from cachefsd.backing.tree import Tree
from cachefsd.core.engine import Engine
from cachefsd.fuse.inode import Inode

_DAY_NS = 24 * 3600 * 10**9
_ST_RELATIME = 4096  # statvfs(3)


class AccessTimes:
    """Which reads move them."""

    def __init__(self, engine: Engine, tree: Tree, *, noatime: bool) -> None:
        """``noatime``: never."""
        flags = os.statvfs(tree.root_fd).f_flag
        self._engine: Final = engine
        self._never = noatime or bool(flags & os.ST_NOATIME)
        self._always = not self._never and not flags & _ST_RELATIME

    def read(self, inode: Inode) -> None:
        """A regular file has been read whose ``atime_due`` is set."""
        if not self._always:
            inode.atime_due = False
        if self._never or inode.file is None:
            return
        now, atime = self._engine.cache.now_ns(), max(inode.stat.st_atime_ns, inode.atime_ns)
        changed = max(inode.file.mtime_ns, inode.file.ctime_ns)
        if self._always or atime <= changed or now - atime >= _DAY_NS:
            inode.atime_ns = now
            inode.atime_owed = True
