"""What a mount is told: places, sizes and the options of ``-o``."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from cachefsd.core.options import EngineOptions
from cachefsd.errors import ConfigError
from cachefsd.fuse.remount import WORDS

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE | re.ASCII)

_FOR_FSTAB = {
    *("defaults", "rw", "auto", "noauto", "user", "users", "nouser", "owner", "noowner", "group", "nogroup"),
    *("nofail", "_netdev", "async", "silent", "loud"),
    # FUSE leaves all times of access to the file system beneath.
    *("atime", "diratime", "nodiratime", "relatime", "norelatime", "strictatime", "nostrictatime"),
    *("lazytime", "nolazytime"),
}
"""Words of fstab(5) and mount(8) that are meant for others, or change nothing here."""
_FOR_FSTAB_WITH_VALUE = {"comment", "user", "uhelper"}
"""The same, with a value; ``user=NAME`` is what mount(8) makes of ``user``."""
_SHOWN_BY_KERNEL = {"default_permissions", "allow_other", "user_id", "group_id", "max_read", "blksize"}
"""What mount(8) repeats from the mount table at a remount."""
_FOR_FUSE = {"ro", "suid", "nosuid", "dev", "nodev", "exec", "noexec", "dirsync", "noatime"}


def parse_size(text: str) -> int:
    """Bytes of ``4G``, ``512M``, ``64KiB`` or ``4096``; units are powers of 1024.

    :raises ConfigError: it is none of these.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ConfigError(f"{text!r} is not a size; give bytes, or a number with K, M, G or T")
    size = Fraction(match[1]) * _UNITS[match[2].lower()]
    if size.denominator != 1 or size <= 0:
        raise ConfigError(f"{text!r} is not a whole number of bytes above 0")
    return int(size)


def _share(value: object) -> object:
    """``45%`` as well as ``0.45``."""
    if isinstance(value, str) and value.endswith("%"):
        return float(value[:-1]) / 100
    return value


_Seconds = Annotated[float, Field(ge=0, le=10**9, allow_inf_nan=False)]
_Share = Annotated[float, BeforeValidator(_share), Field(ge=0, le=1, allow_inf_nan=False)]
_DEFAULT = EngineOptions()


class Options(BaseModel):
    """The options of ``-o`` that have values or change the engine. Descriptions are their help."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dirty_age: _Seconds = Field(
        default=_DEFAULT.dirty_age_s, description="write back data that has been dirty for this many seconds"
    )
    high_watermark: _Share = Field(
        default=_DEFAULT.high_watermark, description="write back at once above this share of dirty slots"
    )
    low_watermark: _Share = Field(default=_DEFAULT.low_watermark, description="and stop below this one")
    full_timeout: _Seconds = Field(
        default=_DEFAULT.full_timeout_s, description="seconds a write waits for room before it fails"
    )
    writeback_jobs: Annotated[int, Field(ge=1, le=256)] = Field(
        default=_DEFAULT.writeback_jobs, description="files written back at a time"
    )
    sync: bool = Field(
        default=_DEFAULT.sync_writes, description="class disk: make every write durable before it returns"
    )
    commit: Annotated[_Seconds, Field(gt=0)] = Field(
        default=_DEFAULT.commit_s, description="class disk: seconds between two syncs of the pool file"
    )
    retry_min: Annotated[_Seconds, Field(gt=0)] = Field(
        default=_DEFAULT.retry_min_s, description="seconds before a failed writeback is tried again, doubled"
    )
    retry_max: Annotated[_Seconds, Field(gt=0)] = Field(
        default=_DEFAULT.retry_max_s, description="each time up to this"
    )
    writeback_cache: bool = Field(
        default=False, description="keep writes in the page cache: only fsync and unmount make them durable"
    )
    stock_loop: bool = Field(default=False, description="serve with pyfuse3's own, slower request loop")

    def engine(self) -> EngineOptions:
        """The same for the engine."""
        return EngineOptions(
            dirty_age_s=self.dirty_age,
            high_watermark=self.high_watermark,
            low_watermark=self.low_watermark,
            full_timeout_s=self.full_timeout,
            writeback_jobs=self.writeback_jobs,
            sync_writes=self.sync,
            commit_s=self.commit,
            retry_min_s=self.retry_min,
            retry_max_s=self.retry_max,
        )


_FLAGS = {name for name, info in Options.model_fields.items() if info.annotation is bool}


@dataclass(frozen=True, slots=True)
class ParsedOptions:
    """All words of ``-o``: cachefsd's, those for FUSE, and places and sizes for fstab's sake."""

    options: Options
    fuse: tuple[str, ...]
    places: dict[str, str]
    """``cache``, ``size``, ``block_size``, and ``volatile`` (empty), as far as given"""
    remount: tuple[str, ...] | None
    """The flags of mount(8) to be changed, for ``remount``; None where that was not asked for."""
    kept: tuple[str, ...]
    """Names of cachefsd's own options that were given. A remount does not change them."""


_PLACES = {"cache", "size", "block_size", "volatile"}


def parse_options(texts: Iterable[str]) -> ParsedOptions:
    """Read ``-o a,b=c``, given any number of times.

    :raises ConfigError: a word is unknown, or its value impossible.
    """
    values: dict[str, Any] = {}
    fuse: list[str] = []
    places: dict[str, str] = {}
    words = [word for text in texts for word in text.split(",") if word]
    remounting = "remount" in words
    for word in words:
        name, equals, value = word.partition("=")
        if name in _PLACES and bool(equals) == (name != "volatile"):
            if equals and not value:
                raise ConfigError(f"option {name}= takes a value")
            places[name] = value
        elif name in Options.model_fields:
            if bool(equals) == (name in _FLAGS):
                raise ConfigError(f"option {name} takes {'no' if equals else 'a'} value")
            values[name] = value if equals else True
        elif word in _FOR_FUSE:
            fuse.append(word)
        elif remounting and (word == "remount" or name in _SHOWN_BY_KERNEL):
            pass
        elif not _is_for_others(name, bool(equals)):
            raise ConfigError(f"unknown option {name!r}{_guess(name)}")
    flags = tuple(word for word in words if word in WORDS) if remounting else None
    return ParsedOptions(_options(values), tuple(fuse), places, flags, tuple(values))


def _is_for_others(name: str, has_value: bool) -> bool:
    return name.lower().startswith("x-") or name in (_FOR_FSTAB_WITH_VALUE if has_value else _FOR_FSTAB)


def _guess(name: str) -> str:
    close = difflib.get_close_matches(name, [*Options.model_fields, *_FOR_FUSE, *_PLACES], n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _options(values: dict[str, Any]) -> Options:
    try:
        options = Options.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(map(str, first["loc"]))
        raise ConfigError(f"option {name}={first['input']}: {_lower(first['msg'])}") from None
    if options.low_watermark >= options.high_watermark:
        raise ConfigError("option low_watermark must be below high_watermark")
    if options.retry_min > options.retry_max:
        raise ConfigError("option retry_min must not be above retry_max")
    return options


def _lower(text: str) -> str:
    return text[:1].lower() + text[1:]


def option_help() -> str:
    """One line for each option of ``-o``."""
    lines = []
    for name, info in Options.model_fields.items():
        word = name if name in _FLAGS else f"{name}={info.default:g}"
        lines.append(f"{word:<22} {info.description}")
    return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class MountConfig:
    """Everything that one daemon is told. Paths are absolute; sizes in bytes."""

    backing: Path
    mountpoint: Path
    cache: Path
    size: int | None = None
    """Format the cache with this size if there is none."""
    block_size: int = 4096
    volatile: bool = False
    options: Options = field(default_factory=Options)
    fuse: tuple[str, ...] = ()
    without_cache: str = ""
    """The uuid of a cache whose data is given up, see :mod:`cachefsd.service.binding`."""
