"""The private mean of a round: clipped, summed, noised once, noted in the ledger, then released.

    w + (sum_i d_i min(1, C / |d_i|) + N(0, (z C)^2 I)) / m

with m fixed in advance. Where the clip adapts, z is ``Guarantee.sum_multiplier``, and the noisy
share of changes within the clip is released too. Process 0 holds the key and the ledger, draws the
noise, and gives the result to the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfed.clients.store import ClientStore
from sfed.config.schema import Config
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World, all_reduce_sum
from sfed.methods.method import Method
from sfed.observability import metrics
from sfed.privacy import keys
from sfed.privacy.clipping import UNITS, clipped_sum
from sfed.privacy.guarantee import (
    Guarantee,
    describe,
    guarantee_of,
    guarantee_with,
    planned_releases,
)
from sfed.privacy.keys import Key
from sfed.privacy.ledger import LEDGER_FILE, Ledger
from sfed.utils.errors import CheckpointError
from sfed.utils.text import counted

_BYTES_PER_NUMBER = 8 + 4
"""Of the sum, in whole numbers, and of what is released."""
_CLIP = "privacy/clip"
"""Name of an adapted clip among what the server keeps: (1,) fp64."""


@dataclass(frozen=True)
class Secret:
    """What process 0 alone holds."""

    key: Key
    folder: Path
    """Of keys."""
    ledger: Ledger
    is_new: bool
    """Whether neither key nor ledger are on the disk yet."""

    def begin(self) -> None:
        """Write the key if it is new, then the ledger; before the first round of a start.

        Raises:
            UserError: where they cannot be written.
        """
        if self.is_new:
            self.key.write(self.folder)
        self.ledger.begin()


@dataclass(frozen=True)
class PrivateMean:
    """The mean of a run under privacy."""

    guarantee: Guarantee
    cohort_secret: bytes = field(repr=False)
    """From which cohorts are drawn; the noise is not."""
    secret: Secret | None
    """None on all processes but process 0."""

    def line(self, config: Config, method: Method) -> str:
        """What the planned rounds come to if none is repeated, for persons; on process 0."""
        num_rounds, sampling = config.federated.num_rounds, self.guarantee.sampling
        planned = planned_releases(config, method, num_rounds)
        kind = "Poisson, expected" if sampling.is_poisson else "fixed"
        return (
            f"privacy of what is sent, after {counted(num_rounds, 'round')}: "
            f"{describe(self.guarantee, self.guarantee.epsilon(planned))}; cohort "
            f"{sampling.cohort} of {sampling.num_clients} ({kind}), from a secret key"
        )

    def cohort(self, round_index: int) -> tuple[int, ...]:
        """Return the sorted clients of a 0-based round; of a Poisson cohort perhaps nobody."""
        return keys.draw_cohort(self.cohort_secret, round_index, self.guarantee.sampling)

    def clip(self, clients: ClientStore) -> float:
        """Return C of the round that comes next; the same on every process."""
        adapted = clients.server_state.get(_CLIP)
        return self.guarantee.clip if adapted is None else float(adapted)

    def spent(self, clients: ClientStore) -> dict[str, Any]:
        """What the releases so far have cost, and the clip, under the names of metrics.

        Epsilon is infinite without noise; it and the number of releases are None but on process 0.
        """
        rounds = None if self.secret is None else self.secret.ledger.rounds
        return {
            metrics.EPSILON: None if rounds is None else self.guarantee.epsilon(rounds),
            metrics.DELTA: self.guarantee.delta,
            metrics.RELEASES: None if rounds is None else len(rounds),
            metrics.CLIP: self.clip(clients),
        }

    def share(
        self,
        world: World,
        clients: ClientStore,
        factors: Sequence[str],
        participants: Sequence[int],
        finished_rounds: int,
    ) -> int:
        """Replace the given factors of every client by their private mean. Collective.

        Args:
            world: the processes.
            clients: of this process; what they share is what they received.
            factors: what is shared in this round: some of A, B and head, or nothing.
            participants: of the cohort, those whose numbers are finite; perhaps nobody.
            finished_rounds: including this round.

        Returns:
            Bytes of the messages.

        Raises:
            UserError: on every process, where the ledger cannot be written.
        """
        if not factors:
            return 0
        guarantee, clip = self.guarantee, self.clip(clients)
        own = [client for client in participants if client in clients.lines]
        units, balance = clipped_sum(clients, factors, own, clip)
        if guarantee.adaptive is not None:
            units = torch.cat([units, units.new_tensor([balance])])
        total = all_reduce_sum(units.to(world.device))
        released = torch.zeros(len(total), dtype=torch.float32, device=world.device)
        with raise_everywhere(world, "the release of a round"):
            if self.secret is not None:
                scales = _Scales(finished_rounds, clip, guarantee)
                released.copy_(_release(total.cpu().numpy(), scales, self.secret))
        released = all_reduce_sum(released)
        widths = [len(clients.shared(factor)) for factor in factors]
        changes = torch.split(released[: sum(widths)], widths)
        for factor, change in zip(factors, changes, strict=True):
            clients.set_shared(factor, clients.shared(factor).to(world.device) + change)
        if guarantee.adaptive is not None:
            following = guarantee.adaptive.next(clip, float(released[-1]))
            clients.server_state[_CLIP] = torch.tensor([following], dtype=torch.float64)
        return _BYTES_PER_NUMBER * len(total)


@dataclass(frozen=True)
class _Scales:
    """What the size of a round's noise follows from."""

    number: int
    """Of the round, from 1."""
    clip: float
    """C of this round."""
    guarantee: Guarantee

    @property
    def of_sum(self) -> float:
        """The multiplier of the sum."""
        return self.guarantee.sum_multiplier

    @property
    def seed(self) -> bytes:
        """All of it: noise of two sizes from one seed would give the sum away."""
        adaptive = self.guarantee.adaptive
        counted = () if adaptive is None else (adaptive.count_noise,)
        cohort = self.guarantee.sampling.cohort
        return repr((self.number, self.clip, self.of_sum, cohort, *counted)).encode()


def _release(total: NDArray[np.int64], scales: _Scales, secret: Secret) -> torch.Tensor:
    """Note a release in the ledger, then add the noise that belongs to its sum.

    The noise is a function of key, round and sum, rounded to the sum's units.

    Args:
        total: (M,) in units of the clip, or (M + 1,) with the balance of an adaptive clip's count.
        scales: of the noise.
        secret: of the run.

    Returns:
        fp64 of the same shape: the mean change, and the share of changes within the clip.
    """
    key, guarantee = secret.key, scales.guarantee
    seed = key.derive("sum", key.derive("scales", scales.seed), total.tobytes())
    secret.ledger.add(scales.number, key.derive("tag", seed).hex())
    noisy, size, cohort = total.copy(), len(total), guarantee.sampling.cohort
    balance = 0.0
    if guarantee.adaptive is not None:
        size -= 1
        [noise] = next(keys.standard_normal(key.derive("count", seed), 1))
        balance = float(total[-1]) / 2 + noise * guarantee.adaptive.count_noise
    if scales.of_sum:
        _add_noise(noisy[:size], scales.of_sum, key.derive("noise", seed))
    released = noisy.astype(np.float64) * (scales.clip / UNITS / cohort)
    released[size:] = 0.5 + balance / cohort
    return torch.from_numpy(released)


def _add_noise(units: NDArray[np.int64], multiplier: float, seed: bytes) -> None:
    """Add Gaussian noise of so many clips to a sum in units, in place."""
    start = 0
    for part in keys.standard_normal(seed, len(units)):
        units[start : start + len(part)] += np.rint(part * (multiplier * UNITS)).astype(np.int64)
        start += len(part)


def message_bytes(config: Config, parameters: int) -> int:
    """Bytes of the messages of a private mean of so many parameters."""
    counts = config.privacy.clip_quantile is not None
    return _BYTES_PER_NUMBER * (parameters + counts)


def open_mean(
    config: Config, world: World, method: Method, num_clients: int, finished_rounds: int
) -> PrivateMean | None:
    """Find the key and the ledger of a run, or draw a key; nothing is written. Collective.

    Args:
        config: the run.
        world: the processes.
        method: of the run.
        num_clients: N.
        finished_rounds: of the checkpoint that is resumed; 0 where the run begins.

    Returns:
        None where privacy is off.

    Raises:
        CheckpointError: on every process, where what the run has released is not known any more.
        ConfigError: on every process, as ``guarantee_of``.
    """
    if not config.privacy.is_on:
        return None
    guarantee, secret = None, None
    with raise_everywhere(world, "opening the ledger of releases"):
        if world.is_main:
            guarantee = guarantee_of(config, method, num_clients)
            secret = _open_secret(config, guarantee)
            _refuse_gaps(secret.ledger, config, method, finished_rounds)
    told = None
    if guarantee is not None and secret is not None:
        # The noise's own key stays on process 0.
        told = [guarantee.noise_multiplier, secret.key.derive("cohort").hex()]
    noise_multiplier, cohort_secret = gather_json(world, "the secret of cohorts", told)[0]
    guarantee = guarantee or guarantee_with(config, num_clients, noise_multiplier)
    return PrivateMean(guarantee, bytes.fromhex(cohort_secret), secret)


def _open_secret(config: Config, guarantee: Guarantee) -> Secret:
    """The key and the ledger in the run folder, or new ones.

    Raises:
        CheckpointError: where the key cannot be read, or the ledger is of other noise.
    """
    output = config.output
    folder = Path(config.privacy.key_folder or Path(output.dir) / ".keys")
    path = Path(output.dir) / config.run_name / LEDGER_FILE
    ledger = None if output.resume == "never" else Ledger.read(path)
    if ledger is None:
        key = Key.new()
        start = {"event": "start", "key": key.name, **guarantee.facts}
        return Secret(key, folder, Ledger(path, start), is_new=True)
    key = Key.read(folder, ledger.start["key"])
    changed = [
        f"{name}: {ledger.start.get(name)!r} there, {value!r} now"
        for name, value in guarantee.facts.items()
        if ledger.start.get(name) != value
    ]
    if changed:
        raise CheckpointError(
            f"{path} counts releases that were made with other settings:\n  "
            + "\n  ".join(changed)
            + "\nset them back, or choose another output.name, or set output.resume=never to begin "
            "anew"
        )
    return Secret(key, folder, ledger, is_new=False)


def _refuse_gaps(ledger: Ledger, config: Config, method: Method, finished_rounds: int) -> None:
    """Refuse a ledger that lacks a round which a checkpoint has.

    Raises:
        CheckpointError: naming the round.
    """
    due = set(planned_releases(config, method, finished_rounds))
    if missing := sorted(due - set(ledger.rounds)):
        raise CheckpointError(
            f"{ledger.path} does not tell of the release of round {missing[0]}, which the "
            "checkpoint has, so epsilon is not known; put the ledger back, or begin anew with "
            "output.resume=never"
        )
