"""What the lab's comparison with rclone counts, on a plain directory."""

from __future__ import annotations

from pathlib import Path

import pytest
from lab.scenarios.rclone import losses, plan, work
from lab.workloads.blocks import BLOCK, content

SEED = 7
WRITES = 60


class PowerCutError(Exception):
    pass


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """What the program leaves after so many acknowledgements."""

    def acknowledge(number: int) -> None:
        if number == WRITES:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        work(tmp_path / "0", SEED, acknowledge)
    return tmp_path / "0"


def lost(directory: Path, acknowledged: int = WRITES) -> dict[str, int]:
    return {name: count for name, count in losses(str(directory), SEED, acknowledged).items() if count}


def newest(file: str) -> list[tuple[int, int]]:
    """(number, block) of the writes to a file."""
    written = [next_write for next_write, _ in zip(plan(SEED), range(WRITES), strict=False)]
    return [(number, block) for number, name, block in written if name == file]


def test_nothing_is_lost_without_a_loss(directory: Path) -> None:
    blocks = lost(directory)["blocks"]
    assert lost(directory) == {"blocks": blocks}
    assert WRITES // 2 < blocks < WRITES  # some were overwritten


def test_a_write_that_was_not_acknowledged_may_be_there(directory: Path) -> None:
    assert set(lost(directory, WRITES - 1)) == {"blocks"}


def test_what_is_not_there_is_missing(directory: Path) -> None:
    next(directory.glob("new-*")).unlink()
    assert lost(directory)["missing"] == 1
    appended = len(newest("log"))
    with (directory / "log").open("r+b") as file:
        file.truncate((appended - 2) * BLOCK)
        file.write(bytes(BLOCK))
    assert lost(directory)["missing"] == 4
    assert set(lost(directory)) == {"blocks", "missing"}


def test_an_older_version_is_older(directory: Path) -> None:
    writes = newest("overwritten")
    block = next(block for _, block in writes if sum(block == other for _, other in writes) > 1)
    first = next(number for number, other in writes if other == block)
    put(directory / "overwritten", block, content(block, first))
    assert lost(directory)["older"] == 1
    assert set(lost(directory)) == {"blocks", "older"}


@pytest.mark.parametrize("what", ["of another block", "half of it", "of no write"])
def test_anything_else_is_damaged(directory: Path, what: str) -> None:
    (number, block), *_ = newest("log")
    whole = content(block, number)
    wrong = {
        "of another block": content(1, newest("log")[1][0]),
        "half of it": whole[: BLOCK // 2] + bytes(BLOCK // 2),
        "of no write": content(block, WRITES + 10),
    }[what]
    put(directory / "log", block, wrong)
    assert lost(directory)["damaged"] == 1
    assert set(lost(directory)) == {"blocks", "damaged"}


def put(path: Path, block: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(block * BLOCK)
        file.write(data)
