"""Fixtures and settings of all tests: no network, quiet libraries, reproducible hypothesis."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before any library reads them.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import torch

# Before anything imports Triton, whose own functions are made for the interpreter or the compiler.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import datasets
import pytest
from hypothesis import settings

from tests.support import glue, netns, runs, tiny, used

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=100)
settings.load_profile("ci")
torch.set_num_threads(1)
SHARED_DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(scope="session", autouse=True)
def _own_caches(tmp_path_factory: pytest.TempPathFactory):
    """Caches of their own, so that a test neither uses nor leaves anything outside."""
    cache = tmp_path_factory.mktemp("cache")
    os.environ["HF_DATASETS_CACHE"] = str(cache / "datasets")
    os.environ["XDG_CACHE_HOME"] = str(cache)
    datasets.config.HF_DATASETS_CACHE = cache / "datasets"


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model`` and ``rows.jsonl``, shared by all tests: only read it."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny.save_model(folder / "model")
    tiny.save_rows(folder / "rows.jsonl", 80, kinds=4)
    return folder


@pytest.fixture(scope="session")
def trained(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Run folders by number of processes and settings, each trained once: only read them."""
    done: dict[str, Path] = {}

    def train(num_processes: int, *, seed: int = 0, **sections: object) -> Path:
        key = json.dumps([num_processes, seed, sections], sort_keys=True)
        if key not in done:
            output = {"dir": str(tmp_path_factory.mktemp("trained")), "name": "run"}
            settings = tiny.settings(tiny_folder, seed=seed, output=output, **sections)
            done[key] = runs.run(num_processes, settings)
        return done[key]

    return train


@pytest.fixture(scope="session")
def glue_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``roberta``, ``bert``, ``llama`` and rows of GLUE's forms: only read it."""
    return glue.save_all(tmp_path_factory.mktemp("glue"))


@pytest.fixture(scope="session")
def used_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, files of three clients and held-out rows: only read it."""
    return used.save_files(tmp_path_factory.mktemp("use"))


@pytest.fixture(scope="session")
def used_run(used_folder: Path) -> Path:
    """A run of three named clients with a checkpoint of each round: only read it."""
    return used.train_texts(used_folder)


@pytest.fixture(scope="session")
def used_classifier(used_folder: Path) -> Path:
    """A run of a classifier whose base model has no pooler: only read it."""
    return used.train_classifier(used_folder)


@pytest.fixture
def shared_data() -> Path:
    """Real data and models where they are at hand."""
    if not SHARED_DATA.is_dir():
        pytest.skip("the folder with real data and models is not at hand")
    return SHARED_DATA


@pytest.fixture
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[netns.Node, netns.Node]]:
    """Two nodes with a cable between them, where this machine can make some."""
    try:
        with netns.two_nodes(tmp_path_factory.mktemp("nodes")) as both:
            yield both
    except netns.NoNodesError as reason:
        pytest.skip(str(reason))
