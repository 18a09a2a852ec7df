"""A first run: two processes and a cache of tokenised rows that is empty."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from tests.support import glue, runs, tiny
from tests.support.processes import on_processes
from tests.support.selection import some_of

LITTLE: dict[str, dict[str, Any]] = {
    "federated": {"num_clients": 4, "num_rounds": 1},
    "train": {"local_steps": 1, "batch_size": 2},
}
FAMILIES: dict[str, dict[str, dict[str, Any]]] = {
    "text": {},
    "padded": {"data": {"packing": False}},
    "by_key": {"partition": {"kind": "by_key", "key": "kind"}},
    "dirichlet": {"partition": {"kind": "dirichlet", "key": "kind", "concentration": 5.0}},
    "by_file": {"partition": {"kind": "by_file"}},
    "cut": {"data": {"max_tokens": 15}},
    "demo": {"data": {"task": "demo", "train_files": None, "max_tokens": 128}},
    "generation": {"evaluation": {"generate": True, "max_new_tokens": 2}},
}


def train_with_cache(settings: dict[str, Any], cache: str) -> None:
    datasets.config.HF_DATASETS_CACHE = Path(cache)
    runs.train_settings(settings)


def first_run(settings: dict[str, Any], cache: Path) -> list[dict[str, Any]]:
    """The rounds of a run on two processes whose cache is empty."""
    assert not cache.exists()
    on_processes(2, train_with_cache, settings, str(cache))
    assert list(cache.rglob("*.arrow"))
    return runs.rounds(Path(settings["output"]["dir"]) / settings["output"]["name"])


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("family", some_of(FAMILIES, "text", "by_file"))
def test_a_first_run_on_text(tiny_folder, tmp_path, family):
    changes = FAMILIES[family]
    own = tiny.settings(tiny_folder, output={"dir": str(tmp_path / "runs")}, **LITTLE)
    if family == "by_file":
        for client in range(4):
            tiny.save_rows(tmp_path / f"{client}.jsonl", 8, seed=client)
        own["data"]["train_files"] = str(tmp_path / "{client}.jsonl")
    own |= {section: {**own.get(section, {}), **values} for section, values in changes.items()}
    assert first_run(own, tmp_path / "cache")[-1]["eval/loss"] is not None


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("family", some_of(["roberta", "bert", "llama"], "roberta"))
@pytest.mark.parametrize("name", some_of(["mnli", "stsb"], "mnli"))
def test_a_first_run_of_a_classifier(glue_folder, tmp_path, family, name):
    own = glue.settings(glue_folder, family, name, tmp_path / "runs", **LITTLE)
    assert first_run(own, tmp_path / "cache")[-1]["eval/loss"] is not None
