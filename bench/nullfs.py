"""A file system that does nothing, at the speed of the request loop: the ceiling of any other.

One large file. Reads return zeros from one buffer, writes are dropped, everything else answers as a
real file system must (no extended attributes, fsync succeeds).
"""

from __future__ import annotations

import argparse
import errno
import os
import signal
import stat
import sys

import pyfuse3
import trio

from cachefsd.fuse import session

FILE_INODE = pyfuse3.InodeT(2)
FILE_NAME = b"file"


class NullOperations(pyfuse3.Operations):
    """The root directory and one regular file of fixed size."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._zeros = memoryview(bytes(1 << 20))

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = pyfuse3.InodeT(inode)
        is_root = inode == pyfuse3.ROOT_INODE
        entry.st_mode = pyfuse3.ModeT(stat.S_IFDIR | 0o755 if is_root else stat.S_IFREG | 0o644)
        entry.st_size = 4096 if is_root else self._size
        entry.st_uid, entry.st_gid = os.getuid(), os.getgid()
        return entry

    async def getattr(self, inode, ctx=None):
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        return self._attributes(inode)

    async def lookup(self, parent_inode, name, ctx=None):
        if parent_inode == pyfuse3.ROOT_INODE and name == FILE_NAME:
            return self._attributes(FILE_INODE)
        raise pyfuse3.FUSEError(errno.ENOENT)

    async def opendir(self, inode, ctx):
        return inode

    async def readdir(self, fh, start_id, token):
        if start_id == 0:
            pyfuse3.readdir_reply(token, FILE_NAME, self._attributes(FILE_INODE), 1)

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode)

    async def read(self, fh, off, size):
        return self._zeros[: max(0, min(size, self._size - off))]

    async def write(self, fh, off, buf):
        return len(buf)

    async def getxattr(self, inode, name, ctx):
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def fsync(self, fh, datasync):
        return

    async def flush(self, fh):
        return

    async def release(self, fh):
        return

    async def releasedir(self, fh):
        return

    async def forget(self, inode_list):
        return


async def serve(mounted: session.Session, *, pump: bool) -> None:
    """Serve until unmounted, SIGTERM or SIGINT."""
    async with trio.open_nursery() as nursery:

        async def stop_at_signal() -> None:
            with trio.open_signal_receiver(signal.SIGTERM, signal.SIGINT) as signals:
                async for _ in signals:
                    mounted.request_stop()

        nursery.start_soon(stop_at_signal)
        await mounted.run(pump=pump)
        nursery.cancel_scope.cancel()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("mountpoint")
    parser.add_argument("--loop", choices=["pump", "stock"], default="pump")
    parser.add_argument("--size-mib", type=int, default=1024)
    options = parser.parse_args()
    mounted = session.mount(NullOperations(options.size_mib << 20), options.mountpoint, fsname="nullfs")
    try:
        trio.run(lambda: serve(mounted, pump=options.loop == "pump"), strict_exception_groups=True)
    finally:
        mounted.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
