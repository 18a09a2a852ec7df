"""What has to be the same on all processes is compared, and a difference stops the run."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfed.distributed import world as distributed
from sfed.distributed.consistency import bit_sum
from sfed.federated import fingerprints
from sfed.methods import aggregation
from sfed.models import backbone
from sfed.utils import command, versions
from tests.support import runs, tiny
from tests.support.processes import End, ends_of

FOUR = {"num_clients": 4, "num_rounds": 3}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.uint8])
def test_any_single_bit_changes_the_sum(dtype: torch.dtype):
    values = torch.arange(24).reshape(4, 6).to(dtype)
    before = bit_sum(values)
    assert bit_sum(values.clone()) == before and 0 <= before < 2**64
    raw = values.view(torch.uint8)
    for byte in range(0, raw.numel(), 5):
        for bit in (0, 7):
            raw.view(-1)[byte] ^= 1 << bit
            assert bit_sum(values) != before
            raw.view(-1)[byte] ^= 1 << bit
    assert bit_sum(values) == before


def test_the_sum_of_many_parts_is_the_sum_of_the_whole(monkeypatch: pytest.MonkeyPatch):
    values = torch.randn(1000)
    whole = bit_sum(values.t())
    monkeypatch.setattr("sfed.distributed.consistency._MOST_AT_A_TIME", 7)
    assert bit_sum(values) == whole


def test_models_with_other_weights_settings_or_shapes_have_other_digests():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 3)
    settings = {"hidden_size": 4, "_name_or_path": "here"}
    alone: Any = SimpleNamespace(rank=0)
    known = fingerprints.of_backbone(alone, model, settings)
    assert fingerprints.of_backbone(alone, model, {**settings, "_name_or_path": "there"}) == known
    assert fingerprints.of_backbone(alone, model, {**settings, "hidden_size": 5}) != known
    assert fingerprints.of_backbone(alone, torch.nn.Linear(3, 4), settings) != known
    with torch.no_grad():
        model.bias[1] += 1e-7
    assert fingerprints.of_backbone(alone, model, settings) != known


def train(settings: dict, change: str) -> None:
    """Train; process 1 differs in something."""
    if os.environ["RANK"] == "1":
        if change == "configuration":
            settings["train"] = {**settings["train"], "lr": 0.5}
        if change == "version":
            versions.__version__ = "0.0.9"
        if change == "weights":
            settings["model"] = {"name": settings["model"]["name"]}
            flip_weights()
        if change == "mean":
            flip_mean()
    runs.train_or_leave(settings)


def flip_weights() -> None:
    healthy = backbone.load

    def load(*arguments: object) -> object:
        loaded = healthy(*arguments)
        next(loaded.model.parameters()).view(torch.int32)[0, 0] ^= 1
        return loaded

    backbone.load = load


def flip_mean() -> None:
    """One bit of what came back from the mean of round 2."""
    healthy, calls = distributed.all_reduce_sum, []

    def all_reduce_sum(flat: torch.Tensor) -> torch.Tensor:
        mean = healthy(flat)
        calls.append(1)
        if len(calls) == 3:  # before round 1, round 1, round 2
            mean.view(torch.int32)[17] ^= 1
        return mean

    aggregation.all_reduce_sum = all_reduce_sum


def differing(tiny_folder: Path, tmp_path: Path, change: str) -> list[End]:
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        federated=FOUR,
        evaluation={"adapters": ["personal"], "every_rounds": 3},
    )
    return ends_of(2, train, settings, change)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("configuration", "train.lr: 0.01 on process 0; 0.5 on process 1"),
        ("version", 'sfed: "0.'),
        ("weights", "backbone: "),
    ],
)
def test_processes_that_start_differently_stop_with_both_values(
    tiny_folder: Path, tmp_path: Path, change: str, words: str
):
    zero, one = differing(tiny_folder, tmp_path, change)
    assert (zero.code, one.code) == (command.EXIT_MISTAKE, command.EXIT_MISTAKE), (
        zero.said + one.said
    )
    lines = [line for line in zero.said.splitlines() if line.startswith("  ")]
    assert len(lines) == 2, "one fact, one remedy"
    assert words in lines[0] and "on process 0" in lines[0] and "on process 1" in lines[0]
    assert not (tmp_path / "run").exists()


@pytest.mark.dist
def test_a_bit_that_flips_after_the_mean_stops_the_run_before_anything_is_written(
    tiny_folder: Path, tmp_path: Path
):
    zero, one = differing(tiny_folder, tmp_path, "mean")
    assert (zero.code, one.code) == (1, 1), zero.said + one.said
    assert "round 2: after the mean the processes hold different values" in zero.said
    (line,) = [line for line in zero.said.splitlines() if line.startswith("  A: ")]
    assert "on process 0" in line and "on process 1" in line
    assert [event["round"] for event in runs.rounds(tmp_path / "run")] == [0, 1]
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert names == ["round-000001"]
