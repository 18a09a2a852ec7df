"""Formats do not change: a run folder of an early version is resumed and reported.

``tests/support/old_run`` was made by that version: a model, rows, a run that was stopped after two
of its four rounds, and, in ``expected``, the adapters that the same version ended with.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sfed import train
from sfed.report import __main__ as report

OLD = Path(__file__).resolve().parents[1] / "support" / "old_run"
PERSONAL_LOSSES = [5.4895, 5.3570, 5.2189, 5.0379, 4.8417]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The old folder, after the present version has run the two rounds that were left."""
    folder = tmp_path_factory.mktemp("old") / "copy"
    shutil.copytree(OLD, folder)
    before = Path.cwd()
    os.chdir(folder)  # the run's paths are relative
    try:
        train.main(["run.yaml"])
    finally:
        os.chdir(before)
    return folder


def test_an_old_run_is_resumed_to_the_adapters_of_its_own_version(resumed: Path) -> None:
    for expected in (OLD / "expected").iterdir():
        found = load_file(
            resumed / "runs/old/adapters" / expected.stem / "adapter_model.safetensors"
        )
        wanted = load_file(expected)
        assert found.keys() == wanted.keys()
        for name, tensor in wanted.items():
            torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-7)


def test_its_metrics_are_one_record_of_both_versions(resumed: Path) -> None:
    lines = (resumed / "runs/old/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [event for event in map(json.loads, lines) if event["event"] == "round"]
    assert [event["round"] for event in rounds] == [0, 1, 2, 3, 4]
    losses = [event["eval/personal_loss"] for event in rounds]
    assert losses == pytest.approx(PERSONAL_LOSSES, abs=5e-5)


def test_the_record_is_reported(resumed: Path) -> None:
    report.main([str(resumed / "runs/old")])
    assert "<html" in (resumed / "runs/old/report.html").read_text(encoding="utf-8")


def test_an_old_run_is_reported_as_it_is(tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(OLD / "runs/old", folder)
    report.main([str(folder)])
    assert "<html" in (folder / "report.html").read_text(encoding="utf-8")
