"""What a run came to, in one sentence and its own numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sfed.report.opening.outcome import BEFORE, GLOBAL, OWN, outcome_of, sentences
from sfed.report.tables import facts_table, mebibytes
from sfed.storage.run_record import open_run

MIB = 2**20


def run_of(
    folder: Path,
    rounds: list[list[dict[str, float]]],
    *,
    planned: int | None = None,
    own: dict[str, int] | None = None,
    sent: float = MIB,
    evaluation: float = 0.0,
    **resolved: Any,
) -> Path:
    """A run folder: what each client's event says after each round, from round 0 on."""
    folder.mkdir()
    config = {
        "federated": {"num_rounds": planned or len(rounds) - 1},
        "resolved": {"num_clients": len(rounds[0]), "own_parameters": own, **resolved},
    }
    (folder / "config.json").write_text(json.dumps(config))
    events = []
    for number, clients in enumerate(rounds):
        names = {name for one in clients for name in one}
        event: dict[str, Any] = {"event": "round", "round": number}
        event |= {f"eval/{name}_unweighted": 1.0 for name in names}
        event |= {"comm/uploaded_bytes": sent, "comm/evaluation_bytes": evaluation}
        event["clients"] = [{"client": i, "examples": 5, **one} for i, one in enumerate(clients)]
        events.append(event)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    return folder


def losses(*pairs: tuple[float, float]) -> list[dict[str, float]]:
    return [{"personal_loss": own, "global_loss": shared} for own, shared in pairs]


def told(folder: Path) -> str:
    outcome = outcome_of(open_run(folder))
    assert outcome is not None
    return sentences(outcome)


START = losses((2.0, 2.0), (3.0, 3.0), (4.0, 4.0))


def test_of_a_sample_only_the_clients_that_were_evaluated_are_told_of(tmp_path: Path) -> None:
    end = losses((1.0, 1.5), (1.0, 2.0), (2.5, 2.5))
    folder = run_of(tmp_path / "run", [START, end])
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [{**json.loads(line), "evaluated_clients": [0, 2]} for line in lines]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(one) + "\n" for one in events))
    outcome = outcome_of(open_run(folder))
    assert outcome is not None and [one.client for one in outcome.clients] == [0, 2]
    assert "2 of 2 clients" in told(folder)
    assert "These are a sample of 2 of 3 clients." in told(folder)


def test_a_run_that_got_better(tmp_path: Path) -> None:
    end = losses((1.0, 1.5), (1.0, 2.0), (2.5, 2.5))
    run = run_of(tmp_path / "run", [START, START, end], own={"B": MIB})
    assert told(run) == (
        "After 2 rounds 3 of 3 clients are better with their own adapter than with the base model: "
        "the clients' mean held-out loss fell from 3.0000 to 1.5000 nats/token; with the global "
        "adapter it is 2.0000. 3 MiB were sent for training; 12 MiB of B stayed with the clients."
    )


def test_what_was_sent_in_rounds_without_an_event_is_not_told_as_nothing(tmp_path: Path) -> None:
    """As where a run went on in a new folder from a checkpoint elsewhere."""
    run = run_of(tmp_path / "run", [START, START, losses((1.0, 1.0), (1.0, 1.0), (1.0, 1.0))])
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    for kept in ([2], [0, 2], [1, 2]):
        (run / "metrics.jsonl").write_text("".join(lines[number] for number in kept))
        sent = f"{len(kept)} MiB were sent for training in the rounds that metrics.jsonl reports, "
        assert f"{sent}which are not all" in told(run)


def test_a_run_that_got_worse_says_so(tmp_path: Path) -> None:
    end = losses((1.9, 2.0), (5.0, 2.0), (4.0, 4.0))
    words = told(run_of(tmp_path / "run", [START, end], own={"A": 1, "B": 1}, sent=0))
    assert (
        "After 1 round 1 of 3 clients is better with their own adapter than with the base model "
        "(1 is worse, 1 is as before): the clients' mean held-out loss rose from 3.0000 to 3.6333 "
        "nats/token, so training made it no better;"
    ) in words
    assert "Training sent nothing; 2.29e-05 MiB of A and B stayed" in words


def test_a_run_that_changed_nothing_is_not_called_better(tmp_path: Path) -> None:
    words = told(run_of(tmp_path / "run", [START, START], own={}))
    assert "0 of 3 clients are better" in words and "(3 are as before)" in words
    assert "stayed at 3.0000 nats/token, so training made it no better" in words
    assert "every trained factor is averaged, so nothing stayed with the clients" in words


def test_of_a_score_more_is_better(tmp_path: Path) -> None:
    start = [{"personal_loss": 1.0, "personal_accuracy": 0.5}] * 2
    end = [{"personal_loss": 9.0, "personal_accuracy": 0.75}] * 2
    run = run_of(tmp_path / "run", [start, end], scores=["accuracy"], loss_unit="example")
    assert told(run) == (
        "After 1 round 2 of 2 clients are better with their own adapter than with the base model "
        "with an untrained head: the clients' mean accuracy rose from 0.5000 to 0.7500. "
        "2 MiB were sent for training."
    )


def test_a_run_that_was_stopped_and_clients_without_numbers(tmp_path: Path) -> None:
    end = [{"personal_loss": 1.0, "global_loss": 1.0}, {}, {"global_loss": 1.0}]
    words = told(run_of(tmp_path / "run", [START, end], planned=7))
    assert words.startswith("After 1 of 7 rounds 1 of 1 client with a measured value is better ")


def test_the_global_adapter_speaks_where_nothing_else_was_evaluated(tmp_path: Path) -> None:
    start, end = [{"global_loss": 2.0}] * 2, [{"global_loss": 1.0}] * 2
    words = told(run_of(tmp_path / "run", [start, end]))
    assert "2 of 2 clients are better with the global adapter than with the base model" in words
    assert "with the global adapter it is" not in words


def test_nothing_is_compared_that_was_not_measured(tmp_path: Path) -> None:
    run = run_of(tmp_path / "run", [[{}, {}], losses((1.0, 2.0), (3.0, 4.0))])
    assert told(run).startswith(
        "After 1 round the clients' mean held-out loss with their own adapter is 2.0000 "
        "nats/token; it was not measured before training."
    )


@pytest.mark.parametrize("rounds", [[[{}, {}]], [START], [START, [{}, {}, {}]]])
def test_no_outcome_before_a_round_is_evaluated(tmp_path: Path, rounds: list) -> None:
    assert outcome_of(open_run(run_of(tmp_path / "run", rounds))) is None


def test_a_run_that_diverged_says_so_and_does_not_tell_of_an_earlier_round(tmp_path: Path) -> None:
    lost = [{"personal_loss": None, "global_loss": None}] * 3
    folder = run_of(tmp_path / "run", [START, losses((1.0, 1.0)) * 3, lost])
    path = folder / "metrics.jsonl"
    events = [json.loads(line) for line in path.read_text().splitlines()]
    events[2] |= {key: None for key in events[2] if key.startswith("eval/")} | {"eval/clients": 3}
    path.write_text("".join(json.dumps(event) + "\n" for event in events))
    assert told(folder).startswith("After 2 rounds no client has a finite held-out loss. ")


def test_values_by_state_and_bytes(tmp_path: Path) -> None:
    end = losses((1.0, 1.5), (1.0, 2.0), (2.5, 2.5))
    run = run_of(tmp_path / "run", [START, end], own={"B": 10, "head": 3}, evaluation=7)
    outcome = outcome_of(open_run(run))
    assert outcome is not None
    assert outcome.clients[1].values == {BEFORE: 3.0, GLOBAL: 2.0, OWN: 1.0}
    assert outcome.traffic.stayed == 4 * 3 * 13 and outcome.traffic.factors == ["B", "head"]
    assert outcome.traffic.evaluation == 14 and outcome.traffic.messages == 2


def test_of_different_ranks_each_client_keeps_as_much_as_its_own_rank_has(tmp_path: Path) -> None:
    """Not as much as the largest rank; a head is the same for all."""
    end = losses((1.0, 1.5), (1.0, 2.0), (2.5, 2.5))
    own = {"B": 80, "head": 3}
    run = run_of(tmp_path / "run", [START, end], own=own, ranks=[8, 4, 2], adapter_parameters=163)
    outcome = outcome_of(open_run(run))
    assert outcome is not None
    assert outcome.traffic.stayed == 4 * (80 + 40 + 20 + 3 * 3)
    facts = dict(facts_table(open_run(run)).rows)
    assert facts["parameters of an adapter"] == "at most 163"


@pytest.mark.parametrize(
    ("size", "text"),
    [(1.0, "1 MiB"), (999.4, "999 MiB"), (999.6, "1,000 MiB"), (1e4, "10,000 MiB")],
)
def test_sizes_have_no_exponent(size: float, text: str) -> None:
    assert mebibytes(size * MIB) == text
