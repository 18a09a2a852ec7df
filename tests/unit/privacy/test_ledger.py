"""The ledger: what is on the disk is counted, and nothing is released before it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfed.privacy.ledger import Ledger
from sfed.utils.errors import CheckpointError, UserError

START = {"event": "start", "key": "0123456789abcdef", "clip": 1.0}
ONE, TWO = "1" * 64, "2" * 64


def begun(path: Path) -> Ledger:
    ledger = Ledger(path, START)
    ledger.begin()
    return ledger


def read(path: Path) -> Ledger:
    found = Ledger.read(path)
    assert found is not None
    return found


def test_a_repeated_round_counts_where_its_sum_is_another(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    ledger = begun(path)
    for number, tag in ((1, ONE), (2, ONE), (2, ONE), (2, TWO)):
        ledger.add(number, tag)
    assert ledger.rounds == [1, 2, 2] == read(path).rounds
    again = read(path)
    again.begin()
    again.add(2, TWO)
    again.add(3, ONE)
    assert read(path).rounds == [1, 2, 2, 3]
    assert read(path).start == START


def test_a_line_without_its_end_was_not_released(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    begun(path).add(1, ONE)
    with path.open("a") as file:
        file.write('{"event": "release", "round": 2, "tag": "22')
    ledger = read(path)
    assert ledger.rounds == [1]
    ledger.begin()
    ledger.add(2, TWO)
    assert read(path).rounds == [1, 2]


def test_no_ledger_and_an_empty_one_are_none(tmp_path: Path) -> None:
    path = tmp_path / "privacy.jsonl"
    assert Ledger.read(path) is None
    path.write_text("")
    assert Ledger.read(path) is None


@pytest.mark.parametrize(
    "line",
    [
        "no json",
        "[1]",
        '{"event": "release", "round": 0, "tag": "' + ONE + '"}',
        '{"event": "release", "round": "1", "tag": "' + ONE + '"}',
        '{"event": "release", "round": 1, "tag": "../x"}',
        '{"event": "release", "round": 1}',
        '{"event": "other", "round": 1, "tag": "' + ONE + '"}',
    ],
)
def test_a_line_that_is_none_of_a_ledger_is_refused(tmp_path: Path, line: str) -> None:
    path = tmp_path / "privacy.jsonl"
    begun(path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(CheckpointError, match=r"privacy\.jsonl.*cannot be read"):
        Ledger.read(path)
    path.write_text(line + "\n")
    with pytest.raises(CheckpointError, match="cannot be read"):
        Ledger.read(path)


def test_a_ledger_that_cannot_be_written_counts_nothing(tmp_path: Path) -> None:
    ledger = begun(tmp_path / "privacy.jsonl")
    ledger.path.unlink()
    ledger.path.mkdir()
    with pytest.raises(UserError, match="nothing more is released"):
        ledger.add(1, ONE)
    assert ledger.rounds == []
