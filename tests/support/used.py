"""Small runs whose adapters are exported, scored and talked to; cards that are run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from transformers import BertForMaskedLM, BertForPreTraining

from sfed.config import load as config_load
from sfed.export import __main__ as export
from sfed.federated import session
from tests.support import glue, tiny

ROUNDS = 3
NAMES = ["north", "sud", "west"]
"""Folders of the clients' adapters; the second client is called süd."""
LABELS = ["benign", "malignant"]
_BERT = "bert without a pooler"


def train(settings: dict[str, Any]) -> Path:
    """A run in this process; returns its folder."""
    session.run_session(config_load.validate(settings))
    return Path(settings["output"]["dir"]) / "run"


def save_files(folder: Path) -> Path:
    """Write a model, files of three clients and held-out rows."""
    tiny.save_model(folder / "model", context=256)
    (folder / "train").mkdir()
    for number, name in enumerate(["north", "süd", "west"]):
        tiny.save_rows(folder / "train" / f"{name}.jsonl", 20 + 4 * number, seed=number)
    tiny.save_rows(folder / "new.jsonl", 17, seed=9)
    return folder


def train_texts(folder: Path, out: str = "runs", **sections: dict[str, Any]) -> Path:
    """A run of three named clients with a checkpoint of each round; further sections go over."""
    federated = {"num_clients": None, "num_rounds": ROUNDS, "weighting": "examples"}
    sections["federated"] = federated | sections.get("federated", {})
    data = {
        "task": "text",
        "train_files": str(folder / "train"),
        "eval_files": str(folder / "new.jsonl"),
        "max_tokens": 18,  # which truncates some rows
    }
    return train(
        tiny.settings(
            folder,
            data=data,
            partition={"kind": "by_file"},
            evaluation={"generate": True, "max_new_tokens": 8},
            output={"dir": str(folder / out), "name": "run", "keep_checkpoints": ROUNDS},
            **sections,
        )
    )


def train_classifier(folder: Path) -> Path:
    """A run of a classifier whose base model has no pooler."""
    tiny.save_bert(folder / _BERT)
    whole = BertForPreTraining.from_pretrained(folder / _BERT)
    masked = BertForMaskedLM(whole.config)
    masked.bert.load_state_dict(whole.bert.state_dict(), strict=False)
    masked.save_pretrained(folder / _BERT)
    rows = [{"note": "ab"[i % 2] * (2 + i % 7), "diagnosis": LABELS[i % 2]} for i in range(40)]
    glue.save(folder / "notes.jsonl", rows[:30])
    glue.save(folder / "new-notes.jsonl", rows[23:])
    settings = tiny.settings(
        folder,
        model={"name": str(folder / _BERT)},
        data={
            "task": "classification",
            "columns": {"text": "note", "label": "diagnosis"},
            "train_files": str(folder / "notes.jsonl"),
            "eval_files": str(folder / "new-notes.jsonl"),
        },
        federated={"num_clients": 2, "num_rounds": 2},
        train={"lr": 0.03},
        output={"dir": str(folder / "classifier")},
    )
    return train(settings)


def exported(run: Path, out: Path, *words: str) -> Path:
    """Call ``sfed export``; returns the folder that it wrote to."""
    export.main([str(run), "--out", str(out), *words])
    return out


def as_the_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the code of a card within its folder; returns its variables."""
    [code] = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(code, found)
    return found
