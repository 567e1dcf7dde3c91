"""Which mount a path is on, as the kernel's list of mounts says it."""

from __future__ import annotations

import pytest

from cachefsd.fuse.mounts import MountEntry, holder_of

FSTYPE = "fuse.cachefsd"


def entry(number: int, parent: int, place: str, fstype: str = "ext4") -> MountEntry:
    return MountEntry(number, parent, "8:1", place, fstype, "x", frozenset())


ROOT = entry(1, 0, "/")


@pytest.mark.parametrize(
    ("path", "entries", "expected"),
    [
        ("/srv/data", [ROOT, entry(2, 1, "/srv/data", FSTYPE)], 1),
        ("/srv/data", [ROOT, entry(2, 1, "/srv/data"), entry(3, 2, "/srv/data", FSTYPE)], 2),
        ("/srv/data", [ROOT, *(entry(n, n - 1, "/srv/data", FSTYPE) for n in (2, 3, 4))], 1),
        ("/srv/data", [ROOT, entry(2, 1, "/srv"), entry(3, 2, "/srv", "xfs")], 3),
        ("/srv/data", [ROOT, entry(2, 1, "/srv/dat"), entry(3, 1, "/srv/data/sub")], 1),
        ("/srv/data", [entry(2, 1, "/srv"), ROOT], 2),
        ("/", [ROOT], 1),
        ("/srv/data/sub", [ROOT, entry(2, 1, "/srv/data", FSTYPE)], 1),
        ("/srv/data", [ROOT, entry(2, 1, "/srv", FSTYPE)], 2),  # another mount of ours, which is not left out
    ],
)
def test_the_mount_beneath(path: str, entries: list[MountEntry], expected: int) -> None:
    found = holder_of(path, "/srv/data", FSTYPE, entries)
    assert found is not None
    assert found.mount_id == expected


def test_none() -> None:
    assert holder_of("/srv/data", "/srv/data", FSTYPE, []) is None
