"""Counts what a run sends between processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from sfed.config import load as config_load
from sfed.federated import local, rounds, session
from tests.support.collective_kinds import KINDS


class Counter:
    """Notes (phase, kind, elements, dtype) of every collective of this process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, str, int, str]] = []
        self.phase = "start"
        for kind in KINDS:
            if hasattr(dist.ProcessGroup, kind):
                monkeypatch.setattr(dist.ProcessGroup, kind, self._counting(kind))

    def _counting(self, kind: str) -> Any:
        original = getattr(dist.ProcessGroup, kind)

        def counted(group: Any, *arguments: Any, **options: Any) -> Any:
            for tensor in _tensors(arguments[:2]):
                self.seen.append((self.phase, kind, tensor.numel(), str(tensor.dtype)))
                break
            return original(group, *arguments, **options)

        return counted


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for inner in value for tensor in _tensors(inner)]
    return []


def counted_run(settings: dict[str, Any]) -> list[tuple[str, str, int, str]]:
    monkeypatch = pytest.MonkeyPatch()
    counter = Counter(monkeypatch)
    in_phase(monkeypatch, counter, local, "train", "local")
    in_phase(monkeypatch, counter, local, "gather", "gather")
    in_phase(monkeypatch, counter, rounds, "_average", "average")
    in_phase(monkeypatch, counter, rounds, "_evaluate_and_report", "evaluate")
    in_phase(monkeypatch, counter, rounds, "prepare", "prepare")
    session.run_session(config_load.validate(settings))
    return counter.seen


def in_phase(
    monkeypatch: pytest.MonkeyPatch, counter: Counter, module: Any, name: str, phase: str
) -> None:
    original = getattr(module, name)

    def marked(*arguments: Any, **options: Any) -> Any:
        before, counter.phase = counter.phase, phase
        try:
            return original(*arguments, **options)
        finally:
            counter.phase = before

    monkeypatch.setattr(module, name, marked)


def sizes(folder: Path) -> tuple[int, int]:
    """Numbers of A and of B for all linear layers of the tiny model at rank 4."""
    from transformers import AutoConfig

    model = AutoConfig.from_pretrained(folder / "model")
    hidden, inner = model.hidden_size, model.intermediate_size
    kv = hidden * model.num_key_value_heads // model.num_attention_heads
    layers = [(hidden, hidden), (hidden, kv), (hidden, kv), (hidden, hidden)]
    layers += [(hidden, inner), (hidden, inner), (inner, hidden)]
    ins, outs = (sum(side) for side in zip(*layers, strict=True))
    return 4 * model.num_hidden_layers * ins, 4 * model.num_hidden_layers * outs
