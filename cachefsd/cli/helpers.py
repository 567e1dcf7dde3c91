"""The helpers of mount(8) and umount(8) for the type ``fuse.cachefsd`` in fstab(5).

/sbin/mount.fuse.cachefsd and /sbin/umount.fuse.cachefsd are links to ``cachefsd``. The second one is there so that
umount(8), and with it a shutdown, waits until the daemon has let go of the cache and the backing.
"""

from __future__ import annotations

import getopt
import os

import click

from cachefsd.fuse.mounts import FSTYPE

_MOUNT, _UMOUNT = f"mount.{FSTYPE}", f"umount.{FSTYPE}"


def as_command(argv: list[str]) -> list[str]:
    """What ``cachefsd`` is told by a command line, which may be that of a helper.

    :raises click.UsageError: mount(8) would not say that.
    """
    name, words = os.path.basename(argv[0]), argv[1:]
    if name == _MOUNT:
        return _mount(*_parse(name, "fnsvo:t:", words))
    if name == _UMOUNT:
        return _unmount(*_parse(name, "flnrvt:", words))
    if words and words[0].startswith("/"):
        # No command: so calls it /sbin/mount.fuse, which mount(8) takes where there is no helper of our own.
        return _mount(*_parse(name, "fnsvo:t:", words))
    return words


def _parse(name: str, letters: str, words: list[str]) -> tuple[list[tuple[str, str]], list[str]]:
    try:
        return getopt.gnu_getopt(words, letters)
    except getopt.GetoptError as error:
        raise click.UsageError(f"{name}: {error}") from None


def _mount(flags: list[tuple[str, str]], places: list[str]) -> list[str]:
    if ("-f", "") in flags:
        raise click.exceptions.Exit(0)  # mount --fake: as if
    if len(places) != 2:
        raise click.UsageError(f"{_MOUNT} takes the backing and the mount point")
    options = [word for flag, value in flags if flag == "-o" for word in ("-o", value)]
    return ["mount", *options, "--", *places]


def _unmount(flags: list[tuple[str, str]], places: list[str]) -> list[str]:
    if len(places) != 1:
        raise click.UsageError(f"{_UMOUNT} takes the mount point")
    lazy = ["--lazy"] if ("-l", "") in flags else []
    if ("-f", "") in flags:
        # The kernel breaks the connection of a daemon that hangs: asking that one would be no use.
        os.execvp("umount", ["umount", "--internal-only", "--force", *lazy, "--", *places])
    return ["unmount", *lazy, "--", *places]
