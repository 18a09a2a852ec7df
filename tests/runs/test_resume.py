"""Property 8: kill at any moment, resume anywhere: the adapters of the undisturbed run."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest

from sfed.clients.round_stats import RoundStats
from sfed.config import load as config_load
from sfed.data import splits, tokenize
from sfed.distributed.watchdog import Watchdog
from sfed.federated import evaluate, local, session
from sfed.federated.context import RoundPlan, Run
from sfed.utils.errors import UserError
from tests.support import disturbed, runs, tiny
from tests.support.deadlines import HANG_SECONDS, scaled, wait_until
from tests.support.disturbed import Moment, train_with_signal
from tests.support.processes import ends_of, on_processes
from tests.support.selection import full

pytestmark = [pytest.mark.dist, pytest.mark.slow]

ADAMW = {"lr": 1e-2, "local_steps": 4, "batch_size": 4}
SGD = {**ADAMW, "optimizer": "sgd", "lr": 0.1}
FOUR = {"num_clients": 4, "num_rounds": 4}


def settings(tiny_folder: Path, out: Path, name: str = "run", **sections: object) -> dict:
    sections = {"train": ADAMW, "federated": FOUR, **sections}
    return tiny.settings(tiny_folder, output={"dir": str(out), "name": name}, **sections)


@pytest.fixture
def calm(trained: Callable[..., Path]) -> Callable[..., Path]:
    """Runs with these settings that nobody disturbs: only read their folders."""

    def run(num_processes: int, **sections: object) -> Path:
        return trained(num_processes, **{"train": ADAMW, "federated": FOUR, **sections})

    return run


def test_a_process_killed_in_the_middle_of_a_round_costs_nothing_but_that_round(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    """kill -9 of one of two processes, then the same command: bit for bit the same adapters."""
    own, folder = settings(tiny_folder, tmp_path), tmp_path / "run"
    own["federated"]["deadline_seconds"] = scaled(10.0)  # the survivor waits as long
    ends = ends_of(2, train_with_signal, own, Moment(1, 3, 2), signal.SIGKILL)
    assert ends[1].code == -signal.SIGKILL
    assert ends[0].code not in (0, -signal.SIGKILL), "the survivor ends by itself"
    assert not (folder / "adapters").exists()
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2]
    again = ends_of(2, runs.train_settings, own)
    assert [end.code for end in again] == [0, 0], again
    assert "resuming after round" in again[0].said
    undisturbed = calm(2)
    assert runs.identical(runs.adapters(undisturbed), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2, 3, 4]
    assert [e["eval/loss"] for e in runs.rounds(undisturbed)] == [
        e["eval/loss"] for e in runs.rounds(folder)
    ]


UNEQUAL = {
    "train": {**ADAMW, "local_steps": None, "local_epochs": 1, "micro_batch_size": 2},
    "partition": {"kind": "dirichlet", "key": "kind", "concentration": 0.5},
}


@pytest.mark.parametrize(
    ("sharding", "sections"),
    [("none", {}), full("zero3", {}), ("zero3", UNEQUAL)],
    ids=["replicas", "zero3", "zero3 with unequal clients and micro passes"],
)
def test_sigterm_finishes_the_step_writes_and_exits_0(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path], sharding: str, sections: dict
) -> None:
    """The request reaches one process only; both stop, and the resumed run is the undisturbed.

    Nobody asked the other one: for whoever started it the run is not done, so it exits 1.
    """
    shape = {"backbone": {"sharding": sharding}} | sections
    own, folder = settings(tiny_folder, tmp_path, **shape), tmp_path / "run"
    ends = ends_of(2, train_with_signal, own, Moment(1, 3, 2), signal.SIGTERM)
    assert [end.code for end in ends] == [1, 0], ends
    assert "stopped as asked" in ends[0].said and "report     sfed report" in ends[0].said
    assert not (folder / "adapters").exists()
    runs.run(2, own)
    undisturbed = calm(2, **shape)
    assert runs.identical(runs.adapters(undisturbed), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2, 3, 4]
    assert runs.rounds(undisturbed)[-1]["train/loss"] == runs.rounds(folder)[-1]["train/loss"]


def interrupt(own: dict[str, Any], seconds_apart: float) -> None:
    """Train; the only process gets Ctrl-C twice within round 3."""

    def twice(_run: Run, _stop: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(seconds_apart)
        os.kill(os.getpid(), signal.SIGINT)

    disturbed.at(Moment(0, 3, 2), twice)
    runs.train_settings(own)


@pytest.mark.parametrize(
    ("seconds_apart", "code"), [(0.0, 0), (1.1, -signal.SIGINT)], ids=["as by torchrun", "twice"]
)
def test_ctrl_c_stops_as_sigterm_does_and_a_second_one_ends_at_once(
    tiny_folder: Path,
    tmp_path: Path,
    calm: Callable[..., Path],
    seconds_apart: float,
    code: int,
) -> None:
    own = settings(tiny_folder, tmp_path)
    (end,) = ends_of(1, interrupt, own, seconds_apart)
    assert end.code == code, end
    assert "Ctrl-C again ends at once" in end.said
    assert ("stopped as asked" in end.said) == (code == 0)
    assert "Traceback" not in end.said
    assert runs.identical(runs.adapters(calm(1)), runs.adapters(runs.run(1, own)))


def test_a_run_stopped_on_four_processes_goes_on_on_two_and_on_one(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    whole = calm(1, train=SGD)
    for rounds, num in ((1, 4), (2, 2), (4, 1)):
        part = {**FOUR, "num_rounds": rounds}
        moved = runs.run(num, settings(tiny_folder, tmp_path, "moved", train=SGD, federated=part))
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(moved)) <= 1e-6
    assert [event["round"] for event in runs.rounds(moved)] == [0, 1, 2, 3, 4]


def test_a_round_that_was_stopped_within_goes_on_on_another_number_of_processes(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    shape = {
        "train": {**SGD, "lr": 0.02, "local_steps": 12},
        "federated": {**FOUR, "num_rounds": 3},
    }
    own = settings(tiny_folder, tmp_path, **shape)
    # As Slurm does when the time is nearly over.
    ends = ends_of(2, train_with_signal, own, Moment(0, 2, 5), signal.SIGUSR1)
    assert [end.code for end in ends] == [0, 1], ends
    names = [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()]
    assert any(name.endswith("-partial") for name in names), names
    earlier = RoundStats(np.array(runs.newest_facts(tmp_path / "run")["ledger"])).tokens.sum()
    whole, folder = calm(1, **shape), runs.run(1, own)
    resumed = runs.rounds(folder)[2]
    [process] = resumed["time/processes"]
    read_since = resumed["time/tokens_per_second"] * resumed["time/local_seconds"]
    assert read_since == pytest.approx(process["tokens"] - earlier) and earlier > 0
    assert runs.relative_difference(runs.adapters(whole), runs.adapters(folder)) <= 1e-5
    assert runs.rounds(folder)[-1]["train/loss"] == pytest.approx(
        runs.rounds(whole)[-1]["train/loss"], rel=1e-6
    )


def test_paged_clients_resume_with_their_optimizer_state(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    shape = {"federated": {**FOUR, "clients_per_pass": 2, "clients_per_round": 3}}
    whole = calm(1, **shape)
    short = {"federated": {**shape["federated"], "num_rounds": 2}}
    runs.run(1, settings(tiny_folder, tmp_path, "parts", **short))
    parts = runs.run(1, settings(tiny_folder, tmp_path, "parts", **shape))
    assert runs.identical(runs.adapters(whole), runs.adapters(parts))


def test_only_whole_checkpoints_exist_and_a_damaged_one_is_passed_over(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    whole = calm(1)
    short = settings(tiny_folder, tmp_path, "parts", federated={**FOUR, "num_rounds": 3})
    folder = runs.run(1, short)
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == ["round-000002", "round-000003"]
    shard = next((folder / "checkpoints" / "round-000003").glob("clients-*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-100])
    # What a process that died while writing leaves behind.
    shutil.copytree(folder / "checkpoints" / "round-000002", folder / "checkpoints" / ".x.tmp")
    runs.run(1, settings(tiny_folder, tmp_path, "parts"))
    assert runs.identical(runs.adapters(whole), runs.adapters(folder))
    assert [event["round"] for event in runs.rounds(folder)] == [0, 1, 2, 3, 4]


def test_resetting_the_optimizer_differs_from_keeping_it(calm: Callable[..., Path]) -> None:
    kept = calm(1)
    other = calm(1, federated={**FOUR, "optimizer_state": "reset"})
    assert runs.relative_difference(runs.adapters(kept), runs.adapters(other)) > 1e-4


def test_the_number_of_clients_stays_that_of_the_first_start(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    """federated.num_clients null: N is the world size at first, whatever it becomes."""
    free: dict[str, Any] = {"num_clients": None}
    whole = calm(1, train=SGD, federated={"num_clients": 2, "num_rounds": 3})
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
    free = {"num_clients": None, "num_rounds": 1}
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


def hold_or_be_refused(own: dict, folder: Path) -> tuple[int, list[str]]:
    """Process 0 trains and rests in round 2 until process 1 was refused its folder twice."""
    refused = folder / "refused"
    if disturbed.as_a_run_of_its_own() == 0:
        disturbed.at(Moment(0, 2, 1), lambda _run, _stop: wait_until(refused.exists))
        runs.train_settings(own)
        return os.getpid(), []
    wait_until(lambda: any((folder / "run" / "checkpoints").glob("round-000001")))
    said = []
    for resume in ("auto", "never"):
        config = config_load.validate({**own, "output": {**own["output"], "resume": resume}})
        with pytest.raises(UserError) as mistake:
            session.run_session(config)
        said.append(str(mistake.value))
    refused.touch()
    return os.getpid(), said


def test_two_runs_in_one_folder_are_refused_and_the_first_goes_on(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    own = settings(tiny_folder, tmp_path)
    (holder, _), (_, said) = on_processes(2, hold_or_be_refused, own, tmp_path)
    assert len(said) == 2
    for text in said:
        assert f"another run is using {tmp_path / 'run'} (process {holder} on " in text
    assert runs.identical(runs.adapters(calm(1)), runs.adapters(tmp_path / "run"))


def train_while_the_clock_jumps(run_settings: dict) -> None:
    jumps = itertools.cycle([0.0, 7200.0, -7200.0, 1e6])
    real = time.time  # noqa: TID251  (the clock that jumps)
    time.time = lambda: real() + next(jumps)  # noqa: TID251
    runs.train_settings(run_settings)


def test_a_clock_that_jumps_changes_nothing(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    ends = ends_of(2, train_while_the_clock_jumps, settings(tiny_folder, tmp_path, "jumpy"))
    assert [end.code for end in ends] == [0, 0], ends
    jumpy = tmp_path / "jumpy"
    assert runs.identical(runs.adapters(calm(2)), runs.adapters(jumpy))
    for event in runs.rounds(jumpy):
        seconds = [event[key] or 0.0 for key in event if key.endswith("_seconds")]
        assert all(0.0 <= one < 3600.0 for one in seconds), "less than any jump"


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


@pytest.mark.parametrize(
    ("sharding", "number"),
    [("none", 1), full("none", 3), full("zero3", 1), ("zero3", 3)],
    ids=[f"{s}, {when}" for s in ("none", "zero3") for when in ("before training", "global")],
)
def test_sigterm_in_an_evaluation_ends_it_and_it_is_made_up_for(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path], sharding: str, number: int
) -> None:
    """In the evaluation before training, or in that of the global adapter after round 1."""
    shape = {
        "federated": {**FOUR, "num_rounds": 2},
        "backbone": {"sharding": sharding},
        "evaluation": {"batch_size": 1},
        "train": {**ADAMW, "local_steps": 2},
    }
    own = settings(tiny_folder, tmp_path, **shape)
    ends = ends_of(2, stop_in_evaluation, own, number)
    assert [end.code for end in ends] == [1, 0], ends
    assert "stopped as asked" in ends[0].said
    done = [event["round"] for event in runs.rounds(tmp_path / "run")]
    assert done == ([] if number == 1 else [0]), "the evaluation was not finished"
    folder, undisturbed = runs.run(2, own), calm(2, **shape)
    assert runs.identical(runs.adapters(undisturbed), runs.adapters(folder))
    for one, other in zip(runs.rounds(undisturbed), runs.rounds(folder), strict=True):
        timeless = {key for key in one if key.partition("/")[0] not in ("time", "memory")}
        assert all(one[key] == other[key] for key in timeless)


def test_sigterm_before_training_ends_all_processes_at_once(
    tiny_folder: Path, tmp_path: Path
) -> None:
    ends = ends_of(2, stop_while_loading, settings(tiny_folder, tmp_path))
    assert [end.code for end in ends] == [1, 0], ends
    assert not (tmp_path / "run").exists()


def stop_while_loading(run_settings: dict) -> None:
    healthy = splits.load

    def load(*arguments: object) -> object:
        if os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(HANG_SECONDS)
        return healthy(*arguments)

    splits.load = load
    runs.train_settings(run_settings)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_while_rows_are_tokenised_ends_a_run_at_once(
    tiny_folder: Path, tmp_path: Path, number: signal.Signals
) -> None:
    rows = tmp_path / "rows.jsonl"
    row = json.dumps({"prompt": "How many? ", "completion": "Some."})
    rows.write_text(f"{row}\n" * 40)
    data = {"task": "text", "max_tokens": 63, "train_files": str(rows)}
    own = settings(tiny_folder, tmp_path, data=data)
    (end,) = ends_of(1, stop_while_tokenising, own, tmp_path / "cache", number)
    assert end.code == 0 and "stopped as asked, before training began" in end.said, end
    assert "Traceback" not in end.said
    assert runs.rounds(runs.run(1, own))[-1]["round"] == FOUR["num_rounds"]


def stop_while_tokenising(own: dict, cache: Path, number: signal.Signals) -> None:
    """Train with an empty cache; the signal comes at the eleventh row."""
    datasets.config.HF_DATASETS_CACHE = cache
    checked, count = tokenize.checked_pair, itertools.count()

    def read(*arguments: Any) -> Any:
        if next(count) == 10:
            os.kill(os.getpid(), number)
        return checked(*arguments)

    tokenize.checked_pair = read
    runs.train_settings(own)


def test_sigterm_to_a_process_that_waits_for_the_others_stops_all(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path]
) -> None:
    """Process 0 has done its part of round 2 and waits; process 1 has most of its own to do."""
    own = settings(tiny_folder, tmp_path)
    ends = ends_of(2, stop_while_waiting, own, tmp_path / "asked")
    assert [end.code for end in ends] == [0, 1], ends
    assert "stopped as asked" in ends[0].said
    assert runs.identical(runs.adapters(calm(2)), runs.adapters(runs.run(2, own)))


@pytest.mark.parametrize("extra", [-1, 1])
def test_a_client_that_misses_a_step_ends_the_run_by_name_and_is_no_stop(
    tiny_folder: Path, tmp_path: Path, calm: Callable[..., Path], extra: int
) -> None:
    """Nobody asked to stop: the run failed, says where, and keeps nothing of that round."""
    own, folder = settings(tiny_folder, tmp_path), tmp_path / "run"
    ends = ends_of(2, train_with_other_count, own, Moment(1, 2, 1), extra)
    assert [end.code for end in ends] == [1, 1], ends
    client = runs.newest_facts(folder)["placement"][1][0]
    said = f"round 2: client {client} (process 1) made {4 + extra} local steps instead of 4"
    assert said in ends[0].said and "the run is not complete" in ends[0].said
    assert "stopped as asked" not in ends[0].said
    assert [one.name for one in (folder / "checkpoints").iterdir()] == ["round-000001"]
    assert runs.identical(runs.adapters(calm(2)), runs.adapters(runs.run(2, own)))


def train_with_other_count(own: dict, moment: Moment, extra: int) -> None:
    """Train; in one round the first client of a process has made another number of steps."""
    gather = local.gather

    def gather_other(run: Run, plan: RoundPlan, stats: RoundStats, seconds: float) -> Any:
        if (run.world.rank, plan.finished_rounds) == (moment.process, moment.round_number):
            stats.steps[run.clients.own[0]] += extra
        return gather(run, plan, stats, seconds)

    local.gather = gather_other
    runs.train_or_leave(own)


def stop_while_waiting(own: dict, asked: Path) -> None:
    """Train; in round 2 process 0 gets SIGTERM while it waits, which process 1 waits to hear."""
    train, pause = local.train, Watchdog.pause

    def train_and_wait(run: Run, plan: RoundPlan, *arguments: Any) -> None:
        train(run, plan, *arguments)
        if os.environ["RANK"] == "0" and plan.finished_rounds == 2:
            Watchdog.pause = ask_and_pause

    def ask_and_pause(self: Watchdog) -> None:
        if not asked.exists():
            os.kill(os.getpid(), signal.SIGTERM)
            asked.touch()
        pause(self)

    def hear(run: Run, _stop: Any) -> None:
        wait_until(lambda: run.world.watch.is_asked_to_stop)

    local.train = train_and_wait
    disturbed.at(Moment(1, 2, 1), hear)
    runs.train_settings(own)
