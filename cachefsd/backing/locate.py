"""Finding an inode again by its handle, also where the kernel does not open handles.

That takes CAP_DAC_READ_SEARCH and a file system that supports it. Without them a handle still tells whether
an inode is the one that is looked for, so names are tried: the last one known, then every one there is.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final

from cachefsd.backing.tree import Tree


class Locator:
    """From a handle to an O_PATH descriptor. Calls block, and may come from several threads.

    ``path_of`` gives the path from the root that was last known for a handle, or an empty one.
    """

    def __init__(self, tree: Tree, path_of: Callable[[bytes], bytes]) -> None:
        self._tree: Final = tree
        self._path_of: Final = path_of
        self._index: dict[bytes, bytes] | None = None

    def __call__(self, handle: bytes) -> int:
        """
        :raises OSError: ESTALE when there is no such inode.
        """
        if self._tree.can_reopen:
            return self._tree.open_handle(handle)
        fd = self._try(handle, self._path_of(handle))
        if fd < 0:
            if self._index is None:
                # Once: what is renamed from now on is renamed by us, and the path known.
                self._index = self._scan()
            fd = self._try(handle, self._index.get(handle, b""))
        if fd < 0:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return fd

    def _try(self, handle: bytes, path: bytes) -> int:
        if handle == self._tree.root.handle:
            return os.dup(self._tree.root_fd)
        if not path:
            return -1
        fd = os.dup(self._tree.root_fd)
        try:
            for name in path.split(b"/"):
                found = self._tree.find(fd, name)
                os.close(fd)
                fd = found.fd
        except OSError:
            os.close(fd)
            return -1
        if found.handle != handle:
            os.close(fd)
            return -1
        return fd

    def _scan(self) -> dict[bytes, bytes]:
        """A path for the handle of everything there is."""
        index: dict[bytes, bytes] = {}
        for above, directories, files, fd in os.fwalk(b".", dir_fd=self._tree.root_fd):
            for name in directories + files:
                try:
                    found = self._tree.find(fd, name)
                except OSError:
                    continue  # gone meanwhile, or on another file system
                os.close(found.fd)
                index[found.handle] = os.path.normpath(os.path.join(above, name))
        return index
