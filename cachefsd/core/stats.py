"""Counters. Requests are counted once each; promotions and evictions in blocks."""

from __future__ import annotations

from dataclasses import dataclass, field

from .faults import Faults


@dataclass(slots=True)
class WritebackStats:
    """What went from the cache to the backing."""

    bytes: int = 0
    direct_bytes: int = 0
    bounced_bytes: int = 0
    runs: int = 0
    errors: int = 0
    last_error: str | None = None


@dataclass(slots=True)
class RecoveryStats:
    """How the last start went."""

    clean: bool = True
    seconds: float = 0.0
    blocks: int = 0


@dataclass(slots=True)
class Statistics:
    """All counters of one engine, from its start."""

    read_hits: int = 0
    read_misses: int = 0
    write_hits: int = 0
    write_misses: int = 0
    bypassed: int = 0
    promotions: int = 0
    evictions: int = 0
    writeback: WritebackStats = field(default_factory=WritebackStats)
    recovery: RecoveryStats = field(default_factory=RecoveryStats)
    faults: Faults = field(default_factory=Faults)
