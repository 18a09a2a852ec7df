"""Whole runs under privacy: on any number of processes, paged, sharded, killed and repeated."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from sfed.federated import local
from sfed.federated.context import RoundPlan, Run
from sfed.privacy import accounting
from sfed.privacy.keys import Key, draw_cohort
from sfed.privacy.ledger import Ledger
from sfed.report.tables import facts_table
from sfed.storage.run_record import open_run
from tests.support import runs, tiny
from tests.support.deadlines import scaled
from tests.support.processes import ends_of
from tests.support.selection import full

pytestmark = [
    pytest.mark.dist,
    pytest.mark.slow,
    pytest.mark.skipif(
        accounting.problem() is not None, reason="accounts for epsilon: pip install 'sfed[privacy]'"
    ),
]

PRIVACY = {"clip": 0.1, "noise_multiplier": 0.5}
UPLOADED = "comm/uploaded_bytes"
TRAIN = {"lr": 1e-2, "local_steps": 2, "batch_size": 4}


def settings(tiny_folder: Path, folder: Path, **sections: Any) -> dict[str, Any]:
    federated = {"clients_per_round": 2, "num_rounds": 2} | sections.pop("federated", {})
    output = {"dir": str(folder), "name": "run"}
    return tiny.settings(
        tiny_folder, output=output, federated=federated, train=TRAIN, privacy=PRIVACY, **sections
    )


def ledger_of(run_folder: Path) -> Ledger:
    ledger = Ledger.read(run_folder / "privacy.jsonl")
    assert ledger is not None
    return ledger


def secret_of(run_folder: Path) -> bytes:
    name = ledger_of(run_folder).start["key"]
    return (run_folder.parent / ".keys" / f"{name}.key").read_bytes()


@pytest.fixture(scope="module")
def done(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two rounds on one process: only read it."""
    return runs.run(1, settings(tiny_folder, tmp_path_factory.mktemp("done")))


def test_a_run_tells_what_its_releases_cost(done: Path) -> None:
    events, ledger = runs.rounds(done), ledger_of(done)
    assert [event["privacy/releases"] for event in events] == [0, 1, 2]
    sampling = accounting.Sampling(4, 2, is_poisson=True)
    expected = [accounting.epsilon(sampling, 0.5, range(n), 1e-5) for n in (0, 1, 2)]
    assert [event["privacy/epsilon"] for event in events] == pytest.approx(expected)
    assert ledger.rounds == [1, 2]
    assert {event[UPLOADED] for event in events[1:]} == {3 * events[0][UPLOADED]}
    facts = json.loads((done / "config.json").read_text())["resolved"]["privacy"]
    assert facts == {name: ledger.start[name] for name in facts}
    rows = dict(facts_table(open_run(done)).rows)
    told = f"epsilon {expected[-1]:.4g} at delta 1e-05 (add or remove one client)"
    assert told in rows["differential privacy"]
    for folder in (done / "adapters").iterdir():
        card = (folder / "README.md").read_text()
        assert f"| differential privacy | {told}" in card


def test_the_folder_holds_neither_the_key_nor_who_took_part(done: Path) -> None:
    secret = secret_of(done)
    files = [path for path in done.rglob("*") if path.is_file()]
    assert len(files) > 10
    for path in files:
        content = path.read_bytes()
        assert secret not in content and secret.hex().encode() not in content
    for event in runs.rounds(done):
        assert event["train/loss"] is None and event["time/processes"] == []
        assert event["adapter/a_similarity"] is None
        for client in event["clients"]:
            assert not client.keys() & {"steps", "excluded", "grad_norm"}
            assert client["train_loss"] is None


def test_the_seed_gives_neither_the_noise_nor_the_cohort(
    done: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """All that the folder says is the same, but the key: of A the noise is most."""
    other = runs.run(1, settings(tiny_folder, tmp_path))
    config = [json.loads((path / "config.json").read_text()) for path in (done, other)]
    assert config[0]["seed"] == config[1]["seed"]
    ours, theirs = (runs.adapters(path)["client-0000"] for path in (done, other))
    start = 2 * 0.1 * 0.5  # two rounds of noise of at least z C / m = 0.025 each
    for name, tensor in runs.factors(ours, "A").items():
        assert float((tensor - theirs[name]).std()) > start / 4


def copied(done: Path, folder: Path) -> Path:
    """The run as it was when it was killed after the second release, before its checkpoint."""
    shutil.copytree(done.parent, folder, dirs_exist_ok=True)
    shutil.rmtree(folder / "run" / "checkpoints" / "round-000002")
    shutil.rmtree(folder / "run" / "adapters")
    return folder / "run"


def test_a_killed_and_repeated_round_is_the_same_release(
    done: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    copied(done, tmp_path)
    again = runs.run(1, settings(tiny_folder, tmp_path))
    assert ledger_of(again).rounds == [1, 2]
    before, after = runs.adapters(done), runs.adapters(again)
    for client, tensors in before.items():
        assert all(torch.equal(after[client][name], one) for name, one in tensors.items())


def test_a_round_repeated_on_other_processes_is_counted_where_its_sum_is_another(
    done: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    """Sharded, one client per pass: whether the last bits of the sum differ, the ledger knows."""
    copied(done, tmp_path)
    sharded = {"backbone": {"sharding": "zero3"}}
    paged = {"num_rounds": 4, "clients_per_pass": 1}
    again = runs.run(2, settings(tiny_folder, tmp_path, federated=paged, **sharded))
    rounds, tags = ledger_of(again).rounds, (again / "privacy.jsonl").read_text().splitlines()[1:]
    assert set(rounds) == {1, 2, 3, 4} and len(tags) == len(set(tags)) == len(rounds)
    last = runs.rounds(again)[-1]
    assert last["privacy/releases"] == len(rounds) >= 4
    sampling = accounting.Sampling(4, 2, is_poisson=True)
    assert last["privacy/epsilon"] == pytest.approx(accounting.epsilon(sampling, 0.5, rounds, 1e-5))
    held = runs.adapters(again)
    shared = [runs.factors(one, "A") for one in held.values()]
    assert all(torch.equal(one[n], shared[0][n]) for one in shared for n in one)


def train_until_killed(own: dict[str, Any]) -> None:
    """Process 1 is killed when its clients have trained in round 3, before the release."""
    gather = local.gather

    def gather_or_die(run: Run, plan: RoundPlan, *rest: Any) -> Any:
        if (plan.finished_rounds, run.world.rank) == (3, 1):
            os.kill(os.getpid(), signal.SIGKILL)
        return gather(run, plan, *rest)

    local.gather = gather_or_die
    runs.train_settings(own)


@pytest.mark.parametrize("sampling", ["fixed", full("poisson")])
def test_a_run_that_is_killed_on_two_processes_goes_on_with_its_key_and_cohorts(
    tiny_folder: Path, tmp_path: Path, sampling: str
) -> None:
    """What was released before the kill is the same release where it is repeated."""
    federated = {"num_rounds": 3, "sampling": sampling, "deadline_seconds": scaled(30.0)}
    own = settings(tiny_folder, tmp_path, federated=federated)
    ends = ends_of(2, train_until_killed, own)
    assert ends[1].code == -signal.SIGKILL
    secret, found = secret_of(tmp_path / "run"), tmp_path / "run"
    assert ledger_of(found).rounds == [1, 2]
    again = ends_of(2, runs.train_settings, own)
    assert [end.code for end in again] == [0, 0], again
    assert "resuming after round" in again[0].said
    assert secret_of(found) == secret and ledger_of(found).rounds == [1, 2, 3]
    kind = accounting.Sampling(4, 2, is_poisson=sampling == "poisson")
    epsilon = accounting.epsilon(kind, 0.5, range(1, 4), 1e-5)
    assert runs.rounds(found)[-1]["privacy/epsilon"] == pytest.approx(epsilon)
    facts = json.loads((found / "config.json").read_text())["resolved"]["privacy"]
    assert (facts["sampling"], facts["neighbours"]) == (sampling, kind.neighbours)
    cohorts = [draw_cohort(Key("", secret).derive("cohort"), t, kind) for t in range(3)]
    assert sampling == "poisson" or [len(cohort) for cohort in cohorts] == [2, 2, 2]
    held = runs.adapters(found)
    for client in range(4):
        tensors = held[f"client-{client:04d}"]
        has_trained = any(bool(b.any()) for b in runs.factors(tensors, "B").values())
        assert has_trained == any(client in cohort for cohort in cohorts)


def test_an_adaptive_clip_goes_on_where_the_checkpoint_left_it(
    tiny_folder: Path, tmp_path: Path
) -> None:
    own = settings(tiny_folder, tmp_path / "one", federated={"num_rounds": 3})
    own["privacy"] = PRIVACY | {"clip_quantile": 0.3}
    done = runs.run(2, own)
    clips = [event["privacy/clip"] for event in runs.rounds(done)]
    assert clips[0] == 0.1 and len(set(clips)) == 4
    sums = {event[UPLOADED] for event in runs.rounds(done)[1:]}
    assert sums == {3 * runs.rounds(done)[0][UPLOADED] + 12}
    told = dict(facts_table(open_run(done)).rows)["differential privacy"]
    assert f"clip 0.1 at first and {clips[-1]:.4g} at last, towards the quantile 0.3" in told
    for num in (1, 2):
        shutil.copytree(done.parent, tmp_path / str(num))
        shutil.rmtree(tmp_path / str(num) / "run" / "checkpoints" / "round-000003")
        shutil.rmtree(tmp_path / str(num) / "run" / "adapters")
        own["output"] = {"dir": str(tmp_path / str(num)), "name": "run"}
        again = runs.run(num, own)
        resumed = [event["privacy/clip"] for event in runs.rounds(again)]
        assert resumed[:3] == clips[:3] and len(resumed) == 4
        if num == 2:  # the same placement: the same release, bit for bit
            assert ledger_of(again).rounds == [1, 2, 3] and resumed == clips
            held = runs.adapters(again)
            for client, tensors in runs.adapters(done).items():
                assert all(torch.equal(held[client][name], one) for name, one in tensors.items())
