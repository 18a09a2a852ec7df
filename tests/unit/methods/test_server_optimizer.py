"""Server optimizers against the formulas of arXiv 2003.00295, number by number in fp64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sfed.clients.store import ClientStore
from sfed.config import load as config_load
from sfed.config.sections.federated import SERVER_KEYS, FederatedSection
from sfed.data import partition
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.lora.layout import Layout
from sfed.methods import aggregation
from sfed.methods.aggregation import ServerSide
from sfed.methods.method import resolve
from sfed.methods.server_optimizer import ServerOptimizer
from sfed.utils.errors import ConfigError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

KINDS = [kind for kind in SERVER_KEYS if kind != "none"]
LAYOUT = Layout.of([("x.q_proj", 3, 5), ("y.o_proj", 4, 2)], lora_rank=2)
N, ROUNDS = 3, 4
COHORTS = [((0, 1, 2), None), ((0, 2), (10, 20, 70)), ((1,), None), ((0, 1), (10, 20, 70))]


def by_hand(kind, w, means, lr, beta1, beta2, tau):
    """One number through some rounds: the path of w, in Python's floats."""
    m, v, path = 0.0, tau**2, []
    for mean in means:
        d = mean - w
        if kind == "fedavgm":
            m = beta1 * m + d
            w = w + lr * m
        else:
            m = beta1 * m + (1 - beta1) * d
            sign = math.copysign(1.0, v - d * d) if v != d * d else 0.0
            v = {
                "fedadagrad": v + d * d,
                "fedyogi": v - (1 - beta2) * d * d * sign,
                "fedadam": beta2 * v + (1 - beta2) * d * d,
            }[kind]
            w = w + lr * m / (math.sqrt(v) + tau)
        path.append(w)
    return path


@given(
    kind=st.sampled_from(KINDS),
    start=st.lists(st.floats(-3, 3), min_size=1, max_size=4),
    rounds=st.integers(1, 5),
    constants=st.tuples(
        st.floats(1e-4, 2), st.floats(0, 0.99), st.floats(0, 0.999), st.floats(1e-4, 1)
    ),
    data=st.data(),
)
def test_each_optimizer_is_its_formula(kind, start, rounds, constants, data):
    same_length = st.lists(st.floats(-3, 3), min_size=len(start), max_size=len(start))
    means = data.draw(st.lists(same_length, min_size=rounds, max_size=rounds))
    w, state, path = torch.tensor(start, dtype=torch.float64), {}, []
    for mean in means:
        before = [w.clone(), {name: tensor.clone() for name, tensor in state.items()}]
        given_state = state
        new, state = ServerOptimizer(kind, *constants).step(w, torch.tensor(mean).double(), state)
        assert torch.equal(w, before[0]), "what was there before is left alone"
        assert all(torch.equal(given_state[name], before[1][name]) for name in before[1])
        w = new
        path.append(w.tolist())
    of_mean = torch.tensor(means).double().tolist()
    for i in range(len(start)):
        expected = by_hand(kind, start[i], [row[i] for row in of_mean], *constants)
        assert [row[i] for row in path] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_without_momentum_and_at_rate_one_it_is_the_mean():
    section = FederatedSection(server_optimizer="fedavgm", server_beta1=0.0)
    w, mean = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([0.25, 4.0, 0.5])
    after, _ = ServerOptimizer.of(section).step(w, mean, {})
    assert torch.equal(after, mean)


def test_worked_first_rounds():
    """By hand, D = 0.5 and then 0.25 where w has moved: no bias correction, v from tau^2."""
    adam = ServerOptimizer("fedadam", lr=0.1, beta1=0.9, beta2=0.99, tau=0.1)
    w, state = adam.step(torch.tensor([1.0]), torch.tensor([1.5]), {})
    # m = 0.05, v = 0.99 * 0.01 + 0.01 * 0.25 = 0.0124
    assert w.item() == pytest.approx(1 + 0.1 * 0.05 / (math.sqrt(0.0124) + 0.1))
    w, _ = adam.step(w, w + 0.25, state)
    # m = 0.045 + 0.025 = 0.07, v = 0.99 * 0.0124 + 0.01 * 0.0625 = 0.012901
    first = 0.1 * 0.05 / (math.sqrt(0.0124) + 0.1)
    assert w.item() == pytest.approx(1 + first + 0.1 * 0.07 / (math.sqrt(0.012901) + 0.1))


@pytest.mark.parametrize("kind", KINDS)
def test_bug_the_optimizer_is_fed_with_the_mean_instead_of_the_change(kind):
    """Nobody has moved: nothing moves. With the mean in the place of D it would."""
    section = FederatedSection(server_optimizer=kind)
    w = torch.tensor([1.0, -2.0])
    after, _ = ServerOptimizer.of(section).step(w, w.clone(), {})
    assert torch.equal(after, w)


def shared(kind: str) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """Some rounds of three clients; A is averaged, and its server state is kept over a restart."""
    world = distributed.start(RUN_SECONDS)
    optimizer = ServerOptimizer.of(FederatedSection(server_optimizer=kind, server_lr=0.5))
    try:
        own, paths = partition.place(N, world.size)[world.rank], []
        clients = store(own)
        clients.set_shared("A", torch.linspace(-1, 1, clients.widths["a"]))
        for number, (cohort, counts) in enumerate(COHORTS):
            for client in set(own) & set(cohort):
                clients.set_own(client, {"a": trained_a(number, client), "b": torch.ones(14)})
            weights = aggregation.normalised_weights(N, cohort, counts)
            sent = aggregation.share(world, clients, ("A",), weights, ServerSide(optimizer))
            assert sent == 4 * clients.widths["a"], "the state costs no bytes"
            paths.append(clients.factor(own[-1], "A").clone())
            common, held = clients.collect_changes(also=clients.holders)
            clients = store(own)
            clients.restore(common, held.items())
        sync.barrier(world, "end")
        sync.leave_store_last(world)
        return paths, clients.common_state
    finally:
        distributed.stop(world)


def store(own) -> ClientStore:
    return ClientStore(own, LAYOUT, torch.device("cpu"), clients_per_pass=1, moments=())


def trained_a(number: int, client: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10 * number + client)
    return torch.randn(14, generator=generator)


@pytest.mark.dist
@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_partial_weighted_cohort_on_any_processes_and_over_a_restart(num_processes):
    kind = "fedyogi"
    found = on_processes(num_processes, shared, kind)
    means = []
    for number, (cohort, counts) in enumerate(COHORTS):
        p = [1.0 if counts is None else counts[client] for client in cohort]
        rows = [trained_a(number, client).double() for client in cohort]
        means.append(sum(w * row for w, row in zip(p, rows, strict=True)) / sum(p))
    start = torch.linspace(-1, 1, 14).double()
    for i in range(14):
        path = by_hand(kind, float(start[i]), [float(m[i]) for m in means], 0.5, 0.9, 0.99, 1e-3)
        for steps, state in found:
            assert [float(one[i]) for one in steps] == pytest.approx(path, rel=1e-4, abs=1e-5)
            assert state.keys() == {"a_m", "a_v"}, "B is nobody's but its client's"
    assert all(torch.equal(found[0][0][r], other[0][r]) for other in found for r in range(4))


@pytest.mark.parametrize(
    ("values", "part"),
    [
        ({"server_lr": 0.1}, "server_lr=0.1 has no effect with server_optimizer=none"),
        ({"server_beta2": 0.9, "server_optimizer": "fedavgm"}, "set server_optimizer to fedadam"),
        ({"server_beta2": 0.9, "server_optimizer": "fedadagrad"}, "fedadam, fedyogi"),
        ({"server_tau": 0.1, "server_optimizer": "fedavgm"}, "fedadam, fedyogi, fedadagrad"),
        ({"server_beta1": 1.0, "server_optimizer": "fedavgm"}, "less than 1"),
        ({"server_tau": 0.0, "server_optimizer": "fedadam"}, "1e-12"),
        ({"server_lr": 0.0, "server_optimizer": "fedadam"}, "greater than 0"),
        ({"prox_mu": -0.1}, "greater than or equal to 0"),
    ],
)
def test_what_means_nothing_is_refused(values, part):
    with pytest.raises(ConfigError) as caught:
        config_load.validate({"data": {"task": "demo"}, "federated": values})
    assert part in str(caught.value)


def of(method: str, **federated):
    return config_load.validate(
        {"data": {"task": "demo"}, "federated": {"method": method, **federated}}
    )


OWN = """
from sfed import CommonLayer, Method
def step(sent):
    return CommonLayer(dict(sent.before))
Mine = Method("mine", (("A", "B"),), (("A",),), (0.0, -1.0), False, 16.0, step)
Turns = Method("turns", (("A", "B"),), (("A",), ("B",)), (0.0, -1.0), False, 16.0)
Sometimes = Method("some", (("B",), ("A", "B")), (("B",), ("A", "B")), (0.0, -1.0), False, 16.0)
"""


def test_methods_without_a_received_value_or_a_mean_are_refused_by_name(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    with pytest.raises(ConfigError, match=r"prox_mu=0\.1: no factor that trains with local"):
        resolve(of("local", prox_mu=0.1))
    with pytest.raises(ConfigError, match="server_optimizer=fedadam: no factor that trains with"):
        resolve(of("sfed", averaged=[], server_optimizer="fedadam"))
    with pytest.raises(ConfigError, match="mine has a server step of its own"):
        resolve(of(f"{path}:Mine", server_optimizer="fedadam"))
    with pytest.raises(ConfigError, match="scaffold=true: mine has a server step of its own"):
        resolve(of(f"{path}:Mine", scaffold=True, prox_mu=0.1))
    with pytest.raises(ConfigError, match="scaffold=true: no factor that trains with local"):
        resolve(of("local", scaffold=True))
    with pytest.raises(ConfigError, match="no factor that trains with turns"):
        resolve(of(f"{path}:Turns", prox_mu=0.1))
    assert resolve(of(f"{path}:Mine", prox_mu=0.1)).received == ("A",)
    assert resolve(of(f"{path}:Sometimes", server_optimizer="fedyogi")).received == ("A", "B")


@pytest.mark.parametrize(
    ("method", "received"),
    [
        ("sfed", ("A",)), ("fedsa", ("A",)), ("rolora", ("A", "B")), ("ffa", ("B",)),
        ("fedit", ("A", "B")), ("local", ()),
    ],
)  # fmt: skip
def test_what_is_received_is_what_trains_and_is_not_kept_apart(method, received):
    assert resolve(of(method)).received == received
