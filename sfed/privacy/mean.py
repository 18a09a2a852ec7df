"""The private mean of a round: clipped, summed, noised once, noted in the ledger, then released.

    w + (sum_i d_i min(1, C / |d_i|) + N(0, (z C)^2 I)) / m

with m fixed in advance. Process 0 holds the key and the ledger, draws the noise, and gives the
result to the others.
"""

from __future__ import annotations

import math
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
from sfed.privacy import accounting, keys
from sfed.privacy.accounting import Sampling
from sfed.privacy.clipping import UNITS, clipped_sum
from sfed.privacy.keys import Key
from sfed.privacy.ledger import LEDGER_FILE, Ledger
from sfed.utils.errors import CheckpointError, ConfigError

_BYTES_PER_NUMBER = 8 + 4
"""Of the sum, in whole numbers, and of what is released."""


@dataclass(frozen=True)
class Guarantee:
    """What a run promises."""

    sampling: Sampling
    clip: float
    """C."""
    noise_multiplier: float
    """z."""
    delta: float

    def epsilon(self, rounds: Sequence[int]) -> float:
        """Return epsilon of releases in these rounds."""
        return accounting.epsilon(self.sampling, self.noise_multiplier, rounds, self.delta)

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain data."""
        return {
            "clip": self.clip,
            "noise_multiplier": self.noise_multiplier,
            "delta": self.delta,
            "num_clients": self.sampling.num_clients,
            "cohort": self.sampling.cohort,
            "sampling": "poisson" if self.sampling.is_poisson else "fixed",
            "neighbours": self.sampling.neighbours,
        }


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
            f"privacy of what is sent, after {num_rounds} rounds: "
            f"{describe(self.guarantee, self.guarantee.epsilon(planned))}; cohort "
            f"{sampling.cohort} of {sampling.num_clients} ({kind}), from a secret key"
        )

    def cohort(self, round_index: int) -> tuple[int, ...]:
        """Return the sorted clients of a 0-based round; of a Poisson cohort perhaps nobody."""
        return keys.draw_cohort(self.cohort_secret, round_index, self.guarantee.sampling)

    def spent(self) -> dict[str, Any]:
        """What the releases so far have cost, under the names of metrics.

        Epsilon is infinite without noise; it and the number of releases are None but on process 0.
        """
        rounds = None if self.secret is None else self.secret.ledger.rounds
        return {
            metrics.EPSILON: None if rounds is None else self.guarantee.epsilon(rounds),
            metrics.DELTA: self.guarantee.delta,
            metrics.RELEASES: None if rounds is None else len(rounds),
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
        own = [client for client in participants if client in clients.lines]
        units = clipped_sum(clients, factors, own, self.guarantee.clip).to(world.device)
        total = all_reduce_sum(units)
        change = torch.zeros(len(total), dtype=torch.float32, device=world.device)
        with raise_everywhere(world, "the release of a round"):
            if self.secret is not None:
                noisy = self._noisy(total.cpu().numpy(), finished_rounds, self.secret)
                unit = self.guarantee.clip / UNITS / self.guarantee.sampling.cohort
                change.copy_(torch.from_numpy(noisy * unit))
        change = all_reduce_sum(change)
        widths = [len(clients.shared(factor)) for factor in factors]
        for factor, part in zip(factors, torch.split(change, widths), strict=True):
            clients.set_shared(factor, clients.shared(factor).to(world.device) + part)
        return message_bytes(sum(widths))

    def _noisy(self, total: NDArray[np.int64], number: int, secret: Secret) -> NDArray[np.float64]:
        """Note the release, then add the noise of this sum: (M,) in units of the clip.

        The noise is a function of key, round and sum. It is rounded to the sum's units.
        """
        key, z = secret.key, self.guarantee.noise_multiplier
        # Whatever scales the noise is in the seed: noise of two sizes would give the sum away.
        scales = repr((number, self.guarantee.clip, z, self.guarantee.sampling.cohort))
        seed = key.derive("sum", key.derive("scales", scales.encode()), total.tobytes())
        secret.ledger.add(number, key.derive("tag", seed).hex())
        if z == 0:
            return total.astype(np.float64)
        noisy, start = total.copy(), 0
        for part in keys.standard_normal(key.derive("noise", seed), len(total)):
            noisy[start : start + len(part)] += np.rint(part * (z * UNITS)).astype(np.int64)
            start += len(part)
        return noisy.astype(np.float64)


def message_bytes(parameters: int) -> int:
    """Bytes of the messages of a private mean of so many parameters."""
    return _BYTES_PER_NUMBER * parameters


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
        ConfigError: on every process, where no noise reaches ``privacy.target_epsilon``.
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
    guarantee = guarantee or _guarantee(config, num_clients, noise_multiplier)
    return PrivateMean(guarantee, bytes.fromhex(cohort_secret), secret)


def guarantee_of(config: Config, method: Method, num_clients: int) -> Guarantee:
    """What a configuration with privacy promises for N clients; target_epsilon gives the noise.

    Raises:
        ConfigError: where no noise reaches ``privacy.target_epsilon``.
    """
    privacy = config.privacy
    z = privacy.noise_multiplier
    if privacy.target_epsilon is not None:
        sampling = sampling_of(config, num_clients)
        releases = len(planned_releases(config, method, config.federated.num_rounds))
        try:
            z = accounting.noise_for(sampling, privacy.target_epsilon, releases, privacy.delta)
        except ValueError as problem:
            raise ConfigError(
                f"privacy.target_epsilon={privacy.target_epsilon:g}: {problem}; set a larger one, "
                "fewer federated.num_rounds, or a smaller federated.clients_per_round"
            ) from None
    assert z is not None  # the section has one of the two
    return _guarantee(config, num_clients, z)


def _guarantee(config: Config, num_clients: int, noise_multiplier: float) -> Guarantee:
    clip = config.privacy.clip
    assert clip is not None
    sampling = sampling_of(config, num_clients)
    return Guarantee(sampling, clip, noise_multiplier, config.privacy.delta)


def sampling_of(config: Config, num_clients: int) -> Sampling:
    """How cohorts are drawn under privacy."""
    federated = config.federated
    cohort = federated.clients_per_round or num_clients
    return Sampling(num_clients, cohort, is_poisson=config.has_poisson_cohorts)


def planned_releases(config: Config, method: Method, num_rounds: int) -> list[int]:
    """The rounds, from 1, that share something."""
    shares_head = config.federated.share_head
    return [i + 1 for i in range(num_rounds) if shares_head or method.averaged_in(i)]


def describe(guarantee: Guarantee, epsilon: float) -> str:
    """Say a guarantee in words."""
    told = f"{epsilon:.4g}" if math.isfinite(epsilon) else "infinite (no noise)"
    return (
        f"epsilon {told} at delta {guarantee.delta:g} ({guarantee.sampling.neighbours}), "
        f"clip {guarantee.clip:g}, noise multiplier {guarantee.noise_multiplier:.4g}"
    )


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
