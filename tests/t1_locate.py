"""Finding inodes by handle with and without the kernel's help."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
from support_fs import area, below, file_system  # noqa: F401  (fixtures)

from cachefsd.backing import handles
from cachefsd.backing.locate import Locator


def handle_of(path: Path) -> bytes:
    fd = os.open(path, os.O_PATH)
    try:
        return handles.file_handle(fd)
    finally:
        os.close(fd)


def inode_of(fd: int) -> int:
    try:
        return os.fstat(fd).st_ino
    finally:
        os.close(fd)


@pytest.mark.parametrize("kernel", [True, False], ids=["by handle", "by name"])
async def test_an_inode_is_found_again(area: Path, kernel: bool) -> None:  # noqa: F811
    (area / "d").mkdir()
    (area / "d" / "f").touch()
    handle, inode = handle_of(area / "d" / "f"), (area / "d" / "f").stat().st_ino
    async with below(area) as lower:
        lower.tree.can_reopen &= kernel
        known = Locator(lower.tree, lambda _: b"d/f")
        assert inode_of(known(handle)) == inode
        assert inode_of(known(handle_of(area))) == area.stat().st_ino
        (area / "d" / "f").rename(area / "g")
        (area / "d" / "f").touch()  # another file of that name is not taken for it
        assert inode_of(known(handle)) == inode
        unknown = Locator(lower.tree, lambda _: b"")
        assert inode_of(unknown(handle)) == inode
        (area / "g").unlink()
        os.sync()
        with pytest.raises(OSError, match="Stale") as caught:
            unknown(handle)
        assert caught.value.errno == errno.ESTALE
