"""``sfed train --dry-run``: the screen says what the run would do, and nothing is written."""

from __future__ import annotations

import contextlib
import io
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from sfed import train
from sfed.config.load import validate
from sfed.plan import dry_run
from sfed.utils import command
from sfed.utils.errors import UserError
from tests.support import glue, tiny
from tests.support.processes import ends_of

ESCAPE = "\x1b]0;x\x07 [/b]"


def screen(settings: dict[str, Any], num_processes: int = 1) -> list[str]:
    """The lines of the screen, 100 columns wide."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        dry_run.show(validate(settings), num_processes)
    return out.getvalue().splitlines()


def refused(settings: dict[str, Any]) -> str:
    try:
        screen(settings)
    except UserError as error:
        return str(error)
    return ""


def table_of(lines: list[str]) -> list[list[str]]:
    rows = [line for line in lines if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]


def test_a_text_task_shows_rows_labels_and_what_is_supervised(tiny_folder: Path, tmp_path: Path):
    rows = [
        {"prompt": f"q{i} {ESCAPE}\n", "completion": f" a{i}", "site": f"{ESCAPE} {i % 2}"}
        for i in range(12)
    ]
    files = glue.save(tmp_path / "rows.jsonl", rows)
    settings = tiny.settings(
        tiny_folder,
        data={"task": "jsonl", "train_files": str(files), "max_tokens": 64},
        partition={"kind": "by_key", "key": "site"},
        federated={"num_clients": 2},
        output={"dir": str(tmp_path / "runs"), "name": "dry"},
    )
    lines = screen(settings, 2)
    whole = "\n".join(lines)
    assert whole.replace("\n", "").isprintable() and len(lines) <= 40
    head, *clients = table_of(lines)
    assert head == ["client", "examples", "tokens mean", "longest", "steps", "held out", "process"]
    names = [rf"\x1b]0;x\x07 [/b] {i}" for i in (0, 1)]
    assert [row[:2] for row in clients] == [[name, "4"] for name in names]
    assert [row[6] for row in clients] == ["0", "1"]
    shown = whole.replace("\n", "")
    assert re.search(r"<s>q(\d+) \\x1b\]0;x\\x07 \[/b\]\\n\[\[ a\1</s>\]\]", shown)
    assert "columns prompt, completion, site" in whole
    assert "lengths" in whole and "not estimated on a CPU" in whole
    assert "A: " in whole and " bytes per process and round" in whole
    assert not (tmp_path / "runs" / "dry").exists()


def test_settings_of_single_clients_are_shown_where_they_differ(tiny_folder: Path):
    """By the name that a client has, and the names that there are where one is wrong."""
    settings = tiny.settings(
        tiny_folder,
        partition={"kind": "by_key", "key": "kind"},
        federated={"num_clients": 4, "method": "fedsa"},
        clients={"kind-1": {"rank": 2, "local_steps": 7}, "2": {"lr": 0.5, "batch_size": 3}},
    )
    lines = screen(settings)
    head, *clients = table_of(lines)
    assert head[-4:] == ["r", "gamma", "lr", "rows"]
    assert [row[-4:] for row in clients] == [
        ["4", "4", "0.01", "4"],
        ["2", "8", "0.01", "4"],
        ["4", "4", "0.5", "3"],
        ["4", "4", "0.01", "4"],
    ]
    assert [row[4] for row in clients] == ["3", "7", "3", "3"]
    whole = "\n".join(lines)
    assert "r = 2 to 4, gamma = 4 to 8" in whole and "of 3 to 7 steps of 3 to 4 rows" in whole
    settings["clients"] = {"kind-7": {"rank": 2}}
    message = refused(settings)
    assert "clients.kind-7: no client has this name; the clients are kind-0, kind-1, " in message


def test_a_classifier_shows_its_classes(tmp_path: Path):
    tiny.save_roberta(tmp_path / "roberta")
    files = glue.save_rows(tmp_path / "rows.jsonl", "rte", 24)
    settings = {
        "model": {"name": str(tmp_path / "roberta")},
        "data": {"task": "glue", "name": "rte", "train_files": str(files), "max_tokens": 64},
        "federated": {"num_clients": 3, "method": "fedsa"},
        "lora": {"target_modules": ["query", "value"]},
    }
    lines = screen(settings)
    whole = "\n".join(lines)
    assert "columns sentence1, sentence2, label" in whole
    assert all("entailment" in row[7] and "%" in row[7] for row in table_of(lines)[1:])
    assert "-> [[entailment]]" in whole or "-> [[not_entailment]]" in whole


def test_a_classifier_of_own_texts_takes_its_classes_from_the_files(tmp_path: Path):
    tiny.save_roberta(tmp_path / "roberta")
    rows = [{"text": f"note {i}", "label": ("flu", "cold", "none")[i % 3]} for i in range(24)]
    settings = {
        "model": {"name": str(tmp_path / "roberta")},
        "data": {
            "task": "classification",
            "train_files": str(glue.save(tmp_path / "rows.jsonl", rows)),
            "max_tokens": 64,
        },
        "federated": {"num_clients": 1},
    }
    head, *rest = table_of(screen(settings))
    cells = " ".join(row[-1] for row in rest)
    assert head[-1] == "labels"
    assert all(label in cells for label in ("flu", "cold", "none"))
    settings["train"] = {"class_weights": {"flu": 1.0}}
    assert "train.class_weights" in refused(settings)


def test_what_a_run_would_refuse_is_refused(tiny_folder: Path):
    settings = tiny.settings(tiny_folder, data={"max_tokens": 64}, lora={"target_modules": ["no"]})
    assert "lora.target_modules" in refused(settings)
    settings = tiny.settings(tiny_folder, federated={"clients_per_round": 9, "num_clients": None})
    assert "federated.clients_per_round" in refused(settings)


def dry_run_of_the_demo(folder: Path) -> None:
    os.chdir(folder)
    sys.argv = ["sfed.train", "--dry-run"]
    command.run_command(train.main)


@pytest.mark.dist
def test_the_command_ends_with_0_and_process_0_alone_speaks(tmp_path: Path):
    one, other = ends_of(2, dry_run_of_the_demo, tmp_path)
    assert (one.code, other.code) == (0, 0), one.said + other.said
    assert "gamma" in one.said and "on 2 GPUs" in one.said and not other.said
    assert not list(tmp_path.iterdir())
