"""Tests of the check of files: every fault of every file, and how much is read of large ones."""

import json

import pytest

from sfed.files.checks import check_files
from sfed.utils.errors import DataError


def check_row(row, where):
    if "a" not in row:
        raise DataError(f"{where}: no a")


def save(folder, name, *lines):
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return str(path)


def test_every_file_is_read_and_its_first_faults_are_told_with_their_number(tmp_path):
    files = [
        save(tmp_path, "good.jsonl", '{"a": 1}', '{"a": 2}'),
        save(tmp_path, "bad.jsonl", "x", '{"a": 1}', '{"b": 1}', "y", "z"),
        save(tmp_path, "worse.json", "["),
        save(tmp_path, "empty.csv"),
    ]
    found = check_files(files, check_row)
    assert found.rows == (2, 5, 0, 0) and found.is_whole
    assert [name for name, _ in found.faults] == [files[1]] * 3 + [files[2]]
    first, second, more, of_json = [text for _, text in found.faults]
    assert first.startswith(f"{files[1]}, line 1: not JSON")
    assert second == f"{files[1]}, line 3: no a"
    assert more == f"{files[1]}: 2 more of its 5 rows are wrong"
    assert of_json.startswith(f"{files[2]}: not JSON")
    assert found.summary == "files      4 files checked, 7 rows"


@pytest.mark.parametrize("fault_at", [1, 1000, 1001])
def test_of_large_files_the_first_thousand_rows_are_read(tmp_path, fault_at):
    lines = ['{"a": 1}'] * 1200
    lines[fault_at - 1] = "x"
    rows = save(tmp_path, "rows.jsonl", *lines)
    table = save(tmp_path, "list.json", json.dumps([{"b": 1}] * 2000))
    assert len(check_files([rows, table], check_row).faults) == 4
    found = check_files([rows, table], check_row, whole_bytes=9000)
    assert not found.is_whole and "the first 1,000 rows" in found.summary
    assert len(found.faults) == (fault_at <= 1000)  # a list is read whole or not at all


def test_the_length_of_rows_is_that_of_the_key(tmp_path):
    table = save(tmp_path, "rows.csv", "a,b", f"1,{'x' * 2000}")
    rows = save(tmp_path, "rows.jsonl", json.dumps({"a": "x" * 2000}))
    found = check_files([table, rows], check_row, most_characters=1000)
    assert len(found.faults) == 2
    assert all("data.max_row_characters=1,000" in text for _, text in found.faults)
    assert not check_files([table, rows], check_row, most_characters=3000).faults
