"""The benchmarks' own arithmetic: ratios, bars, the order of rounds, and headers made in numpy."""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xxhash

from bench import machine, report
from bench.candidates import NATIVE, PATCHES, Served, own, served
from bench.disks import Absent, memory
from bench.question import Answer, Bar, Figures, Question, Scale, ask
from bench.questions import all_questions
from bench.sparsepool import dirty_headers
from cachefsd.media.header import HeaderCodec
from cachefsd.media.pool import open_pool
from cachefsd.media.ports import SlotState

FIRST, SECOND = (replace(NATIVE, name=name) for name in ("first", "second"))
SPEED = "speed [1/s]"


def question(measure, *bars: Bar) -> Question:
    return Question(1, "title", "about", candidates=[FIRST, SECOND], measure=measure, bars=bars)


def scale(base: Path, rounds: int = 3) -> Scale:
    return Scale(rounds=rounds, seconds=0.1, quick=False, base=base)


def test_every_question_of_the_table_is_there_once() -> None:
    assert [each.number for each in all_questions()] == list(range(1, 15))


def test_candidates_take_turns_forwards_and_backwards(tmp_path: Path) -> None:
    order = []

    def measure(served: Served, scale: Scale) -> Figures:
        assert not list(served.directory.iterdir())
        (served.directory / "file").write_bytes(b"data")
        order.append(served.candidate.name)
        return {SPEED: 1.0}

    answer = ask(question(measure), scale(tmp_path))
    assert order == ["first", "second", "second", "first", "first", "second"]
    assert [list(each) for each in answer.rounds] == [["first", "second"], ["second", "first"], ["first", "second"]]
    assert not list(tmp_path.iterdir())


def test_a_bar_is_about_the_median_of_ratios_within_rounds() -> None:
    bar = Bar(SPEED, 0.5, of="first", candidate="second")
    answer = Answer(question(None, bar))
    # The medians of the speeds themselves are 100 and 60, of which the ratio would be 0.6.
    for first, second in ((100, 90), (10, 4), (1000, 60)):
        answer.rounds.append({"first": {SPEED: first}, "second": {SPEED: second}})
    (verdict,) = answer.verdicts
    assert verdict.values == [0.9, 0.4, 0.06]
    assert verdict.median == 0.4
    assert verdict.holds is False
    assert report.shortfalls([answer]) == [f"question 1, second, {SPEED}: 0.4, the bar is ≥ 0.5 x first"]


@pytest.mark.parametrize(("at_most", "holds"), [(False, [False, True, True]), (True, [True, True, False])])
def test_a_bar_is_met_by_its_limit(at_most: bool, holds: list[bool]) -> None:
    bar = Bar(SPEED, 2, candidate="first", at_most=at_most)
    assert [bar.holds(value) for value in (1.9, 2, 2.1)] == holds
    assert [bar.share(value) >= 1 for value in (1.9, 2, 2.1)] == holds


def test_another_figure_of_the_same_candidate() -> None:
    bar = Bar("busy [µs]", 3, of_figure="idle [µs]", candidate="first", at_most=True)
    assert bar.value({"first": {"busy [µs]": 8.0, "idle [µs]": 2.0}}) == 4
    assert str(bar) == "≤ 3 x idle [µs]"


def test_what_is_absent_is_reported_and_no_result(tmp_path: Path) -> None:
    def measure(served: Served, scale: Scale) -> Figures:
        if served.candidate is SECOND:
            raise Absent("not installed")
        return {SPEED: 1.0}

    size = scale(tmp_path)
    answer = ask(question(measure, Bar(SPEED, 1, of="second", candidate="first")), size)
    assert answer.absent == {"second": "not installed"}
    assert [verdict.holds for verdict in answer.verdicts] == [None]
    assert report.shortfalls([answer]) == []
    text = report.as_markdown([answer], machine.description(polls=False), size)
    assert "Absent: second (not installed)" in text
    assert "not measured" in text


def test_what_fails_is_reported_and_falls_short(tmp_path: Path) -> None:
    def measure(served: Served, scale: Scale) -> Figures:
        raise RuntimeError("broken")

    answer = ask(question(measure), scale(tmp_path))
    assert answer.error == "RuntimeError: broken"
    assert report.shortfalls([answer]) == ["question 1 could not be measured: RuntimeError: broken"]
    assert not list(tmp_path.iterdir())


def test_a_picture_compares_candidates_and_figures_of_a_single_one_with_their_limits() -> None:
    idle, busy = "idle [µs]", "busy [µs]"
    answer = Answer(
        question(
            None,
            Bar(SPEED, 0.5, of="first", candidate="second"),
            Bar(SPEED, 7, candidate="second"),
            Bar(busy, 3, of_figure=idle, candidate="second", at_most=True),
            Bar(busy, 1, of="absent", candidate="second"),
        )
    )
    for first, second in ((10, 4), (20, 6), (90, 8)):
        answer.rounds.append({"first": {SPEED: first}, "second": {SPEED: second, idle: 2, busy: 5}})
    shown = {title: [(row.name, row.limits) for row in rows] for title, rows in report.panels(answer).items()}
    assert shown == {
        SPEED: [("first", []), ("second", [10, 7])],
        "second [µs]": [("idle", []), ("busy", [6])],
    }


@pytest.mark.skipif(not os.access("/dev/cpu_dma_latency", os.W_OK), reason="processors do as they like here")
def test_idle_processors_are_kept_awake_for_as_long_as_it_is_measured() -> None:
    before = wanted_latency_us()  # somebody else may want it, too
    with machine.awake() as polls:
        assert polls
        assert wanted_latency_us() == 0
    assert wanted_latency_us() == before


def wanted_latency_us() -> int:
    """What the kernel makes of all requests."""
    fd = os.open("/dev/cpu_dma_latency", os.O_RDONLY)
    try:
        return int.from_bytes(os.read(fd, 4), "little", signed=True)
    finally:
        os.close(fd)


def test_cpu_time_of_the_machine_has_that_of_this_process_in_it() -> None:
    before, own = machine.busy_s(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert 0.1 < machine.busy_s() - before < 0.2 * os.cpu_count() * 60  # that is told by ticks, of all processors


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a tmpfs needs root")
def test_memory_of_candidates_has_large_pages_and_goes_away(tmp_path: Path) -> None:
    with memory(tmp_path) as directory:
        (directory / "file").write_bytes(b"data")
        (line,) = [line for line in Path("/proc/mounts").read_text().splitlines() if f" {directory} " in line]
        assert "huge=within_size" in line
    assert not list(tmp_path.iterdir())
    assert f" {directory} " not in Path("/proc/mounts").read_text()


@pytest.mark.parametrize("patch", PATCHES)
def test_patches_do_what_they_say(tmp_path: Path, patch: str | None) -> None:
    data = os.urandom(64 * 4096)
    with served(own(size_mib=64, options="dirty_age=0.01", patch=patch), tmp_path) as candidate:
        path = candidate.directory / "file"
        path.write_bytes(data)
        with path.open("r+b", buffering=0) as file:
            file.write(data[:4096])
        candidate.settle()
        assert path.read_bytes() == data
        assert candidate.status["durability"] == ("pmem" if patch == "pmem" else "ram")
        assert candidate.about.endswith(PATCHES[patch])
        copy = shutil.copytree(candidate.memory / "cache", tmp_path / "copy")
    with open_pool(copy, volatile=True) as pool:
        found = pool.scan(0, pool.slots)
        checksums = found.checksum[found.state == SlotState.CLEAN]
    assert len(checksums) == len(data) // 4096
    assert np.all(checksums == 0) if patch == "no-checksums" else np.all(checksums != 0)


def test_headers_made_in_numpy_are_those_of_the_codec() -> None:
    uuid, count = bytes(range(16)), 1000
    codec = HeaderCodec(uuid, 4096)
    rng = np.random.default_rng(1)
    slots = np.arange(7, 7 + count, dtype=np.uint64)
    seqs, file_ids, blocks = (rng.integers(1, 1 << 62, count, dtype=np.uint64) for _ in range(3))
    words = dirty_headers(
        xxhash.xxh3_64_intdigest(uuid),
        slots=slots,
        seqs=seqs,
        file_ids=file_ids,
        blocks=blocks,
        checksum=0x0123456789ABCDEF,
        length=4096,
    )
    for index in range(count):
        slot, seq = int(slots[index]), int(seqs[index])
        mtime_ns = int(words[index, 5])
        body = codec.body(seq, int(file_ids[index]), int(blocks[index]), 0x0123456789ABCDEF, mtime_ns, slot, 4096)
        assert words[index, 1:].tobytes() == body
        assert int(words[index, 0]) == codec.state_word(SlotState.DIRTY, seq, slot)
