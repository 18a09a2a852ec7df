"""FedProx, SCAFFOLD and server optimizers in whole runs, against flat loops of plain SGD."""

from __future__ import annotations

import signal
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.support import glue, runs, tiny
from tests.support.deadlines import scaled
from tests.support.disturbed import Moment, train_with_signal
from tests.support.processes import ends_of
from tests.support.reference_terms import difference_to, server_of
from tests.support.selection import full

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SGD = {"optimizer": "sgd", "lr": 0.05, "local_steps": 3, "batch_size": 4, "max_grad_norm": None}
ADAMW = {"lr": 1e-2, "local_steps": 3, "batch_size": 4}
SKEWED = {"kind": "dirichlet", "key": "kind", "concentration": 1.0}
TOLERANCE = 5e-6


def settings(tiny_folder: Path, out: Path, name: str = "run", **sections: Any) -> dict[str, Any]:
    """Three clients with one A at the start; ``federated`` and ``train`` go over what is here."""
    federated = {"method": "fedsa", "num_clients": 3, **sections.pop("federated", {})}
    return tiny.settings(
        tiny_folder,
        lora={"rank": 4, "alpha": 4.0, **sections.pop("lora", {})},
        partition=SKEWED,
        federated=federated,
        train={**SGD, **sections.pop("train", {})},
        evaluation={"every_rounds": 3, "max_examples": 1},
        output={"dir": str(out), "name": name},
        **sections,
    )


MU = 3.0
PROX = {
    "one process, all share a pass, clipped": (
        1,
        {"method": "fedit"},
        {"max_grad_norm": 0.5},
        {"shared": "AB", "clip": 0.5},
    ),
    "two processes, two of three, by examples, micro passes": (
        2,
        {"clients_per_round": 2, "weighting": "examples"},
        {"micro_batch_size": 3},
        {"by_examples": True},
    ),
}


@pytest.mark.parametrize(("num_processes", "federated", "train", "said"), PROX.values(), ids=PROX)
def test_fedprox_is_its_formula(
    tiny_folder: Path, tmp_path: Path, num_processes, federated, train, said
) -> None:
    own = settings(tiny_folder, tmp_path, federated={**federated, "prox_mu": MU}, train=train)
    found = runs.run(num_processes, own)
    assert difference_to(tiny_folder, found, mu=MU, **said) <= TOLERANCE
    # It is a term that matters here, and B of fedsa, which is nobody's but its client's, has none.
    assert difference_to(tiny_folder, found, **said) > 1e-3


@pytest.mark.parametrize("sharding", ["none", full("zero3")])
def test_a_round_that_was_stopped_goes_on_from_what_was_received(
    tiny_folder: Path, tmp_path: Path, sharding: str
) -> None:
    """AdamW, dropout, micro passes and one client per pass: bit for bit the undisturbed run."""
    shape: dict[str, Any] = {
        "train": {**ADAMW, "optimizer": "adamw", "micro_batch_size": 2},
        "lora": {"dropout": 0.1},
        "backbone": {"sharding": sharding},
        "federated": {"prox_mu": MU, "clients_per_pass": 1, "server_optimizer": "fedadam"},
    }
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm", **shape))
    own = settings(tiny_folder, tmp_path, "stopped", **shape)
    ends_of(2, train_with_signal, own, Moment(1, 2, 2), signal.SIGTERM)
    assert list((tmp_path / "stopped" / "checkpoints").glob("*-partial"))
    stopped = runs.run(2, own)
    assert runs.identical(runs.adapters(calm), runs.adapters(stopped))


def test_who_shares_a_pass_changes_nothing(tiny_folder: Path, tmp_path: Path) -> None:
    shape: dict[str, Any] = {"train": {"micro_batch_size": 2}}
    over = {"prox_mu": MU, "server_optimizer": "fedadam"}
    folders = [
        runs.run(processes, settings(tiny_folder, tmp_path, name, **shape, federated=federated))
        for processes, name, federated in (
            (2, "one-by-one", {**over, "clients_per_pass": 1}),
            (1, "together", {**over, "clients_per_pass": None}),
        )
    ]
    assert runs.relative_difference(*map(runs.adapters, folders)) < 5e-6


def test_a_server_optimizer_steps_from_what_was_received_in_a_run_and_over_a_resume(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """On two processes, then on one, two of three clients by examples."""
    over = {"clients_per_round": 2, "weighting": "examples", "server_optimizer": "fedyogi"}
    over |= {"server_lr": 0.02, "server_beta1": 0.8, "server_beta2": 0.9, "server_tau": 0.01}
    runs.run(2, settings(tiny_folder, tmp_path, federated={**over, "num_rounds": 1}))
    checkpoint = tmp_path / "run" / "checkpoints" / "round-000001"
    assert not list(checkpoint.glob("server-*")), "the state is in the common file"
    found = runs.run(1, settings(tiny_folder, tmp_path, federated=over))
    said = {"by_examples": True, "server": server_of("fedyogi", 0.02, 0.8, 0.9, 0.01)}
    assert difference_to(tiny_folder, found, **said) <= 5e-5
    assert difference_to(tiny_folder, found, by_examples=True) > 1e-2
    sent = [event["comm/uploaded_bytes"] for event in runs.rounds(found)]
    plain = runs.run(1, settings(tiny_folder, tmp_path, "plain"))
    assert sent == [event["comm/uploaded_bytes"] for event in runs.rounds(plain)]


def test_the_mean_of_the_first_draws_is_no_round_of_the_server_optimizer(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """sfed draws an A for each client: with a rate of nearly 0 the mean of these draws stays."""
    over = {"method": "sfed", "num_rounds": 1, "server_optimizer": "fedavgm", "server_lr": 1e-12}
    found = runs.run(1, settings(tiny_folder, tmp_path, federated=over))
    plain = settings(tiny_folder, tmp_path, "plain", federated={"method": "sfed", "num_rounds": 1})
    plain["train"]["lr"] = 1e-12
    untrained = runs.adapters(runs.run(1, plain))
    ours = runs.adapters(found)
    for name, a in runs.factors(ours["client-0000"], "A").items():
        torch.testing.assert_close(a, untrained["client-0000"][name], rtol=0, atol=1e-8)
    assert float(runs.factors(ours["client-0000"], "B").popitem()[1].abs().max()) > 0


SCAFFOLD = {
    "one process, all of three": (1, {"method": "fedit"}, {}, {"shared": "AB"}),
    "two processes, two of three by examples, a falling rate, one per pass": (
        2,
        {"clients_per_round": 2, "weighting": "examples", "clients_per_pass": 1},
        {"schedule": "linear", "micro_batch_size": 2},
        {"by_examples": True, "is_linear": True},
    ),
}


@pytest.fixture(scope="module")
def corrected(
    tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[Path, dict[str, Any]]]:
    """Runs with control variates, and what the reference is told of them."""

    @cache
    def run(scenario: str) -> tuple[Path, dict[str, Any]]:
        num_processes, federated, train, said = SCAFFOLD[scenario]
        over = {**federated, "scaffold": True, "num_rounds": 4}
        out = tmp_path_factory.mktemp("scaffold")
        own = settings(tiny_folder, out, federated=over, train={"lr": 0.1, **train})
        return runs.run(num_processes, own), {"lr": 0.1, "rounds": 4, "scaffold": True, **said}

    return run


@pytest.mark.parametrize("scenario", SCAFFOLD)
def test_scaffold_is_its_definition_under_plain_sgd(
    tiny_folder: Path, corrected: Callable[..., Any], scenario: str
) -> None:
    found, said = corrected(scenario)
    assert difference_to(tiny_folder, found, **said) <= 2e-5
    assert difference_to(tiny_folder, found, **{**said, "scaffold": False}) > 2e-3
    layers = runs.adapters(found)["client-0000"]
    of_a, of_b = (sum(t.numel() for t in runs.factors(layers, f).values()) for f in "AB")
    numbers = of_a + (of_b if "shared" in said else 0)
    sent = {event["comm/uploaded_bytes"] for event in runs.rounds(found)[1:]}
    assert sent == {2 * 4 * numbers}, "the changes of the control variates are sent too"


@pytest.mark.parametrize(
    "bug",
    [
        "the wrong sign",
        "the corrected gradient is kept",
        "the server takes the weights of the cohort",
        "steps count the same whatever their rate",
    ],
)
def test_bugs_of_control_variates_are_seen(
    tiny_folder: Path, corrected: Callable[..., Any], bug: str
) -> None:
    """Where some are out and the rate falls."""
    found, said = corrected(list(SCAFFOLD)[1])
    assert difference_to(tiny_folder, found, bug=bug, **said) > 1e-4


@pytest.mark.parametrize("sharding", ["none", full("zero3")])
def test_control_variates_go_on_within_a_round_and_on_other_processes(
    tiny_folder: Path, tmp_path: Path, sharding: str
) -> None:
    """AdamW with clipping, two of three clients, moments that are new in each round."""
    over = {"scaffold": True, "clients_per_round": 2, "optimizer_state": "reset"}
    shape: dict[str, Any] = {
        "train": {**ADAMW, "optimizer": "adamw", "max_grad_norm": 1.0, "local_steps": 6},
        "backbone": {"sharding": sharding},
        "federated": {**over, "num_rounds": 4, "clients_per_pass": 1},
    }
    calm = runs.run(2, settings(tiny_folder, tmp_path, "calm", **shape))
    own = settings(tiny_folder, tmp_path, "stopped", **shape)
    ends_of(2, train_with_signal, own, Moment(0, 3, 1), signal.SIGTERM)
    [partial] = (tmp_path / "stopped" / "checkpoints").glob("*-partial")
    held = {name for own in runs.held_by_clients(partial).values() for name in own}
    assert "a_mean_gradient" in held
    assert "b_control" not in held, "B has none"
    assert "common/a_control" in load_file(partial / "common.safetensors")
    stopped = runs.run(2, own)
    assert runs.identical(runs.adapters(calm), runs.adapters(stopped))
    whole = runs.held_by_clients(stopped / "checkpoints" / "round-000004")
    names = {name for own in whole.values() for name in own}
    assert names and not any(name.endswith("mean_gradient") for name in names), "the round is over"


def test_control_variates_are_the_same_wherever_their_clients_are(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """Two processes and one per pass; stopped; one process and all in a pass."""
    over = {"scaffold": True, "num_rounds": 3, "server_optimizer": "fedavgm", "prox_mu": 0.1}
    calm = runs.run(1, settings(tiny_folder, tmp_path, "calm", federated=over))
    paged = {**over, "clients_per_pass": 1}
    own = settings(tiny_folder, tmp_path, "moved", federated=paged)
    ends_of(2, train_with_signal, own, Moment(0, 2, 2), signal.SIGTERM)
    moved = runs.run(1, settings(tiny_folder, tmp_path, "moved", federated=over))
    assert runs.relative_difference(runs.adapters(calm), runs.adapters(moved)) < 5e-6


def test_a_shared_head_is_received_too(glue_folder: Path, tmp_path: Path) -> None:
    """Clients with adapters of their own and one head: the terms and the server are about it."""
    over = {"method": "local", "share_head": True, "num_rounds": 2, "clients_per_round": 2}
    over |= {"prox_mu": 0.1, "scaffold": True, "server_optimizer": "fedadam"}
    found = glue.run(glue_folder, "llama", "sst2", tmp_path, federated=over)
    checkpoint = found / "checkpoints" / "round-000002"
    common = load_file(checkpoint / "common.safetensors")
    own = {"a", "b", "head", "head_m", "head_v", "head_control"}
    assert common.keys() == {f"common/{name}" for name in own}
    kept = runs.held_by_clients(checkpoint).values()
    assert all("a_control" not in one for one in kept) and any("a" in one for one in kept)
    total = sum(one["head_control"] for one in kept if "head_control" in one)
    torch.testing.assert_close(common["common/head_control"], total / glue.N)
    assert bool(common["common/head_control"].any())


ADAPTIVE = {"server_lr": 0.02, "server_beta1": 0.8, "server_tau": 0.01}
DECAYED = {**ADAPTIVE, "server_beta2": 0.9}
# A term or a server: its keys, and what the reference is told.
ADDED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "prox": ({"prox_mu": MU}, {"mu": MU}),
    "scaffold": ({"scaffold": True}, {"scaffold": True}),
    "fedavgm": (
        {"server_lr": 0.7, "server_beta1": 0.8},
        {"server": lambda: server_of("fedavgm", 0.7, 0.8, 0.0, 1.0)},
    ),
    "fedadagrad": (ADAPTIVE, {"server": lambda: server_of("fedadagrad", 0.02, 0.8, 0.0, 0.01)}),
    "fedyogi": (DECAYED, {"server": lambda: server_of("fedyogi", 0.02, 0.8, 0.9, 0.01)}),
    "fedadam": (DECAYED, {"server": lambda: server_of("fedadam", 0.02, 0.8, 0.9, 0.01)}),
}


@pytest.mark.parametrize(
    ("num", "sharding"), [(1, "none"), (2, "zero3"), (4, "none"), (4, "zero3")]
)
@pytest.mark.parametrize("added", ADDED)
@pytest.mark.full
def test_a_run_that_is_killed_and_resumed_is_its_formula(
    tiny_folder: Path, tmp_path: Path, added: str, num: int, sharding: str
) -> None:
    """Three of five clients in a round, by examples; killed in the third round."""
    keys, told = ADDED[added]
    federated = {"num_clients": 5, "clients_per_round": 3, "weighting": "examples", **keys}
    federated["deadline_seconds"] = scaled(10.0)
    if added.startswith("fed"):
        federated["server_optimizer"] = added
        told = {"server": told["server"]()}
    own = settings(tiny_folder, tmp_path, federated=federated, backbone={"sharding": sharding})
    moment = Moment(num - 1, 3, 1)
    ends = ends_of(num, train_with_signal, own, moment, signal.SIGKILL)
    assert ends[moment.process].code == -signal.SIGKILL
    again = ends_of(num, runs.train_settings, own)
    assert [end.code for end in again] == [0] * num, again
    assert "resuming after round" in again[0].said
    found = tmp_path / "run"
    assert difference_to(tiny_folder, found, by_examples=True, **told) <= 5e-5
    assert difference_to(tiny_folder, found, by_examples=True) > 1e-3
