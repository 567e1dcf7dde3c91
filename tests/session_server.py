"""A small file system for t4_session.py, in a process of its own. Prints "ready" once it is mounted.

``fast`` reads at once; a read of ``slow`` waits until ``gate`` has been written to; a read of ``cpu`` gives
the seconds of CPU time that this process has used, one of ``getxattrs`` how many extended attributes have been
asked for; ``plain`` is written to through the page cache, as files usually are. ``meet-…`` do not exist, and
nobody is told so before two of them are being looked up. SIGTERM asks the session to stop, SIGUSR1 opens the gate.
"""

from __future__ import annotations

import argparse
import errno
import logging
import signal
import stat
import sys
import time

import pyfuse3
import trio

from cachefsd.backing import mountcalls
from cachefsd.errors import UserError
from cachefsd.fuse import handshake, session

NAMES = [b"fast", b"slow", b"gate", b"cpu", b"waiting", b"getxattrs", b"plain"]
FIRST_INODE = 2


class Operations(pyfuse3.Operations):
    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()
        self.waiting = 0
        self.getxattrs = 0
        self.meeting = 0
        self.met = trio.Event()

    def _attributes(self, inode: int) -> pyfuse3.EntryAttributes:
        entry = pyfuse3.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode == pyfuse3.ROOT_INODE else stat.S_IFREG | 0o644
        return entry

    async def getattr(self, inode, ctx=None):
        return self._attributes(inode)

    async def setattr(self, inode, attr, fields, fh, ctx):
        return self._attributes(inode)

    async def lookup(self, parent_inode, name, ctx=None):
        if name.startswith(b"meet-"):
            self.meeting += 1
            if self.meeting == 2:
                self.met.set()
            await self.met.wait()
        if name not in NAMES:
            raise pyfuse3.FUSEError(errno.ENOENT)
        return self._attributes(FIRST_INODE + NAMES.index(name))

    async def open(self, inode, flags, ctx):
        return pyfuse3.FileInfo(fh=inode, direct_io=NAMES[inode - FIRST_INODE] != b"plain")

    async def read(self, fh, off, size):
        name = NAMES[fh - FIRST_INODE]
        if off > 0:
            return b""
        if name == b"slow":
            self.waiting += 1
            await self.gate.wait()
        if name == b"waiting":
            return b"%d" % self.waiting
        if name == b"getxattrs":
            return b"%d" % self.getxattrs
        return b"%.3f" % time.process_time() if name == b"cpu" else name

    async def write(self, fh, off, buf):
        name = NAMES[fh - FIRST_INODE]
        if name == b"gate":
            self.gate.set()
        return len(buf)

    async def getxattr(self, inode, name, ctx):
        self.getxattrs += 1
        raise pyfuse3.FUSEError(errno.ENODATA)

    async def flush(self, fh):
        return

    async def release(self, fh):
        return

    async def forget(self, inode_list):
        return


async def serve(mounted: session.Session, operations: Operations, pump: bool) -> None:
    async def obey(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGTERM, signal.SIGUSR1) as signals:
            task_status.started()
            async for number in signals:
                if number == signal.SIGTERM:
                    mounted.request_stop()
                else:
                    operations.gate.set()

    async with trio.open_nursery() as nursery:
        await nursery.start(obey)
        print("ready", flush=True)
        await mounted.run(pump=pump)
        nursery.cancel_scope.cancel()


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("mountpoint")
    parser.add_argument("--loop", choices=["pump", "stock"], default="pump")
    parser.add_argument("--pretend", choices=["no-name", "other-version", "old-kernel", "before-6.5"])
    parser.add_argument("--keep", action="store_true", help="leave the mount, dead")
    parser.add_argument("--fsname", default="session, test")
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    if options.pretend == "no-name":
        session._WAITER = "_no_such_name"
    elif options.pretend == "other-version":
        pyfuse3.__version__ = "3.6.0"
    elif options.pretend == "old-kernel":
        handshake.WANTED = 0  # as if it had not offered any
    elif options.pretend == "before-6.5":

        def refused(copy: int, above: int) -> None:
            raise OSError(errno.EINVAL, "no such flag")

        mountcalls.put_beneath = refused
    operations = Operations()
    try:
        mounted = session.mount(operations, options.mountpoint, fsname=options.fsname)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    try:
        trio.run(serve, mounted, operations, options.loop == "pump")
    finally:
        mounted.close(unmount=not options.keep)
    return 0


if __name__ == "__main__":
    sys.exit(main())
