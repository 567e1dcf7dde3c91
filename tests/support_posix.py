"""Doing things to files and noting what came of it, so that two file systems can be compared."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def attempt(call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
    """What a call returns, or the name of its error."""
    try:
        return call(*arguments, **keywords)
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error.errno))


def facts(path: Path | int) -> Any:
    """What two file systems must agree upon about an inode; sizes of directories are their own affair."""

    def look() -> tuple[Any, ...]:
        status = os.fstat(path) if isinstance(path, int) else os.lstat(path)
        size = None if stat.S_ISDIR(status.st_mode) else status.st_size
        return (oct(status.st_mode), status.st_nlink, status.st_uid, status.st_gid, size, status.st_rdev)

    return attempt(look)


def tree(root: Path) -> dict[str, Any]:
    """Facts and content of everything below a directory."""
    found = {}
    for above, directories, files in os.walk(os.fsencode(root)):
        for name in directories + files:
            path = os.path.join(above, name)
            status = facts(Path(os.fsdecode(path)))
            content: Any = None
            if os.path.islink(path):
                content = os.readlink(path)
            elif stat.S_ISREG(os.lstat(path).st_mode):
                content = attempt(lambda path=path: Path(os.fsdecode(path)).read_bytes())
            found[os.fsdecode(os.path.relpath(path, os.fsencode(root)))] = (status, content)
    return found


def as_user(uid: int, gid: int, groups: list[int], call: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function in a process of that user; what it returns must pickle."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            os.close(reader)
            os.setgroups(groups)
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(call(*arguments), pipe)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(pid, 0)
    assert status == 0, "the other user's process failed"
    return pickle.loads(data)
