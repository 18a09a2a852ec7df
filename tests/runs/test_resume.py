"""Property 8: kill at any moment, resume anywhere: the adapters of the undisturbed run."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sfed.data import splits
from sfed.federated import evaluate, local
from sfed.utils import command
from tests.support import runs, tiny
from tests.support.processes import ends_of, free_port

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ADAMW = {"lr": 1e-2, "local_steps": 4, "batch_size": 4}
SGD = {**ADAMW, "optimizer": "sgd", "lr": 0.1}
FOUR = {"num_clients": 4, "num_rounds": 4, "deadline_seconds": 30.0}


def settings(tiny_folder: Path, out: Path, name: str = "run", **sections: object) -> dict:
    sections = {"train": ADAMW, "federated": FOUR, **sections}
    return tiny.settings(tiny_folder, output={"dir": str(out), "name": name}, **sections)


def start(num: int, run_settings: dict, folder: Path) -> list[subprocess.Popen]:
    """Start the trainer as separate programs, without a launcher that would clean up."""
    path = folder / "config.json"
    path.write_text(json.dumps(run_settings))
    port = str(free_port())
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sfed.train", str(path)],
            env={
                **os.environ,
                "RANK": str(process),
                "LOCAL_RANK": str(process),
                "WORLD_SIZE": str(num),
                "LOCAL_WORLD_SIZE": str(num),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": port,
                "PYTHONPATH": str(Path(__file__).resolve().parents[2]),
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(num)
    ]


def wait(processes: list[subprocess.Popen], seconds: float = 90.0) -> list[int]:
    end = time.monotonic() + seconds
    codes = []
    for process in processes:
        try:
            codes.append(process.wait(max(0.1, end - time.monotonic())))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            codes.append(-999)
    return codes


def wait_for_round(run_folder: Path, number: int, processes: list[subprocess.Popen]) -> None:
    end = time.monotonic() + 90
    metrics = run_folder / "metrics.jsonl"
    while time.monotonic() < end:
        if metrics.is_file() and f'"round": {number},' in metrics.read_text():
            return
        assert all(process.poll() is None for process in processes), "the run ended too early"
        time.sleep(0.005)
    raise TimeoutError(f"round {number} did not come")


LONG = {**FOUR, "num_rounds": 30}


def test_a_process_killed_in_the_middle_of_a_round_costs_nothing_but_that_round(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """kill -9 of one of two processes, then the same command: bit for bit the same adapters."""
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm", federated=LONG))
    disturbed = settings(tiny_folder, tmp_path, "disturbed", federated=LONG)
    folder = tmp_path / "disturbed"
    processes = start(2, disturbed, tmp_path)
    wait_for_round(folder, 3, processes)
    processes[1].send_signal(signal.SIGKILL)
    codes = wait(processes)
    assert codes[1] == -signal.SIGKILL
    assert codes[0] not in (0, -999), "the survivor must notice before its deadline"
    assert not (folder / "adapters").exists()
    assert len(runs.rounds(folder)) < 31
    again = start(2, disturbed, tmp_path)
    outputs = [process.communicate(timeout=600)[0] for process in again]
    assert [process.returncode for process in again] == [0, 0], outputs
    assert "going on after round" in outputs[0]
    assert runs.identical(runs.adapters(calm), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == list(range(31))
    assert [e["eval/loss"] for e in runs.rounds(calm)] == [
        e["eval/loss"] for e in runs.rounds(folder)
    ]


UNEQUAL = {
    "train": {**ADAMW, "local_steps": None, "local_epochs": 2, "micro_batch_size": 2},
    "partition": {"kind": "dirichlet", "key": "kind", "concentration": 0.5},
}


@pytest.mark.parametrize(
    ("sharding", "sections"),
    [("none", {}), ("zero3", {}), ("zero3", UNEQUAL)],
    ids=["replicas", "zero3", "zero3 with unequal clients and micro passes"],
)
def test_sigterm_finishes_the_step_writes_and_exits_0(
    tiny_folder: Path, tmp_path: Path, sharding: str, sections: dict
) -> None:
    """The request reaches one process only; both stop, and the resumed run is the undisturbed.

    Nobody asked the other one: for whoever started it the run is not done, so it exits 1.
    """
    shape = {"federated": {**LONG, "num_rounds": 12}, "backbone": {"sharding": sharding}}
    shape |= {"train": {**ADAMW, "local_steps": 10}} | sections
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm", **shape))
    disturbed = settings(tiny_folder, tmp_path, "disturbed", **shape)
    folder = tmp_path / "disturbed"
    processes = start(2, disturbed, tmp_path)
    wait_for_round(folder, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    assert [process.returncode for process in processes] == [1, 0], outputs
    assert "stopped as asked" in outputs[0]
    assert not (folder / "adapters").exists()
    again = start(2, disturbed, tmp_path)
    assert wait(again) == [0, 0]
    assert runs.identical(runs.adapters(calm), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == list(range(13))
    assert runs.rounds(calm)[-1]["train/loss"] == runs.rounds(folder)[-1]["train/loss"]


def test_a_run_stopped_on_four_processes_goes_on_on_two_and_on_one(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole = runs.run(1, settings(tiny_folder, tmp_path, "whole", train=SGD))
    for rounds, num in ((1, 4), (2, 2), (4, 1)):
        part = {**FOUR, "num_rounds": rounds}
        moved = runs.run(num, settings(tiny_folder, tmp_path, "moved", train=SGD, federated=part))
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(moved)) <= 1e-6
    assert [event["round"] for event in runs.rounds(moved)] == [0, 1, 2, 3, 4]


def test_a_round_that_was_stopped_within_goes_on_on_another_number_of_processes(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = {"train": {**SGD, "lr": 0.02, "local_steps": 40}}
    shape["federated"] = {**FOUR, "num_rounds": 3}
    whole = runs.run(1, settings(tiny_folder, tmp_path, "whole", **shape))
    moved = settings(tiny_folder, tmp_path, "moved", **shape)
    processes = start(2, moved, tmp_path)
    wait_for_round(tmp_path / "moved", 1, processes)
    processes[0].send_signal(signal.SIGUSR1)  # as Slurm does when the time is nearly over
    assert wait(processes) == [0, 1]
    names = [path.name for path in (tmp_path / "moved" / "checkpoints").iterdir()]
    assert any(name.endswith("-partial") for name in names), names
    folder = runs.run(1, moved)
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(folder)) <= 1e-5
    assert runs.rounds(folder)[-1]["train/loss"] == pytest.approx(
        runs.rounds(whole)[-1]["train/loss"], rel=1e-6
    )


def test_paged_clients_resume_with_their_optimizer_state(tiny_folder: Path, tmp_path: Path) -> None:
    shape = {"federated": {**FOUR, "clients_per_pass": 2, "clients_per_round": 3}}
    whole = runs.run(1, settings(tiny_folder, tmp_path, "whole", **shape))
    short = {"federated": {**shape["federated"], "num_rounds": 2}}
    runs.run(1, settings(tiny_folder, tmp_path, "parts", **short))
    parts = runs.run(1, settings(tiny_folder, tmp_path, "parts", **shape))
    assert runs.identical(runs.adapters(whole), runs.adapters(parts))


def test_only_whole_checkpoints_exist_and_a_damaged_one_is_passed_over(
    tiny_folder: Path, tmp_path: Path
) -> None:
    whole = runs.run(1, settings(tiny_folder, tmp_path, "whole"))
    short = settings(tiny_folder, tmp_path, "parts", federated={**FOUR, "num_rounds": 3})
    folder = runs.run(1, short)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["round-000002", "round-000003"]
    shard = next((folder / "checkpoints" / "round-000003").glob("client-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    # What a process that died while writing leaves behind.
    shutil.copytree(folder / "checkpoints" / "round-000002", folder / "checkpoints" / ".x.tmp")
    runs.run(1, settings(tiny_folder, tmp_path, "parts"))
    assert runs.identical(runs.adapters(whole), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2, 3, 4]


def test_resetting_the_optimizer_differs_from_keeping_it(tiny_folder: Path, tmp_path: Path) -> None:
    kept = runs.run(1, settings(tiny_folder, tmp_path, "kept"))
    reset = {**FOUR, "optimizer_state": "reset"}
    other = runs.run(1, settings(tiny_folder, tmp_path, "reset", federated=reset))
    assert runs.relative_difference(runs.adapters(kept), runs.adapters(other)) > 1e-4


def test_the_number_of_clients_stays_that_of_the_first_start(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """federated.num_clients null: N is the world size at first, whatever it becomes."""
    free = {"num_clients": None, "deadline_seconds": 30.0}
    whole = runs.run(
        1,
        settings(
            tiny_folder,
            tmp_path,
            "whole",
            train=SGD,
            federated={**FOUR, "num_clients": 2, "num_rounds": 3},
        ),
    )
    short = settings(
        tiny_folder, tmp_path, "shrunk", train=SGD, federated={**free, "num_rounds": 2}
    )
    runs.run(2, short)
    longer = settings(
        tiny_folder, tmp_path, "shrunk", train=SGD, federated={**free, "num_rounds": 3}
    )
    (end,) = ends_of(1, runs.train_settings, longer)
    assert end.code == 0, end.said
    assert "N stays 2, one client for each process of the first start; 1 of them holds" in end.said
    shrunk = tmp_path / "shrunk"
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(shrunk)) <= 1e-6
    more = {**longer, "federated": {**free, "num_rounds": 4}}
    ends = ends_of(3, runs.train_settings, more)
    assert all(end.code for end in ends)
    assert "has N = 2, one client for each process of its first start; there are 3" in ends[0].said


def test_the_number_of_clients_stays_that_of_a_start_without_a_checkpoint(
    tiny_folder: Path, tmp_path: Path
) -> None:
    free = {"num_clients": None, "num_rounds": 1, "deadline_seconds": 30.0}
    runs.run(2, settings(tiny_folder, tmp_path, federated=free))
    stop_before_the_first_checkpoint(tmp_path / "run")
    runs.run(1, settings(tiny_folder, tmp_path, federated=free))
    assert len(runs.rounds(tmp_path / "run")[-1]["clients"]) == 2
    stop_before_the_first_checkpoint(tmp_path / "run")
    other = settings(tiny_folder, tmp_path, federated=free, train={**ADAMW, "lr": 1e-3})
    runs.run(1, other)  # another run: it has N of its own
    assert len(runs.rounds(tmp_path / "run")[-1]["clients"]) == 1


def stop_before_the_first_checkpoint(run_folder: Path) -> None:
    """Leave what a run leaves that is killed in its first round."""
    shutil.rmtree(run_folder / "checkpoints")
    shutil.rmtree(run_folder / "adapters")
    metrics = run_folder / "metrics.jsonl"
    metrics.write_text(metrics.read_text().splitlines(keepends=True)[0])


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(
    tiny_folder: Path, tmp_path: Path
) -> None:
    shape = settings(tiny_folder, tmp_path, federated={**LONG, "num_rounds": 1000})
    first = start(1, shape, tmp_path)
    wait_for_round(tmp_path / "run", 1, first)
    for resume in ("auto", "never"):
        output = {**shape["output"], "resume": resume}
        (end,) = ends_of(1, runs.train_or_leave, {**shape, "output": output})
        assert end.code == command.EXIT_MISTAKE, end.said
        assert f"another run is using {tmp_path / 'run'} (process {first[0].pid} on " in end.said
    done = len(runs.rounds(tmp_path / "run"))
    wait_for_round(tmp_path / "run", done, first)
    first[0].terminate()
    assert wait(first) == [0]


def train_while_the_clock_jumps(run_settings: dict) -> None:
    jumps = itertools.cycle([0.0, 7200.0, -7200.0, 1e6])
    real = time.time  # noqa: TID251  (the clock that jumps)
    time.time = lambda: real() + next(jumps)  # noqa: TID251
    runs.train_settings(run_settings)


def test_a_clock_that_jumps_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm"))
    ends = ends_of(2, train_while_the_clock_jumps, settings(tiny_folder, tmp_path, "jumpy"))
    assert [end.code for end in ends] == [0, 0], ends
    jumpy = tmp_path / "jumpy"
    assert runs.identical(runs.adapters(calm), runs.adapters(jumpy))
    for event in runs.rounds(jumpy):
        seconds = [event[key] or 0.0 for key in event if key.endswith("_seconds")]
        assert all(0.0 <= one < 60.0 for one in seconds)


def stop_in_evaluation(run_settings: dict, number: int) -> None:
    """Train; process 1 gets SIGTERM in the second pass of its evaluation of this number."""
    healthy, count = evaluate.Measuring.measure, itertools.count(1)
    make_pass = evaluate.Measuring.make_pass

    def measure(*arguments: object, **options: object) -> object:
        asked = next(count) == number and os.environ["RANK"] == "1"

        def passing(*inside: object) -> None:
            make_pass(*inside)
            if asked:
                os.kill(os.getpid(), signal.SIGTERM)

        evaluate.Measuring.make_pass = passing
        return healthy(*arguments, **options)

    evaluate.Measuring.measure = measure
    runs.train_settings(run_settings)


@pytest.mark.parametrize("sharding", ["none", "zero3"])
@pytest.mark.parametrize("number", [1, 3], ids=["before training", "global, after round 1"])
def test_sigterm_in_an_evaluation_ends_it_and_it_is_made_up_for(
    tiny_folder: Path, tmp_path: Path, sharding: str, number: int
) -> None:
    shape = {
        "federated": {**FOUR, "num_rounds": 2},
        "backbone": {"sharding": sharding},
        "evaluation": {"batch_size": 1},
        "train": {**ADAMW, "local_steps": 2},
    }
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm", **shape))
    disturbed = settings(tiny_folder, tmp_path, "disturbed", **shape)
    ends = ends_of(2, stop_in_evaluation, disturbed, number)
    assert [end.code for end in ends] == [1, 0], ends
    assert "stopped as asked" in ends[0].said
    done = [event["round"] for event in runs.rounds(tmp_path / "disturbed")]
    assert done == ([] if number == 1 else [0]), "the evaluation was not finished"
    folder = runs.run(2, disturbed)
    assert runs.identical(runs.adapters(calm), runs.adapters(folder))
    for one, other in zip(runs.rounds(calm), runs.rounds(folder), strict=True):
        timeless = {key for key in one if key.partition("/")[0] not in ("time", "memory")}
        assert all(one[key] == other[key] for key in timeless)


def test_sigterm_before_training_ends_all_processes_at_once(
    tiny_folder: Path, tmp_path: Path
) -> None:
    ends = ends_of(2, stop_while_loading, settings(tiny_folder, tmp_path), grace_seconds=15.0)
    assert [end.code for end in ends] == [1, 0], ends
    assert not (tmp_path / "run").exists()


def stop_while_loading(run_settings: dict) -> None:
    healthy = splits.load

    def load(*arguments: object) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60.0)
        return healthy(*arguments)

    splits.load = load
    runs.train_settings(run_settings)


def test_sigterm_to_a_process_that_waits_for_the_others_stops_all(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Process 0 has done its part of the round and waits; process 1 works for minutes."""
    shape = {"federated": {**FOUR, "num_rounds": 3, "deadline_seconds": 120.0}}
    disturbed = settings(tiny_folder, tmp_path, "disturbed", **shape)
    ends = ends_of(2, stop_while_waiting, disturbed)
    assert [end.code for end in ends] == [0, 1], ends
    assert "stopped as asked" in ends[0].said
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm", **shape))
    assert runs.identical(runs.adapters(calm), runs.adapters(runs.run(2, disturbed)))


def stop_while_waiting(run_settings: dict) -> None:
    if os.environ["RANK"] == "0":
        threading.Timer(6.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    else:
        healthy = local.LocalSteps.make

        def make(self: local.LocalSteps, step: int) -> None:
            time.sleep(0.0 if self.plan.round_index == 0 else 8.0 if step == 0 else 3.0)
            healthy(self, step)

        local.LocalSteps.make = make
    runs.train_settings(run_settings)
