"""Property 9: what leaves a process, counted where every collective must pass."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import runs, tiny
from tests.support.counting import counted_run, sizes
from tests.support.processes import on_processes
from tests.support.selection import full

pytestmark = pytest.mark.dist


@pytest.mark.parametrize(
    ("method", "sharding"),
    [
        ("sfed", "none"),
        ("sfed", "zero3"),
        ("fedit", "none"),
        full("fedit", "zero3"),
        ("local", "none"),
        full("local", "zero3"),
    ],
)
def test_a_round_sends_one_message_of_exactly_the_averaged_factors(
    tiny_folder: Path, tmp_path: Path, sharding: str, method: str
) -> None:
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        backbone={"sharding": sharding},
        federated={"num_clients": 4, "num_rounds": 3, "method": method},
        evaluation={"adapters": ["personal"]},
    )
    num_a, num_b = sizes(tiny_folder)
    expected = {"sfed": [num_a], "fedit": [num_a + num_b], "local": []}[method]
    for seen in on_processes(2, counted_run, settings):
        reductions = [(p, n) for p, kind, n, _ in seen if "reduce" in kind]
        assert [n for p, n in reductions if p == "average"] == 3 * expected
        # The round-0 mean of SFed; nothing else is ever reduced, in no phase.
        start = [num_a] if method == "sfed" else []
        assert [n for p, n in reductions if p == "prepare"] == start
        assert len(reductions) == 3 * len(expected) + len(start)
        # Local steps: under ZeRO-3 gathers of frozen weights, otherwise silence.
        in_local = {kind for p, kind, _, _ in seen if p == "local"}
        if sharding == "none":
            assert in_local == set()
        else:
            assert in_local <= {
                "allgather",
                "_allgather_base",
                "all_gather_single",  # torch 2.13 calls it for the one above
                "broadcast",
                "allgather_into_tensor_coalesced",
            }
            # DeepSpeed compares the order of modules once, in small integers.
            sent = [
                (n, dtype) for p, kind, n, dtype in seen if p == "local" and kind == "broadcast"
            ]
            assert all(dtype == "torch.int64" for _, dtype in sent)


def test_b_is_reduced_only_when_the_global_adapter_is_asked_for(
    tiny_folder: Path, tmp_path: Path
) -> None:
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        evaluation={"adapters": ["personal", "global"], "every_rounds": 3},
    )
    num_a, num_b = sizes(tiny_folder)
    for seen in on_processes(2, counted_run, settings):
        reductions = [(p, n) for p, kind, n, _ in seen if "reduce" in kind]
        assert [n for p, n in reductions if p == "average"] == [num_a] * 3
        assert [n for p, n in reductions if p == "evaluate"] == [
            num_b
        ]  # not before training: B = 0


@pytest.mark.parametrize("method", ["fedit", full("ffa"), "rolora"])
def test_a_mean_that_is_on_every_process_is_neither_sent_nor_evaluated_twice(
    tiny_folder: Path, tmp_path: Path, method: str
) -> None:
    """Only the similarity of clients reduces A and B, before the mean makes them the same."""
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        federated={"num_clients": 4, "num_rounds": 2, "method": method},
        evaluation={"adapters": ["personal", "global"], "every_rounds": 2},
    )
    for seen in on_processes(2, counted_run, settings):
        assert not [n for p, kind, n, _ in seen if "reduce" in kind and p == "evaluate"]
    event = runs.rounds(tmp_path / "run")[-1]
    own, everyone = (event[f"eval/{kind}_loss"] for kind in ("personal", "global"))
    assert own == everyone
    for client in event["clients"]:
        assert client["personal_loss"] == client["global_loss"]
    adapters = runs.adapters(tmp_path / "run")
    for name, tensor in adapters["global"].items():
        assert all(torch.equal(tensor, adapters[f"client-000{c}"][name]) for c in range(4))
