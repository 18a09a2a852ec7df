"""``--against``: all contestants do the same work; nothing timed is asserted."""

from __future__ import annotations

import json
import multiprocessing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sfed.bench import __main__ as bench
from sfed.bench.against import contest, material, processes
from sfed.bench.against.hf_trainer import TrainerRounds
from sfed.bench.against.job import LONGEST_SHARE, SIGMA_OF_LENGTHS, Job
from sfed.bench.against.lean import Lean
from sfed.bench.against.material import Material
from sfed.bench.against.processes import Process
from sfed.bench.against.rounds import Rounds
from sfed.bench.against.sfed_rounds import SfedRounds
from sfed.distributed import world as distributed
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

JOB = Job("tiny", None, None, None, "text", "fp32", 3, 2, 24, 3, 4, "all-linear")
TINY = ["--against", "lean", "--model", "tiny", "--tokens", "24", "--clients", "2", "--steps", "1"]
NUM_ROUNDS = 2


def _material(job: Job, world: Any) -> Material:
    made = material.material(job, world)
    for weight in made.model.parameters():  # large enough that adapters have something to change
        weight.data.mul_(8.0 if weight.dim() > 1 and job.data is None else 1.0)
    return made


def _trained(made: Rounds) -> tuple[list[list[float]], torch.Tensor]:
    """Losses, and the adapters of all clients after some rounds: (clients, parameters)."""
    job, layout = made.material.job, made.material.layout
    for _ in range(NUM_ROUNDS):
        made.round()
    rows = [
        torch.cat([made.factor(c, p.layer, p.factor).flatten() for p in layout.pieces])
        for c in range(job.num_clients)
    ]
    return made.losses, torch.stack(rows)


def _everyone(job: Job) -> dict[str, tuple[list[list[float]], torch.Tensor]]:
    world = distributed.start(RUN_SECONDS)
    found = {
        "lean": _trained(Lean(_material(job, world))),
        "trainer": _trained(TrainerRounds(_material(job, world))),
        **{
            f"sfed {one}": _trained(SfedRounds(_material(job, world), one))
            for one in ("auto", "1", "2", "all")
        },
    }
    distributed.stop(world)
    return found


def _require_the_same(found: dict[str, tuple[list[list[float]], torch.Tensor]]) -> None:
    expected, adapters = found.pop("lean")
    flat = {loss for losses in expected for loss in losses}
    assert len(flat) == NUM_ROUNDS * len(expected[0]), "clients and rounds have losses of their own"
    assert not torch.equal(adapters[0], adapters[1])
    for losses, others in found.values():
        np.testing.assert_allclose(losses, expected, rtol=1e-5)
        # Adam makes a step of any gradient, however small: 1e-3 is one step.
        torch.testing.assert_close(others, adapters, rtol=1e-4, atol=5e-5)


@pytest.mark.slow
def test_all_contestants_give_every_client_the_same_losses_and_adapters() -> None:
    """What makes the comparison fair: the same batches, clipping, steps and means."""
    _require_the_same(on_processes(1, _everyone, JOB)[0])


@pytest.mark.slow
def test_real_examples_are_the_same_for_all_too(tiny_folder: Path) -> None:
    folder, data = str(tiny_folder / "model"), tiny_folder / "rows.jsonl"
    job = Job(folder, None, None, data, "text", "fp32", 2, 2, 64, 2, 4, ("q_proj", "v_proj"))
    _require_the_same(on_processes(1, _everyone, job)[0])


def test_random_rows_have_the_lengths_that_are_told() -> None:
    job = Job("tiny", None, None, None, "text", "fp32", 2000, 2, 40, 3, 4, "all-linear")
    data = material._random_data(job, 100)
    lengths = np.concatenate([data.train[client].lengths for client in range(2000)])
    logs = np.log(lengths)
    assert np.median(lengths) == 40
    assert np.std(logs) == pytest.approx(SIGMA_OF_LENGTHS, rel=0.02)
    assert lengths.max() <= LONGEST_SHARE * 40
    again = material._random_data(job, 100)
    assert again.train[7].digest() == data.train[7].digest() != data.train[8].digest()
    row = data.train[7].row(0)
    assert np.flatnonzero(row.is_learned)[0] == len(row.ids) // 2


def test_other_losses_are_other_work() -> None:
    same = {"lean": [[2.0, 3.0]], "sfed auto": [[2.0, 3.0003]]}
    assert contest.require_same_losses(same, 1e-3) == pytest.approx(1e-4)
    for wrong in (3.3, float("nan")):
        with pytest.raises(UserError, match="'sfed auto' and 'lean' differ"):
            contest.require_same_losses(same | {"sfed auto": [[2.0, wrong]]}, 1e-3)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--against", "flower"], "'flower' is none of lean, trainer"),
        (["--steps", "3"], "--steps belongs to --against"),
        (["--against", "lean", "--compare", "rank"], "exclude each other"),
        (["--against", "lean", "--passes", "0"], "'0' is not a whole number"),
        (["--model", "gpt2"], "--model gpt2: say llama2-7b"),
        ([*TINY, "--data", "nothing.jsonl"], "--data nothing.jsonl: there is no such file"),
        ([*TINY, "--tokens", "2000"], "give at most"),
        ([*TINY, "--data", __file__, "--layers", "1"], "need a whole model"),
        ([*TINY, "--data", __file__], "--model tiny: there is no such folder"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], told: str) -> None:
    with pytest.raises(UserError, match=told):
        bench.main(arguments)


@pytest.mark.dist
@pytest.mark.slow
def test_each_contestant_is_measured_in_a_process_of_its_own(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    bench.main([*TINY, "--passes", "auto,8", "--repeat", "2", "--json", str(out)])
    found = json.loads(out.read_text())["against"]
    lean, ours = found["contestants"]  # 8 of 2 clients is left out
    assert (lean["key"], ours["key"]) == ("lean", "sfed auto")
    assert len(lean["samples_seconds"]) == len(ours["samples_cpu_seconds"]) == 2
    assert ours["beside"]["lean"]["as_fast_as"]["count"] == 2
    assert ours["beside"]["lean"]["as_fast_as_by_cpu"]["count"] == 2
    assert set(lean["parts"]) == {"steps", "mean"}
    assert set(ours["parts"]) == {"steps", "similarity", "mean"}
    assert lean["peak_bytes"] > lean["imported_bytes"] > 0
    assert found["losses_apart"] < 1e-3
    assert "as fast as lean" in capsys.readouterr().out


def test_a_contestant_that_does_not_answer_is_named_and_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "_ANSWER_SECONDS", 0.01)
    with pytest.raises(UserError, match="'lean' has not answered"), Process(JOB, "lean") as one:
        one.ready()
    assert not multiprocessing.active_children()


def test_targets_that_the_shape_lacks_are_told_by_their_option() -> None:
    with pytest.raises(UserError, match="--targets"):
        bench.main([*TINY, "--targets", "no_such_layer"])
