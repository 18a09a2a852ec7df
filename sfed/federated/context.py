"""What one run is made of, and what each of its rounds does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from sfed.clients.round_stats import RoundStats
from sfed.clients.schedule import Course
from sfed.clients.store import ClientStore, groups
from sfed.config.schema import Config
from sfed.data.packing import Packing
from sfed.data.splits import Data
from sfed.data.tasks import Task
from sfed.distributed.world import World
from sfed.lora.adapters import Adapters
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.methods import aggregation, by_layer, sampling
from sfed.methods.aggregation import normalised_weights
from sfed.methods.method import Method
from sfed.models.backbone import Backbone
from sfed.models.changed_weights import ChangedWeights
from sfed.models.objective import Objective, objective_of, why_padded
from sfed.privacy import mean as private_mean
from sfed.privacy.mean import PrivateMean
from sfed.storage.origin import Origin

Group = tuple[int, ...]
"""Clients that share passes."""


@dataclass(frozen=True)
class RoundPlan:
    """What one round does: who takes part, in which groups, and what trains and is averaged."""

    round_index: int
    """From 0."""
    cohort: tuple[int, ...]
    """The clients that train."""
    steps: Mapping[int, int]
    """Optimizer steps of each of them."""
    groups: list[list[Group]]
    """Groups of clients that share passes, for each process in order."""
    trained: tuple[str, ...]
    """Factors that train: some of A, B and head."""
    averaged: tuple[str, ...]
    """Factors that are sent at the end and then the same on all clients: their weighted mean, or
    what the method's server step makes of them."""
    stepped: tuple[str, ...] = ()
    """Those of them that the server step gets."""
    received: tuple[str, ...] = ()
    """Factors that train and were the same on all clients at the start of the round."""

    @property
    def finished_rounds(self) -> int:
        """How many rounds are finished after this one."""
        return self.round_index + 1

    @property
    def means(self) -> tuple[str, ...]:
        """Factors that become their weighted mean."""
        return tuple(factor for factor in self.averaged if factor not in self.stepped)

    def steps_left(self, stats: RoundStats, group: Group) -> range:
        """The steps from the first that some client of a group has still to make."""
        first = min(int(stats.steps[client]) for client in group)
        return range(first, max(self.steps[client] for client in group))

    def is_complete(self, stats: RoundStats) -> bool:
        """Whether every client has made all of its steps."""
        return all(stats.steps[client] >= self.steps[client] for client in self.cohort)


@dataclass(frozen=True)
class Run:
    """The parts of a run on this process."""

    config: Config
    world: World
    task: Task
    tokenizer: PreTrainedTokenizerFast
    method: Method
    num_clients: int
    gammas: tuple[float, ...]
    """(N,): the factor of B A x of each client."""
    backbone: Backbone
    adapters: Adapters
    data: Data
    clients: ClientStore
    sharing: ClientsPerPass
    course: Course
    """Of the learning rate."""
    origin: Origin | None
    """What the adapters started from; None where A was drawn."""
    class_weights: torch.Tensor | None = None
    """(classes,) fp32 on the device; None where all classes count the same."""
    privacy: PrivateMean | None = None
    """Clips and noises what is shared; None where privacy is off."""
    changed: ChangedWeights | None = None
    """The frozen weights that the method changes; None where it changes none."""

    def plan(self, round_index: int) -> RoundPlan:
        """What a 0-based round does; the same on every process, without communication."""
        cohort = self._cohort(round_index)
        head = () if self.adapters.head is None else ("head",)
        shared_head = head if self.config.federated.share_head else ()
        trained = self.method.trained_in(round_index) + head
        averaged = self.method.averaged_in(round_index)
        return RoundPlan(
            round_index,
            cohort,
            {client: self.local_steps(client) for client in cohort},
            self.groups(cohort),
            trained,
            averaged + shared_head,
            averaged if self.method.server_step is not None else (),
            tuple(factor for factor in trained if factor in self.received),
        )

    def _cohort(self, round_index: int) -> tuple[int, ...]:
        if self.privacy is not None:
            return self.privacy.cohort(round_index)
        size = self.config.federated.clients_per_round
        return sampling.cohort(self.config.seed, round_index, self.num_clients, size)

    @property
    def received(self) -> tuple[str, ...]:
        """Factors that train and are the same on all clients at the start of every round."""
        shares_head = self.config.federated.share_head and self.adapters.head is not None
        return self.method.received + (("head",) if shares_head else ())

    def senders(self, weights: Sequence[float]) -> list[list[int]]:
        """The clients of each process that have a weight above 0 in the mean."""
        return [[client for client in own if weights[client] > 0] for own in self.placement]

    def message_bytes(self, plan: RoundPlan) -> int:
        """Bytes that the mean and the server step of a round send."""
        layout = self.clients.layout
        if self.privacy is not None:
            parameters = aggregation.message_bytes(layout, plan.averaged) // 4
            return private_mean.message_bytes(self.config, parameters)
        senders = self.senders(self.weights(plan.cohort))
        of_step = by_layer.message_bytes(layout, plan.stepped, senders) if plan.stepped else 0
        if self.method.changes_base and plan.stepped:
            rows = sum(layout.rank_of(client) for some in senders for client in some)
            of_step += by_layer.base_change_bytes(layout, plan.stepped, rows, self.world.size)
        controlled = plan.received if self.config.federated.scaffold else ()
        return of_step + aggregation.message_bytes(layout, (*plan.means, *controlled))

    def groups(self, clients: Sequence[int]) -> list[list[Group]]:
        """Which of these clients share passes: the groups of each process, in order."""
        asked = set(clients)
        return [
            list(groups([c for c in own if c in asked], self.sharing.of(own)))
            for own in self.placement
        ]

    @property
    def everyone(self) -> tuple[int, ...]:
        """All N clients."""
        return tuple(range(self.num_clients))

    @property
    def evaluated(self) -> tuple[int, ...]:
        """The clients that are evaluated: all N, or the sample of ``evaluation.clients``."""
        return sampling.evaluated(
            self.config.seed, self.num_clients, self.config.evaluation.clients
        )

    @property
    def sample(self) -> list[int] | None:
        """The clients that are evaluated, where not all are."""
        found = self.evaluated
        return None if len(found) == self.num_clients else list(found)

    def is_due(self, finished_rounds: int, every: int) -> bool:
        """Whether something that happens every so many rounds does now.

        After the last round it always does; with 0 it never does.
        """
        if every == 0:
            return False
        return finished_rounds % every == 0 or finished_rounds == self.config.federated.num_rounds

    @property
    def resets_moments(self) -> bool:
        """Whether each round starts with new moments of the optimizer."""
        return self.config.federated.optimizer_state == "reset" or not self.method.keeps_moments

    def weights(self, participants: tuple[int, ...]) -> list[float]:
        """(N,) weights of the mean over these clients, as ``federated.weighting`` says."""
        return client_weights(self.config, self.data, self.num_clients, participants)

    def local_steps(self, client: int) -> int:
        """Optimizer steps that a client makes in a round."""
        return self.data.settings[client].steps(self.data.train_counts[client])

    @property
    def gamma(self) -> float | tuple[float, ...]:
        """The factor of B A x: one number, or each client's where their LoRA ranks differ."""
        return self.gammas if self.has_mixed_ranks else self.gammas[0]

    @property
    def has_mixed_ranks(self) -> bool:
        """Whether some client has a smaller LoRA rank than another."""
        return self.clients.layout.has_mixed_ranks

    def bind(
        self,
        clients: Sequence[int],
        values: torch.Tensor,
        grads: torch.Tensor | None = None,
        trained: Sequence[str] = (),
    ) -> None:
        """Point the adapters at rows of these clients, each with its own gamma.

        Args:
            clients: C of them.
            values: (C, layout.size) fp32.
            grads: same shape; None where nothing trains.
            trained: factors that get gradients.
        """
        gammas = [self.gammas[client] for client in clients] if self.has_mixed_ranks else None
        self.adapters.bind(values, grads, trained, gammas)

    def own_factors(self, finished_rounds: int) -> tuple[str, ...]:
        """Which of A, B and head clients hold their own of, after so many rounds.

        The others are the same on all clients, bit for bit.
        """
        if finished_rounds == 0 and self.origin is not None:
            return self.origin.own_factors
        return own_factors(self.config, self.method, self.clients.layout.factors)

    @property
    def objective(self) -> Objective:
        """What is learned from a batch."""
        return objective_of(self.backbone, self.packing, self.class_weights)

    @property
    def packing(self) -> Packing | None:
        """How several short sequences of a client share a row of a pass; None = never."""
        return None if self.why_padded else self.backbone.packing

    @property
    def why_padded(self) -> str | None:
        """Why each sequence has a row of its own; None where short ones share rows."""
        return why_padded(self.config, self.backbone)

    @property
    def passes_per_step(self) -> int:
        """Micro passes of one optimizer step, of the client with the largest batch."""
        most = max(settings.batch_size for settings in self.data.settings)
        return -(-most // (self.config.train.micro_batch_size or most))

    @property
    def placement(self) -> tuple[tuple[int, ...], ...]:
        """The clients of each process, in ascending order."""
        return self.data.placement.clients


def client_weights(
    config: Config, data: Data, num_clients: int, participants: tuple[int, ...]
) -> list[float]:
    """(N,) weights of the mean over some clients, as ``federated.weighting`` says."""
    by_examples = config.federated.weighting == "examples"
    counts = data.train_counts if by_examples else None
    return normalised_weights(num_clients, participants, counts)


def own_factors(config: Config, method: Method, factors: Sequence[str]) -> tuple[str, ...]:
    """Which of some factors clients hold their own of, between rounds."""
    apart = {
        "A": method.keeps_apart("A"),
        "B": method.keeps_apart("B"),
        "head": not config.federated.share_head,
    }
    return tuple(factor for factor in factors if apart[factor])
