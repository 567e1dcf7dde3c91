"""The comparison in the lab: which way its ratios go, what it says of errors, and in which order it measures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest

from bench.lab import report
from bench.lab.__main__ import plan, tell


def step(number: int, candidate: str, delay_ms: int, **cells: dict[str, Any]) -> dict[str, Any]:
    return {"round": number, "candidate": candidate, "delay_ms": delay_ms, "cells": cells}


RESULT = {
    "options": {"delays": [0, 2]},
    "latency_ms": {"0": 0.1, "2": 2.5},
    "steps": [
        *(step(number, "cachefsd", 2, fsync={"per_second": rate}) for number, rate in enumerate((300, 90, 200), 1)),
        step(1, "bcache", 2, fsync={"per_second": 100}, burst={"acknowledged_s": 1.0, "drained_s": 6.0}),
        step(1, "cachefsd", 0, burst={"acknowledged_s": 2.0, "drained_s": 3.0}, mix={"error": "...\nOSError: no"}),
        step(1, "ext4-DAX", 0, burst={"acknowledged_s": 0.5, "drained_s": 0.5}, fsync={"per_second": 800}),
        {"round": 2, "candidate": "dm-cache", "delay_ms": 2, "error": "Traceback\nGuestError: gone\n"},
    ],
}


def test_above_one_is_ahead_for_rates_and_for_times() -> None:
    known = report.medians(RESULT)
    assert known["2", "cachefsd", "fsync"] == 200
    assert report.ratio(known, "2", "bcache", "fsync") == 2  # twice as many
    assert report.ratio(known, "0", "ext4-DAX", "burst") == 0.25  # four times as long
    assert report.ratio(known, "0", "ext4-DAX", "drain") == pytest.approx(1 / 6)


def test_what_does_not_use_the_disk_counts_at_every_delay() -> None:
    known = report.medians(RESULT)
    assert known["2", "ext4-DAX", "fsync"] == known["0", "ext4-DAX", "fsync"] == 800
    assert report.ratio(known, "2", "ext4-DAX", "fsync") == 0.25


def test_what_was_not_measured_has_no_ratio() -> None:
    assert report.ratio(report.medians(RESULT), "0", "bcache", "fsync") is None


def test_errors_are_told_and_lose_nothing_else(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    assert tell(RESULT, tmp_path / "run.json") == 1
    said = capsys.readouterr()
    assert "round 1, cachefsd, 0 ms, mix: OSError: no" in said.err
    assert "round 2, dm-cache, 2 ms: GuestError: gone" in said.err
    assert "| 4 KiB random write, fsync after each | 200 | 100 (x 2.00) | 800 (x 0.25) |" in said.out
    assert (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG")


def test_rounds_go_forwards_and_backwards() -> None:
    options = argparse.Namespace(rounds=2, delays=[0, 8], candidates=["cachefsd", "bcache", "ext4-DAX"])
    order = [(each["delay_ms"], each["candidate"]) for each in plan(options)]
    once = [(0, "cachefsd"), (0, "bcache"), (0, "ext4-DAX"), (8, "cachefsd"), (8, "bcache")]
    assert order == [*once, *reversed(once)]
