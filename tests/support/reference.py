"""The federated methods computed a second time, with torch, PEFT and numpy alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer

from tests.support import runs

# --- the reference ---------------------------------------------------------------------------


class Lora(nn.Module):
    """h = W0 x + gamma B A x."""

    def __init__(self, base: nn.Linear, a: torch.Tensor, gamma: float) -> None:
        super().__init__()
        self.base, self.gamma = base, gamma
        self.A = nn.Parameter(a.clone())
        self.B = nn.Parameter(torch.zeros(base.out_features, a.shape[0]))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + self.gamma * (x @ self.A.T @ self.B.T)


def read_rows(folder: Path, name: str = "rows.jsonl") -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def tokenised(folder: Path) -> list[tuple[list[int], int]]:
    """(token ids, tokens of the prompt) of every row."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    pairs = [
        (
            tokenizer(row["prompt"])["input_ids"],
            tokenizer(row["completion"], add_special_tokens=False)["input_ids"],
        )
        for row in read_rows(folder)
    ]
    return [([*p, *c, tokenizer.eos_token_id], len(p)) for p, c in pairs]


def parts_of(run_folder: Path) -> list[dict[str, Any]]:
    return json.loads((run_folder / "partition.json").read_text())["clients"]


def shares(parts: list[dict[str, Any]], members: list[int], *, by_examples: bool) -> list[float]:
    """p_i of the members, which sum to 1."""
    sizes = [len(parts[c]["train"]) if by_examples else 1 for c in members]
    return [size / sum(sizes) for size in sizes]


def effective_n(p: list[float]) -> float:
    return 1 / sum(p_i**2 for p_i in p)  # N for equal weights


def mean(p: list[float], tensors: list[torch.Tensor]) -> torch.Tensor:
    return sum(p_i * t.detach().double() for p_i, t in zip(p, tensors, strict=True)).float()


def cohorts_of(run_folder: Path) -> list[list[int]]:
    """Who trained in each round, as the run itself reports it."""
    return [
        [entry["client"] for entry in event["clients"] if entry.get("steps")]
        for event in runs.rounds(run_folder)[1:]
    ]
