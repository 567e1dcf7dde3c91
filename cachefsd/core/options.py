"""What may be tuned, with the defaults and why."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """Tunables of the engine; all times in seconds, watermarks as fractions of all slots."""

    dirty_age_s: float = 5.0
    """Dirty data older than this is written back: long enough that short-lived files never reach the backing, short
    enough that the backing is never far behind (ext4 commits its journal every 5 s). Requests of users have priority
    over it."""
    high_watermark: float = 0.50
    """Above this share of dirty slots writeback starts whatever the age (dm-writecache: 50 %). Half-way from here to a
    full cache it no longer gives way to requests."""
    low_watermark: float = 0.45
    """Writeback that the high watermark started stops here (dm-writecache: 45 %)."""
    full_timeout_s: float = 30.0
    """How long a write waits for a slot before it fails: a dead backing must not hang its writers."""
    writeback_jobs: int = 8
    """Files written back at a time: their syncs share journal commits of the backing."""
    sync_writes: bool = False
    """Class ``disk``: make every write durable before it is acknowledged."""
    commit_s: float = 1.0
    """Class ``disk``: longest time between two commits (dm-writecache: autocommit 1000 ms)."""
    upkeep_s: float = 2.0
    """Pause between two rounds of upkeep: unlinked files, stamps, records without slots."""
    retry_min_s: float = 1.0
    """Pause after a failed writeback of a file, doubled at each failure"""
    retry_max_s: float = 30.0
    """up to this."""

    def retry_pause_s(self, failures: int) -> float:
        """How long a file is left alone that has failed ``failures`` times before, and now again."""
        return min(self.retry_max_s, self.retry_min_s * 2.0 ** min(failures, 30))
