"""The method of docs/methods.md, as a user would copy it: two processes, a resume, a sweep."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from sfed.storage.run_record import open_run
from sfed.sweep import __main__ as sweep
from tests.support import runs, tiny
from tests.support.processes import ends_of

pytestmark = [pytest.mark.dist, pytest.mark.slow]

PAGE = Path(__file__).resolve().parents[2] / "docs" / "methods.md"
THREE = {"num_clients": 3, "num_rounds": 2}
TRAIN = {"lr": 1e-2, "local_steps": 2, "batch_size": 4}
COUNTING = """
import torch
from sfed import CommonLayer, Method

def damped(sent):
    mean = torch.einsum("n,nij->ij", sent.weights.float(), sent.factors["A"])
    velocity = 0.5 * sent.state.get("velocity", torch.zeros_like(mean)) + mean - sent.before["A"]
    return CommonLayer({"A": sent.before["A"] + velocity}, {"velocity": velocity})

Damped = Method("damped", (("A", "B"),), (("A",),), (0.0, -1.0), False, 16.0, damped)
"""


def example(folder: Path) -> Path:
    """The file that the page shows."""
    [code] = re.findall(
        r"<!-- own method -->\n```python\n(.*?)```\n<!-- end -->", PAGE.read_text(), re.DOTALL
    )
    path = folder / "my_method.py"
    path.write_text(code)
    return path


def settings(tiny_folder: Path, folder: Path, method: str, name: str, **federated: object) -> dict:
    return tiny.settings(
        tiny_folder,
        output={"dir": str(folder), "name": name},
        federated={**THREE, "method": method, **federated},
        train=TRAIN,
    )


def test_its_a_is_the_median_of_what_the_clients_would_hold_alone(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """After one round: the same start, so ``local`` has the factors that were sent."""
    method = f"{example(tmp_path)}:Median"
    ours = runs.run(2, settings(tiny_folder, tmp_path, method, "median", num_rounds=1))
    alone = runs.run(1, settings(tiny_folder, tmp_path, "local", "local", num_rounds=1))
    ours_adapters, sent = runs.adapters(ours), runs.adapters(alone)
    for client in sent:
        b = runs.factors(ours_adapters[client], "B")
        assert all(torch.equal(b[n], t) for n, t in runs.factors(sent[client], "B").items())
        for name, a in runs.factors(ours_adapters[client], "A").items():
            median = torch.stack([sent[other][name] for other in sent]).median(dim=0).values
            assert torch.equal(a, median)
    facts = json.loads((ours / "config.json").read_text())
    assert re.fullmatch(r"Median@[0-9a-f]{16}", facts["resolved"]["method"])
    assert open_run(ours).method == method


def test_the_state_of_a_server_step_survives_a_resume_on_another_number_of_processes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "damped.py"
    path.write_text(COUNTING)
    method = f"{path}:Damped"
    whole = runs.run(1, settings(tiny_folder, tmp_path, method, "whole", num_rounds=3))
    parts = runs.run(1, settings(tiny_folder, tmp_path, method, "parts", num_rounds=2))
    checkpoint = parts / "checkpoints" / "round-000002"
    assert {file.name for file in checkpoint.glob("server-*")} == {"server-0000.safetensors"}
    parts = runs.run(2, settings(tiny_folder, tmp_path, method, "parts", num_rounds=3))
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(parts)) < 1e-5
    # Without its state it would be the plain mean: the test would then compare nothing.
    fedsa = runs.run(1, settings(tiny_folder, tmp_path, "fedsa", "fedsa", num_rounds=3))
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(fedsa)) > 1e-4


def test_it_stands_beside_the_methods_of_the_program_in_a_sweep(
    tiny_folder: Path, tmp_path: Path
) -> None:
    base = settings(tiny_folder, tmp_path, "sfed", "unused", num_rounds=1)
    del base["output"]["name"]
    example(tmp_path)
    grid = {
        "name": "own",
        "set": base,
        "grid": {"federated.method": ["sfed", "my_method.py:Median"]},
    }
    path = tmp_path / "own.yaml"
    path.write_text(json.dumps(grid))
    with pytest.raises(SystemExit) as end:
        sweep.main([str(path)])
    assert end.value.code == 0
    folders = sorted(one.name for one in (tmp_path / "own").iterdir() if one.is_dir())
    assert len(folders) == 2 and "sfed" in folders
    rows = (tmp_path / "own" / "sweep.csv").read_text()
    assert rows.count("complete") == 2 and "Median" in rows


PROXIMAL = """
from sfed import Method

def proximal(held):
    return {f: 3.0 * (held.factors[f] - one) for f, one in held.received.items()}

def wrong(held):
    return {"A": held.factors["B"]}

FORM = (("A", "B"),), (("A",),), (0.0, -1.0), False, 16.0
Proximal = Method("proximal", *FORM, local_term=proximal)
Wrong = Method("wrong", *FORM, local_term=wrong)
"""


def test_a_local_term_of_its_own_is_that_of_the_key(tiny_folder: Path, tmp_path: Path) -> None:
    """FedProx written as a function, against ``prox_mu``; and one that fails, on all processes."""
    path = tmp_path / "proximal.py"
    path.write_text(PROXIMAL)
    sgd = {**TRAIN, "optimizer": "sgd", "lr": 0.05, "local_steps": 5, "max_grad_norm": None}
    own = settings(tiny_folder, tmp_path, f"{path}:Proximal", "own")
    key = settings(tiny_folder, tmp_path, "fedsa", "key", prox_mu=3.0)
    plain = settings(tiny_folder, tmp_path, "fedsa", "plain")
    found = [
        runs.adapters(runs.run(number, {**one, "train": sgd}))
        for number, one in ((2, own), (1, key), (1, plain))
    ]
    assert runs.relative_difference(found[0], found[1]) < 5e-6
    assert runs.relative_difference(found[0], found[2]) > 1e-4
    broken = settings(tiny_folder, tmp_path, f"{path}:Wrong", "broken")
    ends = ends_of(2, runs.train_or_leave, broken)
    assert [end.code for end in ends] == [2, 2]
    assert "the local term wrong of federated.method, layer model.layers.0" in ends[0].said
