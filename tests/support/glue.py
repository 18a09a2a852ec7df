"""Classification on tiny models: rows of GLUE's forms, runs, and plain computations of both.

Everything that a run is compared with comes from transformers, PEFT and torch alone.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from sfed.config import load as config_load
from sfed.federated import session
from tests.support import tiny
from tests.support.deadlines import RUN_SECONDS

# The columns that are read, and the number of classes; 0 = a value.
FORMS: dict[str, tuple[tuple[str, ...], int]] = {
    "sst2": (("sentence",), 2),
    "rte": (("sentence1", "sentence2"), 2),
    "mnli": (("premise", "hypothesis"), 3),
    "stsb": (("sentence1", "sentence2"), 0),
}
HEADS = {"roberta": "classifier", "bert": "classifier", "llama": "score"}
N, ROUNDS, STEPS, BATCH, CLIP, RANK, ALPHA, MAX_TOKENS = 3, 2, 2, 4, 1.0, 4, 2.0, 64
NAMES = [f"client-{client:04d}" for client in range(N)]
SGD: dict[str, Any] = {"optimizer": "sgd", "lr": 0.05, "weight_decay": 0.1}

Row = dict[str, Any]


def rows_of(name: str, count: int, *, seed: int = 0) -> list[Row]:
    """Rows in a task's form: texts of unequal lengths, which have to do with the label."""
    columns, num_classes = FORMS[name]
    generator = np.random.default_rng([seed, count])
    rows = []
    for i in range(count):
        label: Any = int(generator.integers(num_classes)) if num_classes else i % 11 / 2
        word = "abcdefghijk"[int(2 * label)]
        texts = {
            column: f"{i % 7} {word * int(generator.integers(1, 9))} {column[-1]}"
            for column in columns
        }
        rows.append({**texts, "label": label})
    return rows


def save_rows(path: Path, name: str, count: int, *, seed: int = 0) -> Path:
    """Write such rows as .jsonl."""
    return save(path, rows_of(name, count, seed=seed))


def save(path: Path, rows: list[Row]) -> Path:
    """Write rows as .jsonl."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read(path: Path) -> list[Row]:
    """Read rows of .jsonl."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def save_all(folder: Path) -> Path:
    """Write the three families and rows of every form into a folder."""
    tiny.save_model(folder / "llama")
    tiny.save_roberta(folder / "roberta")
    tiny.save_bert(folder / "bert")
    for name in FORMS:
        save_rows(folder / f"{name}-train.jsonl", name, 48)
        save_rows(folder / f"{name}-eval.jsonl", name, 23, seed=1)
    return folder


def settings(
    folder: Path, family: str, name: str, out: Path, **sections: dict[str, Any]
) -> dict[str, Any]:
    """Settings of a quick run; ``sections`` go over."""
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / family)},
        "data": {
            "task": "glue",
            "name": name,
            "train_files": str(folder / f"{name}-train.jsonl"),
            "eval_files": str(folder / f"{name}-eval.jsonl"),
            "max_tokens": MAX_TOKENS,
        },
        "partition": {"kind": "dirichlet", "concentration": 2.0},
        "lora": {"rank": RANK, "alpha": ALPHA},
        "federated": {"num_clients": N, "num_rounds": ROUNDS, "deadline_seconds": RUN_SECONDS},
        "train": {"local_steps": STEPS, "batch_size": BATCH, "max_grad_norm": CLIP, **SGD},
        "evaluation": {"batch_size": 5},
        "output": {"dir": str(out), "name": "run"},
    }
    if name == "stsb":  # no classes: lengths
        base["partition"] = {"kind": "iid"}
    return {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}


def run(folder: Path, family: str, name: str, out: Path, **sections: dict[str, Any]) -> Path:
    """Train in this process and return the run folder."""
    own = settings(folder, family, name, out, **sections)
    session.run_session(config_load.validate(own))
    return Path(own["output"]["dir"]) / own["output"]["name"]


def load_model(folder: Path, family: str, name: str) -> nn.Module:
    """The backbone with a classifier, as transformers loads it."""
    num_classes = FORMS[name][1]
    return AutoModelForSequenceClassification.from_pretrained(
        folder / family, num_labels=num_classes or 1
    )


def with_adapter(folder: Path, family: str, name: str, adapter: Path) -> nn.Module:
    """The same with an exported adapter, as a user loads it."""
    return PeftModel.from_pretrained(load_model(folder, family, name), adapter).eval()


class Encoder:
    """Rows -> the inputs of a classifier, with the tokenizer's own padding, cuts and marks."""

    def __init__(self, folder: Path, family: str, name: str) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder / family)
        self.family, (self.columns, self.num_classes) = family, FORMS[name]

    def inputs(self, rows: list[Row]) -> dict[str, torch.Tensor]:
        """Padded ids and masks; token types for BERT alone."""
        texts = [[row[column] for row in rows] for column in self.columns]
        if self.family == "llama":
            texts = [["\n".join(both) for both in zip(*texts, strict=True)]]
        found = self.tokenizer(
            *texts,
            padding=True,
            padding_side="right",
            truncation=True,
            max_length=MAX_TOKENS,
            return_token_type_ids=True,
            return_tensors="pt",
        )
        if self.family != "bert":
            del found["token_type_ids"]
        return dict(found)

    def targets(self, rows: list[Row]) -> torch.Tensor:
        """Classes or values."""
        labels = [row["label"] for row in rows]
        return torch.tensor(labels, dtype=torch.long if self.num_classes else torch.float64)

    def loss(self, model: nn.Module, rows: list[Row]) -> torch.Tensor:
        """Transformers' own loss of a batch."""
        return model(**self.inputs(rows), labels=self.targets(rows)).loss

    @torch.no_grad()
    def logits(self, model: nn.Module, rows: list[Row]) -> torch.Tensor:
        """The classifier's outputs, row after row, each alone and without padding."""
        return torch.cat([model(**self.inputs([row])).logits for row in rows])
