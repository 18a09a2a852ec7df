"""Whole runs of the trainer on several processes, and what they leave behind."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from sfed import train
from sfed.config import load as config_load
from sfed.federated import local, preflight
from sfed.federated.context import RoundPlan, Run
from sfed.files.names import GLOBAL, adapter_folder
from sfed.storage.run_record import open_run
from sfed.utils import command
from sfed.utils.errors import UserError
from tests.support.processes import on_processes

Tensors = dict[str, torch.Tensor]


def train_settings(settings: dict[str, Any]) -> None:
    config = config_load.validate(settings)
    preflight.check(config)
    train.run(config)


def train_or_leave(settings: dict[str, Any]) -> None:
    """The same as a command: a mistake is one message and an exit code."""
    try:
        train_settings(settings)
    except UserError as mistake:
        command.leave(str(mistake), command.EXIT_MISTAKE)


def run(
    num_processes: int,
    settings: dict[str, Any],
    *,
    environment: Mapping[str, str] | None = None,
) -> Path:
    """Run the settings on this many processes and return the run folder."""
    on_processes(num_processes, train_settings, settings, environment=environment)
    return Path(settings["output"]["dir"]) / settings["output"]["name"]


def adapter_paths(run_folder: Path) -> dict[str, Path]:
    """Folders of the exported adapters: client-0000, ..., whatever they are called, and global."""
    run = open_run(run_folder)
    found = {adapter_folder(one.client): one.adapter for one in run.clients.values()}
    found[GLOBAL] = run.adapters.get(GLOBAL)
    return {name: path for name, path in found.items() if path is not None}


def adapters(run_folder: Path) -> dict[str, Tensors]:
    """The exported adapters under the same names."""
    paths = adapter_paths(run_folder)
    return {name: load_file(path / "adapter_model.safetensors") for name, path in paths.items()}


def held_by_clients(checkpoint: Path) -> dict[int, Tensors]:
    """What each client holds of its own in a checkpoint, by the names of the parts."""
    facts = json.loads((checkpoint / "run.json").read_text())
    held: dict[int, Tensors] = {}
    for name, clients in facts["packs"].items():
        tensors = load_file(checkpoint / name)
        for client in clients:
            prefix = f"clients/{client:04d}/"
            held[client] = {
                key.removeprefix(prefix): one
                for key, one in tensors.items()
                if key.startswith(prefix)
            }
    return held


def newest_facts(run_folder: Path) -> dict[str, Any]:
    """What the newest checkpoint of a run says of itself."""
    newest = max((run_folder / "checkpoints").iterdir())
    facts: dict[str, Any] = json.loads((newest / "run.json").read_text(encoding="utf-8"))
    return facts


def rounds(run_folder: Path) -> list[dict[str, Any]]:
    """The round events of a run."""
    lines = (run_folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "round"]


def factors(tensors: Tensors, factor: str) -> Tensors:
    """Only the A, or only the B factors of an adapter."""
    return {name: tensor for name, tensor in tensors.items() if f".lora_{factor}." in name}


def relative_difference(one: dict[str, Tensors], other: dict[str, Tensors]) -> float:
    """Largest difference over the largest number, tensor by tensor, over all clients."""
    assert one.keys() == other.keys()
    worst = 0.0
    for client, tensors in one.items():
        for name, tensor in tensors.items():
            scale = max(float(tensor.abs().max()), 1e-12)
            worst = max(worst, float((tensor - other[client][name]).abs().max()) / scale)
    return worst


def identical(one: dict[str, Tensors], other: dict[str, Tensors]) -> bool:
    """Whether all adapters are equal bit by bit."""
    assert one.keys() == other.keys()
    return all(
        torch.equal(tensor, other[client][name])
        for client, tensors in one.items()
        for name, tensor in tensors.items()
    )


def train_in_groups(monkeypatch: pytest.MonkeyPatch, groups: list[list[tuple[int, ...]]]) -> None:
    """Let these clients share the passes of local training, in this order, on each process."""
    train = local.train

    def train_grouped(run: Run, plan: RoundPlan, *rest: Any) -> None:
        train(run, dataclasses.replace(plan, groups=groups), *rest)

    monkeypatch.setattr(local, "train", train_grouped)
