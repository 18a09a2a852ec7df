"""The private mean on 1, 2 and 3 processes: clipped, noised once, noted before it is released."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from sfed.clients.store import ClientStore
from sfed.config.load import validate
from sfed.data import partition
from sfed.distributed import sync
from sfed.distributed import world as distributed
from sfed.lora.layout import Layout
from sfed.methods.method import METHODS, resolve
from sfed.privacy import mean
from sfed.privacy.accounting import Sampling
from sfed.privacy.guarantee import AdaptiveClip, Guarantee
from sfed.privacy.keys import Key
from sfed.privacy.ledger import Ledger
from sfed.privacy.mean import PrivateMean, Secret
from sfed.utils.errors import CheckpointError, ConfigError, UserError
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

# 2,000 numbers of A and 3,000 of B; not square.
LAYOUT = Layout.of([("layer", 1000, 1500)], lora_rank=2)
WIDTH, NUM_CLIENTS, CLIP = 5000, 5, 0.5
KEY = Key("0123456789abcdef", bytes(range(32)))
GUARANTEE = Guarantee(Sampling(NUM_CLIENTS, 4, is_poisson=True), CLIP, 2.0, 1e-5)


def row_of(client: int) -> torch.Tensor:
    """What a client makes of 0: client 0 stays within the clip, the others do not."""
    noise = torch.randn(WIDTH, generator=torch.Generator().manual_seed(client))
    return noise / torch.linalg.vector_norm(noise) * CLIP * (0.5 + client)


def clients_of(own: range, factors: tuple[str, ...]) -> ClientStore:
    clients = ClientStore(own, LAYOUT, torch.device("cpu"), clients_per_pass=2, moments=())
    for client in own:
        parts = {"a": row_of(client)[:2000], "b": row_of(client)[2000:]}
        clients.set_own(client, {f.lower(): parts[f.lower()] for f in factors})
    return clients


def released(
    folder: str,
    participants: tuple[int, ...] = (0, 1, 2, 3, 4),
    factors: tuple[str, ...] = ("A", "B"),
    guarantee: Guarantee = GUARANTEE,
    key: Key = KEY,
    number: int = 1,
) -> torch.Tensor:
    """What every client shares after a round: (WIDTH,)."""
    world = distributed.start(RUN_SECONDS)
    try:
        clients = clients_of(partition.place(NUM_CLIENTS, world.size)[world.rank], factors)
        secret = None
        if world.is_main:
            path = Path(folder) / "privacy.jsonl"
            ledger = Ledger.read(path) or Ledger(path, {"event": "start", "key": key.name})
            secret = Secret(key, Path(folder), ledger, is_new=False)
            secret.begin()
        private = PrivateMean(guarantee, b"", secret)
        sent = private.share(world, clients, factors, participants, number)
        counted = guarantee.adaptive is not None
        assert sent == 12 * (sum(len(clients.shared(f)) for f in factors) + counted)
        assert len({clients.row(client).numpy().tobytes() for client in clients.own}) == 1
        row = clients.row(clients.own[0])
        sync.barrier(world, "end")
        sync.leave_store_last(world)
        return row
    finally:
        distributed.stop(world)


def noted(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "privacy.jsonl").read_text().splitlines()[1:]]


def clipped_mean(participants: tuple[int, ...]) -> torch.Tensor:
    """The formula, over a denominator of 4."""
    rows = [row_of(client).double() for client in participants]
    clipped = [row * min(1.0, CLIP / float(torch.linalg.vector_norm(row))) for row in rows]
    return torch.stack(clipped).sum(dim=0) / 4


@pytest.mark.dist
def test_the_noise_comes_once_whatever_the_number_of_processes(tmp_path: Path) -> None:
    """The same bits, and one entry of the ledger: to three starts it is the same release."""
    rows = [row for num in (1, 2, 3) for row in on_processes(num, released, str(tmp_path))]
    assert len(rows) == 6 and all(torch.equal(row, rows[0]) for row in rows)
    assert len(noted(tmp_path)) == 1
    # Twice the noise, as of two processes, would have a standard deviation 1.4 times as large.
    noise = (rows[0].double() - clipped_mean((0, 1, 2, 3, 4))) * 4
    assert abs(float(noise.std()) / (2.0 * CLIP) - 1) < 0.03
    assert abs(float(noise.mean())) < 3 * 2.0 * CLIP / math.sqrt(WIDTH)


def test_without_noise_it_is_the_formula_with_the_fixed_denominator(tmp_path: Path) -> None:
    without = replace(GUARANTEE, noise_multiplier=0.0)
    row = released(str(tmp_path), (0, 2, 3), guarantee=without)
    torch.testing.assert_close(row.double(), clipped_mean((0, 2, 3)), rtol=1e-6, atol=1e-9)
    assert float(torch.linalg.vector_norm(row)) > 0
    assert without.epsilon([1]) == math.inf


def test_an_empty_cohort_is_a_release_of_noise(tmp_path: Path) -> None:
    row = released(str(tmp_path), ())
    assert abs(float(row.std()) / (2.0 * CLIP / 4) - 1) < 0.03
    assert [one["round"] for one in noted(tmp_path)] == [1]


def test_only_what_is_shared_moves(tmp_path: Path) -> None:
    row = released(str(tmp_path), factors=("A",))
    assert row[:2000].any() and not row[2000:].any()


def test_a_repeated_round_is_the_same_release_or_one_more(tmp_path: Path) -> None:
    first = released(str(tmp_path))
    assert torch.equal(first, released(str(tmp_path)))
    assert [one["round"] for one in noted(tmp_path)] == [1]
    other = released(str(tmp_path), (0, 1, 2, 3))  # another sum of the same round
    assert [one["round"] for one in noted(tmp_path)] == [1, 1]
    # Its noise is independent: with the same noise the difference would be client 4's alone.
    difference = (other - first).double() * 4
    assert abs(float(difference.std()) / (2.0 * CLIP * math.sqrt(2)) - 1) < 0.03
    once, twice = (GUARANTEE.epsilon([1] * count) if has_library() else count for count in (1, 2))
    assert twice > once


def has_library() -> bool:
    from sfed.privacy import accounting

    return accounting.problem() is None


@pytest.mark.parametrize(
    "change",
    [
        {"key": Key("0123456789abcdef", bytes(range(1, 33)))},
        {"number": 2},
        {"guarantee": replace(GUARANTEE, noise_multiplier=2.5)},
        {"guarantee": replace(GUARANTEE, sampling=Sampling(NUM_CLIENTS, 3, is_poisson=True))},
    ],
    ids=["key", "round", "noise", "denominator"],
)
def test_another_key_round_or_scale_gives_other_noise(tmp_path: Path, change: dict) -> None:
    """The same noise at two scales would give the sum away."""

    def noise(**given: object) -> np.ndarray:
        scale = given.get("guarantee", GUARANTEE).sampling.cohort  # type: ignore[attr-defined]
        row = released(str(tmp_path), **given).double() * scale
        return (row - clipped_mean((0, 1, 2, 3, 4)) * 4).numpy()

    assert abs(np.corrcoef(noise(), noise(**change))[0, 1]) < 0.06
    assert len(noted(tmp_path)) == 2


# A clip that follows a quantile.

ADAPTIVE = replace(GUARANTEE, adaptive=AdaptiveClip(0.4, 0.2, 3.0))


def shared_twice(folder: str, guarantee: Guarantee) -> tuple[list[float], torch.Tensor]:
    """The clip before and after each of two rounds, and the change that the second shares.

    All five clients make the same changes of what they have received in both rounds.
    """
    world = distributed.start(RUN_SECONDS)
    try:
        own = partition.place(NUM_CLIENTS, world.size)[world.rank]
        clients, secret = clients_of(own, ()), None
        if world.is_main:
            secret = Secret(KEY, Path(folder), Ledger(Path(folder) / "p.jsonl", {}), is_new=False)
            secret.begin()
        private = PrivateMean(guarantee, b"", secret)
        clips, received = [private.clip(clients)], [torch.zeros(WIDTH)]
        for number in (1, 2):
            for client in own:
                row = row_of(client) + received[-1]
                clients.set_own(client, {"a": row[:2000], "b": row[2000:]})
            private.share(world, clients, ("A", "B"), range(NUM_CLIENTS), number)
            received.append(torch.cat([clients.shared("A"), clients.shared("B")]))
            clips.append(private.clip(clients))
        sync.barrier(world, "end")
        sync.leave_store_last(world)
        return clips, received[2] - received[1]
    finally:
        distributed.stop(world)


@pytest.mark.dist
def test_without_noise_the_clip_follows_the_share_of_changes_within_it(tmp_path: Path) -> None:
    """Client 0 of five is within the clip: 1/2 + (1/2 - 4/2) / 4 = 1/8 of a cohort of 4."""
    silent = replace(ADAPTIVE, noise_multiplier=0.0, adaptive=AdaptiveClip(0.4, 0.2, 0.0))
    growth = math.exp(-0.2 * (0.125 - 0.4))
    rows = [row_of(client).double() for client in range(NUM_CLIENTS)]
    lengths = [float(torch.linalg.vector_norm(row)) for row in rows]
    second = [row * min(1, CLIP * growth / n) for row, n in zip(rows, lengths, strict=True)]
    expected = torch.stack(second).sum(dim=0) / 4
    for num in (1, 2):
        for clips, change in on_processes(num, shared_twice, str(tmp_path), silent):
            assert clips == pytest.approx([CLIP, CLIP * growth, CLIP * growth**2], rel=1e-6)
            torch.testing.assert_close(change.double(), expected, rtol=1e-4, atol=1e-7)


def test_the_count_is_noised_and_the_sum_gets_the_rest(tmp_path: Path) -> None:
    """Over rounds the noise of the count has the standard deviation asked for."""
    world = distributed.start(RUN_SECONDS)
    try:
        ledger = Ledger(tmp_path / "p.jsonl", {})
        ledger.begin()
        secret = Secret(KEY, tmp_path, ledger, is_new=False)
        private, steps, spreads = PrivateMean(ADAPTIVE, b"", secret), [], []
        for number in range(1, 201):
            clients = clients_of(range(NUM_CLIENTS), ("A", "B"))
            private.share(world, clients, ("A", "B"), (0, 1, 2, 3, 4), number)
            steps.append(0.4 - math.log(private.clip(clients) / CLIP) / 0.2)
            noise = clients.row(0).double() - clipped_mean((0, 1, 2, 3, 4))
            spreads.append(float(noise.std()) * 4 / CLIP)
    finally:
        distributed.stop(world)
    assert np.mean(steps) == pytest.approx(0.125, abs=4 * 3.0 / 4 / math.sqrt(200))
    assert np.std(steps) == pytest.approx(3.0 / 4, rel=0.2)
    assert np.mean(spreads) == pytest.approx((1 / 4 - 1 / 36) ** -0.5, rel=0.005)


def test_the_same_sum_with_another_count_is_another_release(tmp_path: Path) -> None:
    """A client that does not move is not in the sum, but it is in the count."""
    ledger = Ledger(tmp_path / "p.jsonl", {})
    ledger.begin()
    private = PrivateMean(ADAPTIVE, b"", Secret(KEY, tmp_path, ledger, is_new=False))
    world = distributed.start(RUN_SECONDS)
    try:
        for participants in ((0,), (0, 1), (0,)):
            clients = clients_of(range(NUM_CLIENTS), ("A", "B"))
            clients.set_own(1, {"a": torch.zeros(2000), "b": torch.zeros(3000)})
            private.share(world, clients, ("A", "B"), participants, 1)
    finally:
        distributed.stop(world)
    assert ledger.rounds == [1, 1]


def test_nothing_is_released_that_the_ledger_could_not_note(tmp_path: Path) -> None:
    clients = clients_of(range(NUM_CLIENTS), ("A", "B"))
    before = clients.shared("A").clone()
    (tmp_path / "privacy.jsonl").mkdir()
    ledger = Ledger(tmp_path / "privacy.jsonl", {})
    private = PrivateMean(GUARANTEE, b"", Secret(KEY, tmp_path, ledger, is_new=False))
    world = distributed.start(RUN_SECONDS)
    try:
        with pytest.raises(UserError, match="nothing more is released"):
            private.share(world, clients, ("A", "B"), (0, 1), 1)
    finally:
        distributed.stop(world)
    assert torch.equal(clients.shared("A"), before)


# Opening: the key and the ledger of a run that begins or is resumed.


def settings(tmp_path: Path, **privacy: object) -> dict:
    return {
        "federated": {"num_clients": NUM_CLIENTS, "clients_per_round": 4},
        "privacy": {"clip": CLIP, "noise_multiplier": 2.0, **privacy},
        "output": {"dir": str(tmp_path), "name": "run"},
    }


def opened(data: dict, finished_rounds: int = 0) -> PrivateMean:
    config = validate(data)
    world = distributed.start(RUN_SECONDS)
    try:
        found = mean.open_mean(config, world, resolve(config), NUM_CLIENTS, finished_rounds)
    finally:
        distributed.stop(world)
    assert found is not None and found.secret is not None
    return found


def test_a_run_that_is_resumed_has_its_key_and_ledger_again(tmp_path: Path) -> None:
    first = opened(settings(tmp_path))
    assert first.secret is not None and not (tmp_path / ".keys").exists()
    (tmp_path / "run").mkdir()
    first.secret.begin()
    first.secret.ledger.add(1, "1" * 64)
    again = opened(settings(tmp_path), 1)
    assert again.secret is not None and again.secret.key == first.secret.key
    assert again.secret.ledger.rounds == [1]
    assert [again.cohort(i) for i in range(20)] == [first.cohort(i) for i in range(20)]
    with pytest.raises(CheckpointError, match="does not tell of the release of round 2"):
        opened(settings(tmp_path), 2)
    with pytest.raises(CheckpointError, match=r"noise_multiplier: 2\.0 there, 3\.0 now"):
        opened(settings(tmp_path, noise_multiplier=3.0), 1)
    anew = settings(tmp_path)
    anew["output"]["resume"] = "never"
    other = opened(anew)
    assert other.secret is not None and other.secret.key != first.secret.key
    assert [other.cohort(i) for i in range(20)] != [first.cohort(i) for i in range(20)]
    (tmp_path / ".keys" / f"{first.secret.key.name}.key").unlink()
    with pytest.raises(CheckpointError, match="the key of this run"):
        opened(settings(tmp_path), 1)


def test_a_lost_ledger_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"privacy\.jsonl.*round 1.*put the ledger back"):
        opened(settings(tmp_path), 1)


def test_rounds_that_share_nothing_release_nothing(tmp_path: Path) -> None:
    config = validate(settings(tmp_path))
    turns = replace(METHODS["sfed"], averaged=((), ("A",)))
    assert mean.planned_releases(config, turns, 5) == [2, 4]
    assert mean.planned_releases(config, METHODS["sfed"], 2) == [1, 2]


def test_a_target_gives_the_noise(tmp_path: Path) -> None:
    pytest.importorskip("dp_accounting", reason="accounts for epsilon: pip install 'sfed[privacy]'")
    data = settings(tmp_path, noise_multiplier=None, target_epsilon=3.0)
    data["federated"]["num_rounds"] = 20
    guarantee = opened(data).guarantee
    rounds = range(1, 21)
    assert 2.98 < guarantee.epsilon(list(rounds)) <= 3.0
    less = replace(guarantee, noise_multiplier=guarantee.noise_multiplier - 0.002)
    assert less.epsilon(list(rounds)) > 3.0
    data["privacy"]["target_epsilon"] = 1e-9
    with pytest.raises(ConfigError, match=r"privacy\.target_epsilon=1e-09.*no noise multiplier"):
        opened(data)
