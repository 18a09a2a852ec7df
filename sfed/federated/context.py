"""What one run is made of, put together once and passed around whole."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedTokenizerFast

from sfed.clients.store import ClientRows
from sfed.config.schema import DEFAULT_LOCAL_STEPS, Config
from sfed.data import partition
from sfed.data.packing import Packing
from sfed.data.splits import Data
from sfed.data.tasks import Task
from sfed.distributed.world import World
from sfed.lora.adapters import Adapters
from sfed.memory.clients_per_pass import Sharing
from sfed.methods import sampling
from sfed.methods.aggregation import normalised_weights
from sfed.methods.method import Method
from sfed.models.backbone import Backbone


@dataclass(frozen=True)
class Run:
    """The parts of a run on this process."""

    config: Config
    world: World
    task: Task
    tokenizer: PreTrainedTokenizerFast
    method: Method
    num_clients: int
    gamma: float
    backbone: Backbone
    adapters: Adapters
    data: Data
    clients: ClientRows
    sharing: Sharing

    def cohort(self, round_index: int) -> tuple[int, ...]:
        """The clients of a round; the same on every process."""
        return sampling.cohort(
            self.config.seed,
            round_index,
            self.num_clients,
            self.config.federated.clients_per_round,
        )

    def trained_in(self, round_index: int) -> tuple[str, ...]:
        """What trains in this 0-based round; a head always does."""
        return self.method.trained_in(round_index) + self._head

    def averaged_in(self, round_index: int) -> tuple[str, ...]:
        """What is averaged at the end of this 0-based round."""
        shared_head = self._head if self.config.federated.share_head else ()
        return self.method.averaged_in(round_index) + shared_head

    @property
    def _head(self) -> tuple[str, ...]:
        return () if self.adapters.head is None else ("head",)

    def weights(self, participants: tuple[int, ...]) -> list[float]:
        """(N,) weights of the mean over these clients, as ``federated.weighting`` says."""
        return client_weights(self.config, self.data, self.num_clients, participants)

    def local_steps(self, client: int) -> int:
        """Optimizer steps that a client makes in a round."""
        train = self.config.train
        if train.local_epochs is None:
            return train.local_steps or DEFAULT_LOCAL_STEPS
        return -(-self.data.train_counts[client] * train.local_epochs // train.batch_size)

    @property
    def packing(self) -> Packing | None:
        """How several short sequences of a client share a row of a pass; None = never."""
        return None if self.why_padded else self.backbone.packing

    @property
    def why_padded(self) -> str | None:
        """Why each sequence has a row of its own; None where short ones share rows."""
        if not self.config.data.packing:
            return "data.packing=false"
        if self.task.is_classification:
            return "a classifier reads one text in a row"
        if self.config.lora.dropout > 0.0:
            return "lora.dropout draws its masks for rows as they lie"
        if self.backbone.packing is None:
            return "this model would let documents in one row see each other"
        return None

    @property
    def passes_per_step(self) -> int:
        """Micro passes of one optimizer step."""
        train = self.config.train
        return -(-train.batch_size // (train.micro_batch_size or train.batch_size))

    def placement(self) -> list[range]:
        """The clients of each process."""
        return partition.place(self.num_clients, self.world.size)

    def clients_per_pass(self, own: range) -> int:
        """Most clients in one pass of a process that holds ``own``."""
        return self.sharing.of(own)


def client_weights(
    config: Config, data: Data, num_clients: int, participants: tuple[int, ...]
) -> list[float]:
    """(N,) weights of the mean over some clients, as ``federated.weighting`` says."""
    by_examples = config.federated.weighting == "examples"
    counts = data.train_counts if by_examples else None
    return normalised_weights(num_clients, participants, counts)
