"""What a person types: the demo under torchrun, the deepspeed launcher, real data and models."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from sfed.config.schema import DEMO
from tests.support import launchers, runs
from tests.support.launchers import ROOT
from tests.support.processes import free_port

pytestmark = [pytest.mark.dist, pytest.mark.slow]


def torchrun(num: int, *words: str, folder: Path) -> str:
    """Train under torchrun in ``folder``; returns what it printed."""
    done = launchers.torchrun(num, "-m", "sfed.train", *words, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def over(settings: dict[str, Any], changes: dict[str, dict[str, Any]]) -> dict[str, Any]:
    sections = settings | changes
    return {key: {**settings.get(key, {}), **changes.get(key, {})} for key in sections}


def assert_each_has_its_own_style(run_folder: Path, share: float) -> None:
    """Each client's loss fell below this share, and its own adapter suits it better."""
    events = runs.rounds(run_folder)
    first, last = events[0], events[-1]
    for before, after in zip(first["clients"], last["clients"], strict=True):
        assert after["personal_loss"] < share * before["personal_loss"]
        assert after["personal_loss"] < after["global_loss"], "each client has its own style"
    assert last["eval/global_loss"] < first["eval/global_loss"]


def test_a_round_of_the_demo_teaches_each_client_its_style(tmp_path: Path) -> None:
    little = {"federated": {"num_rounds": 1}, "data": {"max_eval_examples": 64}}
    runs.run(2, over(DEMO, {"output": {"dir": str(tmp_path)}, **little}))
    assert_each_has_its_own_style(tmp_path / "demo", share=0.8)


@pytest.mark.full
def test_the_demo_learns_on_two_processes(tmp_path: Path) -> None:
    output = torchrun(2, folder=tmp_path)
    assert "8 clients on 2 processes" in output
    assert_each_has_its_own_style(tmp_path / "runs" / "demo", share=0.8)
    again = torchrun(2, folder=tmp_path)
    assert "resuming after round 5" in again


@pytest.mark.full
def test_torchrun_and_deepspeed_write_the_same_adapters(tmp_path: Path, shared_data: Path) -> None:
    real = [
        str(ROOT / "configs" / "gsm8k.yaml"),
        f"model.name={shared_data / 'models' / 'stories260K'}",
        f"data.train_files={shared_data / 'gsm8k' / 'train.jsonl'}",
        f"data.eval_files={shared_data / 'gsm8k' / 'test.jsonl'}",
        "data.max_train_examples=400",
        "data.max_tokens=256",
        "backbone.sharding=zero3",
        "federated.num_rounds=2",
        "train.local_steps=2",
        "train.lr=3e-3",
        "evaluation.max_examples=8",
    ]
    torchrun(2, *real, "output.name=torchrun", folder=tmp_path)
    launcher = [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=2"]
    launcher += [f"--master_port={free_port()}", "--module", "sfed.train"]
    launchers.run(*launcher, *real, "output.name=deepspeed", cwd=tmp_path)
    one, other = (runs.adapters(tmp_path / "runs" / name) for name in ("torchrun", "deepspeed"))
    assert runs.identical(one, other)
    events = runs.rounds(tmp_path / "runs" / "torchrun")
    assert events[-1]["eval/loss"] < events[0]["eval/loss"]


@pytest.mark.full
def test_alpaca_by_length_quantiles_learns_on_a_real_model(
    tmp_path: Path, shared_data: Path
) -> None:
    torchrun(
        1,
        str(ROOT / "configs" / "alpaca.yaml"),
        f"model.name={shared_data / 'models' / 'stories260K'}",
        f"data.train_files={shared_data / 'alpaca' / 'alpaca_5000.json'}",
        "data.max_train_examples=600",
        "data.max_tokens=256",
        "federated.num_clients=4",
        "federated.num_rounds=2",
        "train.local_steps=4",
        "train.lr=5e-3",
        "evaluation.max_examples=8",
        folder=tmp_path,
    )
    events = runs.rounds(tmp_path / "runs" / "alpaca-sfed")
    assert events[-1]["eval/loss"] < events[0]["eval/loss"]
