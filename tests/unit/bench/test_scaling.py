"""Scaling: rounds are measured on any number of processes, and jobs are shown together."""

from __future__ import annotations

import json
import os
import re
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sfed.bench import __main__ as bench
from sfed.bench import scaling, scaling_tables, sharded, workload
from sfed.bench.steps import Sfed
from sfed.bench.workload import Workload
from sfed.distributed import world as distributed
from sfed.models import synthetic
from sfed.utils.errors import UserError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

CPU = torch.device("cpu")
TINY = ("--model", "tiny", "--clients", "3", "--tokens", "8", "--rank", "2", "--repeat", "2")
SHARES = ("waiting_share", "mean_share")


def measure(file: str, *more: str) -> None:
    bench.main([*TINY, "--scaling", "--json", file, *more])


pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def jobs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The files of a job of one process and of a job of two."""
    folder = tmp_path_factory.mktemp("scaling")
    files = [folder / f"{num}.json" for num in (1, 2)]
    for num, file in enumerate(files, start=1):
        on_processes(num, measure, str(file))
    return files


def job_of(file: Path) -> dict[str, Any]:
    [job] = json.loads(file.read_text())["scaling"]
    return job


def test_a_job_measures_both_kinds_and_all_storages_that_differ(jobs: list[Path]) -> None:
    one, two = map(job_of, jobs)
    found = [[(row["kind"], row["storage"]) for row in job["rounds"]] for job in (one, two)]
    kinds = ("weak", "strong")
    assert found[0] == [(kind, "replica") for kind in kinds]
    assert found[1] == [(kind, storage) for kind in kinds for storage in ("replica", "zero3")]
    assert [row["clients"] for row in two["rounds"]] == [6, 6, 3, 3]
    assert [row["most_clients_of_a_process"] for row in two["rounds"]] == [3, 3, 2, 2]
    assert (two["processes"], two["nodes"], two["processes_of_a_node"]) == (2, 1, 2)


def test_shares_and_rates_are_those_of_the_samples(jobs: list[Path]) -> None:
    for job in map(job_of, jobs):
        for row in job["rounds"]:
            turns = torch.tensor(row["samples_seconds"], dtype=torch.float64)
            assert turns.shape == (2, job["processes"], 3) and bool((turns >= 0).all())
            whole = turns.sum(dim=2).mean(dim=1)
            tokens = job["steps_of_a_round"] * row["clients"] * 8 / job["processes"]
            rate = row["tokens_per_second_and_process"]
            assert rate["max"] == pytest.approx(float(tokens / whole.min()))
            for share, part in zip(SHARES, (1, 2), strict=True):
                of_turns = turns[:, :, part].mean(dim=1) / whole
                assert row[share]["min"] == pytest.approx(float(of_turns.min()))
                assert 0 <= row[share]["min"] <= row[share]["max"] <= 1
            assert (row["gather_share"] is None) == (row["storage"] == "replica")


def test_jobs_are_shown_together_by_their_number_of_processes(
    jobs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "both.json"
    bench.main(["--scaling-of", str(jobs[1]), str(jobs[0]), "--json", str(out)])
    both = json.loads(out.read_text())
    assert [job["processes"] for job in both["scaling"]] == [1, 2]
    shown = capsys.readouterr().out
    rows = [line.split("│")[1:3] for line in shown.splitlines() if line.startswith("│")]
    named = [(storage.strip(), processes.strip()) for storage, processes in rows]
    assert named == [("replica", "1"), ("replica", "2"), ("zero3", "2")] * 2
    rates = [
        row["tokens_per_second_and_process"]["median"]
        for job in both["scaling"]
        for row in job["rounds"]
        if (row["kind"], row["storage"]) == ("weak", "replica")
    ]
    assert f"{100 * rates[1] / rates[0]:.0f} %" in shown
    # What was put together can be put together again.
    bench.main(["--scaling-of", str(out)])
    assert re.findall(r"replica.*", capsys.readouterr().out) == re.findall(r"replica.*", shown)


def test_jobs_of_other_configurations_are_not_put_together(
    jobs: list[Path], tmp_path: Path
) -> None:
    other = json.loads(jobs[0].read_text())
    other["configuration"]["tokens"] = 9
    file = tmp_path / "other.json"
    file.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"tokens is 9 in .*other.json and 8 in .*2.json"):
        scaling_tables.together([file, jobs[1]])


@pytest.mark.parametrize("content", [None, "{", "[]", "{}", '{"scaling": 1}'])
def test_files_without_results_are_refused_by_name(tmp_path: Path, content: str | None) -> None:
    file = tmp_path / "odd.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UserError, match=r"--scaling-of .*odd.json"):
        bench.main(["--scaling-of", str(file)])


def test_what_excludes_each_other_is_refused() -> None:
    with pytest.raises(UserError, match="--compare and --scaling exclude each other"):
        bench.main(["--scaling", "--compare", "clients"])


def on_two_nodes(file: str) -> None:
    """Four processes as a launcher would place them on two nodes; too few clients, a budget."""
    local_rank = str(int(os.environ["RANK"]) % 2)
    os.environ.update(LOCAL_RANK=local_rank, LOCAL_WORLD_SIZE="2")
    measure(file, "--repeat", "1000", "--seconds", "0.01")


def test_on_nodes_of_several_processes_secondary_shards_are_measured_too(tmp_path: Path) -> None:
    file = tmp_path / "nodes.json"
    on_processes(4, on_two_nodes, str(file))
    job = job_of(file)
    assert (job["processes"], job["nodes"], job["processes_of_a_node"]) == (4, 2, 2)
    found = [(row["kind"], row["storage"]) for row in job["rounds"]]
    assert found == [("weak", storage) for storage in ("replica", "zero3", "zero3 hpZ")]
    [note] = json.loads(file.read_text())["notes"]
    assert "3 clients are fewer than 4 processes" in note
    assert {len(row["samples_seconds"]) for row in job["rounds"]} == {1}, "the budget ends it"


LOAD = Workload(3, 2, 12, 4, "all-linear", torch.float32, seed=5)


def on_secondary_shards() -> list[tuple[torch.Tensor, int]]:
    """Adapters after three steps on a replica, on shards and on secondary shards; how many of the
    weights have a second copy."""
    world = distributed.start(RUN_SECONDS)
    try:
        config = synthetic.model_config("tiny", None, None)
        model = synthetic.build(config, LOAD.dtype, LOAD.seed, CPU)
        ids = workload.random_tokens(config, LOAD)
        replica = Sfed(synthetic.twin(model), LOAD, ids, clients_per_pass=3)
        ways = [scaling.Storage("replica", replica)]
        for size in (1, 2, 1):  # plain shards once more: nothing of the second copies stays
            shards = sharded.Sharded(model, LOAD, ids, size)
            ways.append(scaling.Storage("shards", shards.contestant, shards))
        found = []
        for storage in ways:
            with storage.in_place():
                for _ in range(3):
                    storage.trainer.step()
            weights = storage.trainer.backbone.model.parameters()
            copies = sum(getattr(w, "ds_secondary_tensor", None) is not None for w in weights)
            found.append((storage.trainer.rows.values.clone(), copies))
        return found
    finally:
        distributed.stop(world)


def test_secondary_shards_are_gathered_to_the_same_bits() -> None:
    for ways in on_processes(2, on_secondary_shards):
        (plain, _), *others = ways
        assert all(torch.equal(plain, adapters) for adapters, _ in others)
        assert [copies > 0 for _, copies in others] == [False, True, False]


# --- whole runs against the number of clients -----------------------------------------------------


def test_a_part_is_without_those_within_it_and_without_other_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clocks: dict[int, float] = {}

    def work(seconds: float) -> None:
        clocks[threading.get_ident()] = clocks.get(threading.get_ident(), 0.0) + seconds

    monkeypatch.setattr(scaling.time, "thread_time", lambda: clocks.get(threading.get_ident(), 0.0))
    parts, owner = scaling.Parts(), SimpleNamespace(inner=work)
    parts.watch(owner, "inner", "inner")
    with parts.of("outer"):
        work(1.0)
        owner.inner(10.0)
        beside = threading.Thread(target=owner.inner, args=(100.0,))
        beside.start()
        beside.join()
        owner.inner(10.0)
        work(2.0)
    assert parts.seconds == {"outer": 3.0, "inner": 120.0}


def point(clients: int, steps: float, peak: int) -> dict[str, Any]:
    one = {"cpu_seconds": steps + 1.0, "parts": {"steps": steps, "the rest": 1.0}}
    one |= {"peak_bytes": peak, "checkpoint_files": 3, "adapter_files": 3 * clients}
    return {"clients": clients, "starts": dict.fromkeys(("first", "again", "nothing to do"), one)}


def test_growth_is_the_exponent_of_n() -> None:
    points = [point(64, 1.0, 2**20), point(512, 8.0, 2**20), point(4096, 512.0, 8 * 2**20)]
    table = scaling_tables.clients_tables(points)[0]
    rows = dict(zip(*(list(table.columns[c].cells) for c in (0, -1)), strict=True))
    assert (rows["steps"], rows["the rest"], rows["peak memory"]) == ("N^2.00", "N^0.00", "N^1.00")
    assert scaling_tables.clients_tables(points[:1])[0].row_count == table.row_count


@pytest.mark.full
def test_runs_are_measured_in_processes_of_their_own(tmp_path: Path) -> None:
    words = ["--scaling-clients", "2,4", "--cohort", "3", "--json", str(tmp_path / "x.json")]
    bench.main(words)
    found = json.loads((tmp_path / "x.json").read_text())["points"]
    assert [one["clients"] for one in found] == [2, 4]
    for one in found:
        first, again, nothing = (one["starts"][s] for s in ("first", "again", "nothing to do"))
        assert {"reading", "steps", "mean", "evaluation", "checkpoint", "export"} <= {
            *first["parts"]
        }
        assert "resuming" in again["parts"] and "steps" not in again["parts"]
        assert [start["did_nothing"] for start in (first, again, nothing)] == [False, False, True]
        assert first["adapter_files"] == again["adapter_files"] > one["clients"]
        assert first["peak_bytes"] > 2**26
        assert sum(first["parts"].values()) == pytest.approx(first["cpu_seconds"])


def test_clients_are_measured_by_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(UserError, match="--scaling-clients measures one process"):
        bench.main(["--scaling-clients", "2"])
