"""One round of each family with two clients, and its export read again by stock PEFT, row by row.

``python -m tests.support.family_runs`` writes what it finds into docs/models.md.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from sfed.config import load as config_load
from sfed.federated import session
from tests.support import families, runs
from tests.support.deadlines import RUN_SECONDS
from tests.support.families import CLIENTS, Family
from tests.support.processes import free_port, on_processes

PROCESSES = {"none": 1, "zero3": 2}
"""Processes of a run by how its backbone is stored: one holds both clients, or each holds one."""


def settings(family: Family, folder: Path, sharding: str) -> dict[str, Any]:
    """Settings of a run of one round."""
    task = {"task": "glue", "name": "rte"} if family.is_classifier else {"task": "text"}
    files = {f"{split}_files": str(folder / part) for split, part in _PARTS.items()}
    return {
        "model": {"name": str(folder / "model")},
        "data": {**task, **files, "max_tokens": 64},
        "partition": {"kind": "by_file"},
        "lora": {"rank": 4, "target_modules": family.targets},
        "backbone": {"sharding": sharding},
        "federated": {"num_rounds": 1, "deadline_seconds": RUN_SECONDS},
        "train": {"local_steps": 2, "batch_size": 4, "optimizer": "sgd", "lr": 0.5},
        "evaluation": {"batch_size": 4},
        "output": {"dir": str(folder / "runs"), "name": sharding},
    }


_PARTS = {"train": "train", "eval": "held"}


def train_all(many: list[dict[str, Any]], ports: list[int]) -> None:
    """Run sessions one after the other, as one of the processes; they meet at a port for each."""
    for one, port in zip(many, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        session.run_session(config_load.validate(one))


def train(folders: dict[str, Path], chosen: list[Family]) -> None:
    """Make the models of families and run each with all kinds of storage."""
    for family in chosen:
        families.save(family, folders[family.name])
        families.save_rows(family, folders[family.name])
    for sharding, num_processes in PROCESSES.items():
        many = [settings(family, folders[family.name], sharding) for family in chosen]
        on_processes(num_processes, train_all, many, [free_port() for _ in many])


@torch.no_grad()
def stock_loss(family: Family, folder: Path, adapter: Path, rows: list[dict[str, Any]]) -> float:
    """Mean loss over tokens, or over rows for a classifier, by stock PEFT: no padding, no batch."""
    base = AutoModelForSequenceClassification if family.is_classifier else AutoModelForCausalLM
    model = PeftModel.from_pretrained(base.from_pretrained(folder / "model"), adapter).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    total, count = 0.0, 0
    for row in rows:
        if family.is_classifier:
            texts = row["sentence1"], row["sentence2"]
            read = dict(tokenizer(*texts, return_token_type_ids=True, return_tensors="pt"))
            if getattr(model.config, "type_vocab_size", 0) < 2:
                read.pop("token_type_ids", None)
            loss = functional.cross_entropy(model(**read).logits, torch.tensor([row["label"]]))
            total, count = total + float(loss), count + 1
            continue
        prompt = tokenizer(row["prompt"])["input_ids"]
        answer = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[*prompt, *answer, tokenizer.eos_token_id]])
        logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1]
        wanted = ids[0, len(prompt) :]
        total += float(functional.cross_entropy(logits, wanted, reduction="sum"))
        count += len(wanted)
    return total / count


@dataclass(frozen=True)
class Outcome:
    """What the runs of a family say."""

    resolved: dict[str, dict[str, Any]]
    """By kind of storage: ``resolved`` of config.json."""
    targets: list[str]
    """Of the exported adapters."""
    reloaded: dict[str, float]
    """By kind of storage: the largest relative difference of a loss from that of stock PEFT."""
    sharded: float
    """Largest relative difference of a factor between the runs."""
    learned: float
    """How far the adapters changed the losses, relative."""


def outcome(family: Family, folder: Path) -> Outcome:
    """Compare the runs of a family with stock PEFT and with each other."""
    resolved, reloaded, learned = {}, {}, 0.0
    for sharding in PROCESSES:
        run = folder / "runs" / sharding
        resolved[sharding] = json.loads((run / "config.json").read_text())["resolved"]
        reloaded[sharding] = 0.0
        before, after = (runs.rounds(run)[i]["clients"] for i in (0, -1))
        for first, last in zip(before, after, strict=True):
            rows = families.read_rows(folder, "held", last["name"])
            stock = stock_loss(family, folder, run / "adapters" / last["name"], rows)
            difference = abs(last["personal_loss"] - stock) / stock
            reloaded[sharding] = max(reloaded[sharding], difference)
            learned = max(learned, abs(first["personal_loss"] - stock) / stock)
    one, other = (runs.adapters(folder / "runs" / sharding) for sharding in PROCESSES)
    config = folder / "runs" / "none" / "adapters" / CLIENTS[0] / "adapter_config.json"
    targets = json.loads(config.read_text())["target_modules"]
    return Outcome(resolved, targets, reloaded, runs.relative_difference(one, other), learned)


# --- the table of the documents ------------------------------------------------------------------

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
BEGIN, END = "<!-- families -->", "<!-- end of families -->"
BOUND = 1e-5
"""Of relative differences that are round-off in fp32."""
_WITHIN = "< 1e-5"
LEARNED = 1e-3
"""An adapter that changes a loss by less would not show an error."""
_COLUMNS = ("family", "class in transformers", "layers with adapters", "attention")
_COLUMNS += ("clients in a pass", "short sequences", "`none`", "`zero3`", "reloaded in PEFT")


def row(family: Family, found: Outcome) -> str:
    """The row of a family in the table.

    Raises:
        AssertionError: where numbers differ by more than round-off, or nothing was learned.
    """
    worst = {**found.reloaded, "zero3 beside none": found.sharded}
    assert max(worst.values()) < BOUND, (family.name, worst)
    assert found.learned > LEARNED, (family.name, found.learned)
    one = found.resolved["none"]
    packs = "a row each" if one["padded_reason"] else "share rows"
    shares = "one" if one["clients_per_pass"] == 1 else "several"
    layers = sorted({name.rpartition(".")[2] for name in found.targets})
    cells = [family.name, f"`{family.kind}`", ", ".join(f"`{layer}`" for layer in layers)]
    cells += [one["attention"], shares, packs, "trains", f"trains, {_WITHIN}"]
    return _line([*cells, _WITHIN])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def rows_of_page() -> list[str]:
    """The rows of the table as the page has them."""
    text = PAGE.read_text(encoding="utf-8")
    table = text.partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    head, rule, *rows = table.splitlines()
    assert (head, rule) == (_line(_COLUMNS), _line(["---"] * len(_COLUMNS)))
    return rows


def rows_of_runs(folder: Path, chosen: list[Family]) -> list[str]:
    """Train families below a folder; returns their rows."""
    folders = {family.name: folder / str(number) for number, family in enumerate(chosen)}
    train(folders, chosen)
    return [row(family, outcome(family, folders[family.name])) for family in chosen]


def main() -> None:
    """Train all families and write the table into the page."""
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of_runs(Path(folder), families.FAMILIES)
    table = "\n".join([_line(_COLUMNS), _line(["---"] * len(_COLUMNS)), *rows])
    text = PAGE.read_text(encoding="utf-8")
    before, _, rest = text.partition(f"{BEGIN}\n")
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main()
