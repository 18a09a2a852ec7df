"""Tests of the public Python API: what importing it loads, and what ``fit`` leaves as it was."""

from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

import sfed
from sfed.config.load import validate
from tests.support import tiny
from tests.support.launchers import HEAVY, modules_after

ROOT = Path(__file__).resolve().parents[2]
NEED_TORCH = {"fit", "estimate"}


def test_importing_the_package_loads_nothing_heavy():
    loaded = modules_after("import sfed\nsfed.__version__\ndir(sfed)")
    assert not {"numpy", "pydantic", "matplotlib", *HEAVY} & loaded


def test_only_what_computes_loads_torch():
    light = sorted(set(sfed.__all__) - NEED_TORCH)
    assert not HEAVY & modules_after(f"import sfed\nfor name in {light}: getattr(sfed, name)")


def test_every_public_name_is_there_and_has_its_own_name():
    for name in sfed.__all__:
        value = getattr(sfed, name)
        assert value is not None
        assert name not in NEED_TORCH or value.__name__ == name
    assert set(sfed.__all__) <= set(dir(sfed))
    with pytest.raises(AttributeError, match="no attribute 'fitt'"):
        sfed.fitt  # noqa: B018


def test_the_page_documents_every_public_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs" / "_ext"))
    import python_api

    shown = [name for names in python_api.GROUPS.values() for name in names]
    assert sorted(shown) == sorted(set(sfed.__all__) - {"__version__"})
    for name in shown:
        assert python_api.source_of(name)[1], f"{name} has no docstring"
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    assert page.count(python_api.PLACE) == 1


def test_errors_of_users_are_user_errors():
    for kind in (sfed.ConfigError, sfed.DataError, sfed.CheckpointError):
        assert issubclass(kind, sfed.UserError)
        assert issubclass(kind, ValueError)


# --- fit -----------------------------------------------------------------------------------------


@pytest.fixture
def settings(tiny_folder: Path, tmp_path: Path) -> dict[str, Any]:
    return tiny.settings(
        tiny_folder,
        federated={"num_clients": 2, "num_rounds": 2},
        train={"local_steps": 1},
        output={"dir": str(tmp_path), "name": "run"},
    )


def state_of_the_process() -> dict[str, Any]:
    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    return {
        "threads": torch.get_num_threads(),
        "precision": torch.get_float32_matmul_precision(),
        "random": torch.get_rng_state().tolist(),
        "environment": dict(os.environ),
        "signals": [signal.getsignal(number) for number in numbers],
        "handlers": list(logging.getLogger().handlers),
        "levels": [logging.getLogger(name).level for name in ("", "sfed")],
        "distributed": torch.distributed.is_initialized(),
        "collector": (gc.isenabled(), gc.get_freeze_count() > 0),
    }


def test_fit_returns_the_record_and_leaves_the_process_as_it_was(
    settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # then a session chooses its threads
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    torch.set_float32_matmul_precision("medium")
    gc.freeze()
    try:
        before = state_of_the_process()
        run = sfed.fit(validate(settings))
        assert state_of_the_process() == before
    finally:
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision("highest")
        gc.unfreeze()
    assert run == sfed.open_run(tmp_path / "run")
    assert [event["round"] for event in run.rounds] == [0, 1, 2]
    assert run.config["federated"]["num_rounds"] == 2
    assert list(run.clients) == [0, 1]
    assert list(run.adapters) == ["client-0000", "client-0001", "global"]
    assert run.clients[1].adapter == run.adapters["client-0001"]
    assert run.clients[1].examples == run.rounds[-1]["clients"][1]["examples"]
    assert run.scores["personal_loss"] == run.rounds[-1]["eval/personal_loss_unweighted"]


def test_fit_again_returns_the_same_record_and_trains_nothing(settings: dict[str, Any]):
    config = validate(settings)
    first = sfed.fit(config)
    again = sfed.fit(config)
    assert (again.rounds, again.clients, again.scores) == (
        first.rounds,
        first.clients,
        first.scores,
    )


def test_fit_raises_and_restores_where_something_is_wrong(settings: dict[str, Any]):
    before = state_of_the_process()
    missing = {**settings, "data": {**settings["data"], "train_files": "no-such-file.jsonl"}}
    with pytest.raises(sfed.ConfigError, match=r"no-such-file\.jsonl"):
        sfed.fit(validate(missing))
    rows = Path(settings["output"]["dir"]) / "rows.jsonl"
    rows.write_text("{}\n")
    odd = {**settings, "data": {**settings["data"], "train_files": str(rows)}}
    with pytest.raises(sfed.DataError, match=r"rows\.jsonl"):
        sfed.fit(validate(odd))
    sfed.fit(validate(settings))
    other = {**settings, "seed": 7}
    with pytest.raises(sfed.CheckpointError, match="seed: 0"):
        sfed.fit(validate(other))
    assert state_of_the_process() == before


def test_fit_raises_where_training_fails(settings: dict[str, Any]):
    settings["train"] |= {"lr": 1e30, "max_grad_norm": None, "local_steps": 4}
    with pytest.raises(sfed.TrainingFailedError, match=r"train\.lr"):
        sfed.fit(validate(settings))
    assert not torch.distributed.is_initialized()


def test_fit_refuses_a_process_group_of_the_caller(settings: dict[str, Any]):
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        with pytest.raises(sfed.UserError, match="destroy_process_group"):
            sfed.fit(validate(settings))
        assert torch.distributed.is_initialized()
    finally:
        torch.distributed.destroy_process_group()
