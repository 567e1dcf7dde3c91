"""Sizes, options and places, as text."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support_strategies import sizes

from cachefsd.core.options import EngineOptions
from cachefsd.errors import UserError
from cachefsd.service import places
from cachefsd.service.config import Options, option_help, parse_options, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("4K", 4096),
        ("4k", 4096),
        ("4KiB", 4096),
        ("4kb", 4096),
        ("1.5M", 3 << 19),
        (" 2G ", 2 << 30),
        ("1 T", 1 << 40),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(sizes(4096, (1 << 63) - 1).filter(bool), st.sampled_from(["", "K", "M", "G", "T"]))
def test_every_size_is_exact(number: int, unit: str) -> None:
    assert parse_size(f"{number}{unit}") == number << 10 * " KMGT".index(unit or " ")


@given(st.text(max_size=20))
def test_any_text_is_a_size_or_refused(text: str) -> None:
    size, said = 1, "refused"
    try:
        size = parse_size(text)
    except UserError as error:
        said = str(error)
    assert size > 0
    assert "\n" not in said


@pytest.mark.parametrize("text", ["", "G", "four", "-4K", "4X", "4KK", "0", "0.3", "1e9", "4G extra", "\uff14"])
def test_what_is_no_size_is_refused_by_name(text: str) -> None:
    with pytest.raises(UserError, match=r"size|whole number"):
        parse_size(text)


def test_no_options_are_the_engines_defaults() -> None:
    assert parse_options([]).options.engine() == EngineOptions()


def test_options_reach_the_engine() -> None:
    parsed = parse_options(
        [
            "dirty_age=1.5,high_watermark=80%,low_watermark=0.7,full_timeout=3,writeback_jobs=2",
            "sync,commit=0.5,retry_min=2,retry_max=4,stock_loop",
        ]
    )
    assert parsed.options.stock_loop
    assert parsed.options.engine() == EngineOptions(
        dirty_age_s=1.5,
        high_watermark=0.8,
        low_watermark=0.7,
        full_timeout_s=3,
        writeback_jobs=2,
        sync_writes=True,
        commit_s=0.5,
        retry_min_s=2,
        retry_max_s=4,
    )


def test_what_fstab_needs_is_understood_or_ignored() -> None:
    words = "defaults,rw,noauto,nofail,_netdev,x-systemd.automount,comment=mine,cache=/c,size=4G,volatile,nosuid"
    parsed = parse_options([words])
    assert parsed.fuse == ("nosuid",)
    assert parsed.places == {"cache": "/c", "size": "4G", "volatile": ""}


@pytest.mark.parametrize(
    "word",
    [
        *(
            "async",
            "relatime",
            "norelatime",
            "strictatime",
            "nodiratime",
            "lazytime",
            "silent",
            "loud",
            "owner",
            "group",
        ),
        *("user=somebody", "uhelper=udisks2", "X-mount.mkdir=0755", "x-gvfs-show", "x-systemd.requires-mounts-for=/c"),
    ],
)
def test_what_mount_passes_on_changes_nothing(word: str) -> None:
    assert parse_options([word]) == parse_options([])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("dirty_aeg=3", "did you mean 'dirty_age'"),
        ("blah", "unknown option 'blah'"),
        ("relatime=1", "unknown option 'relatime'"),
        ("xenon", "unknown option 'xenon'"),
        ("user_id=0", "unknown option 'user_id'"),
        ("dirty_age", "takes a value"),
        ("sync=1", "takes no value"),
        ("dirty_age=soon", "dirty_age=soon"),
        ("dirty_age=-1", "dirty_age=-1"),
        ("dirty_age=nan", "dirty_age=nan"),
        ("high_watermark=1.2", "high_watermark=1.2"),
        ("high_watermark=x%", "high_watermark=x%"),
        ("writeback_jobs=0", "writeback_jobs=0"),
        ("low_watermark=60%", "below high_watermark"),
        ("retry_min=60", "retry_min"),
        ("commit=0", "commit=0"),
    ],
)
def test_bad_options_are_refused_by_name(words: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse_options([words])
    assert "\n" not in str(caught.value)


def test_every_option_is_in_the_help() -> None:
    assert [line.split("=")[0].split()[0] for line in option_help().splitlines()] == list(Options.model_fields)


def test_default_caches_differ_by_backing_and_stay_the_same() -> None:
    one, other = places.default_cache(Path("/srv/data")), places.default_cache(Path("/srv-data"))
    assert one == places.default_cache(Path("/srv/data"))
    assert one != other
    assert one.name.startswith("srv-data-")
    assert places.default_cache(Path("/")).name.startswith("root-")
    assert len(places.default_cache(Path("/" + "x" * 4000)).name) < 100
