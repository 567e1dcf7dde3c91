"""Which flags a mount has after a remount."""

from __future__ import annotations

import pytest

from cachefsd.fuse.remount import new_flags
from cachefsd.service.config import parse_options


@pytest.mark.parametrize(
    ("options", "words", "expected"),
    [
        ("rw,relatime,user_id=0", "ro", "ro,relatime"),
        ("ro,nosuid,nodev,relatime", "rw", "nosuid,nodev,relatime"),
        ("rw,nosuid,relatime", "suid,noexec", "noexec,relatime"),
        ("rw,relatime", "noatime", "noatime"),
        ("rw,noatime", "relatime,strictatime", "strictatime"),
        ("rw,noatime", "atime", ""),
        ("rw", "ro,rw", ""),
        ("rw", "rw,ro", "ro"),
        ("rw,lazytime,nodiratime", "nolazytime,diratime", ""),
        ("rw,nodev", "", "nodev"),
    ],
)
def test_later_words_win_and_the_others_stay(options: str, words: str, expected: str) -> None:
    flags = new_flags(options.split(","), [word for word in words.split(",") if word])
    assert flags == {word for word in expected.split(",") if word}


def test_the_words_of_a_remount() -> None:
    parsed = parse_options(["ro,remount,relatime,user_id=0,allow_other,dirty_age=5,cache=/c,nofail,max_read=4096"])
    assert parsed.remount == ("ro", "relatime")
    assert parsed.kept == ("dirty_age",)
    assert parse_options(["ro,relatime"]).remount is None
