"""The trainer on shards of a copy of the bench's model, beside torch as it is for the others."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from sfed.bench.measure import Clock
from sfed.bench.steps import Sfed
from sfed.bench.variants import seconds_of_step
from sfed.bench.workload import Workload, random_tokens
from sfed.config.load import validate
from sfed.distributed.world import World
from sfed.models import backbone
from sfed.models.synthetic import twin


class Sharded:
    """The trainer with all clients in one pass, on ZeRO-3's shards of a copy of a model."""

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        input_ids: torch.Tensor,
        secondary_size: int = 1,
    ) -> None:
        """Copy and shard the model. Collective.

        Args:
            model: the process has to hold it, and for a moment the copy, whole.
            workload: of this process.
            input_ids: what its clients read.
            secondary_size: so many processes hold a second copy of the shards together, from which
                they gather (hpZ); 1 = none.
        """
        zero = {"zero_hpz_partition_size": secondary_size} if secondary_size > 1 else {}
        config = validate({"backbone": {"deepspeed": {"zero_optimization": zero}}})
        linear = functional.linear
        try:
            self.contestant = Sfed(
                copy.deepcopy(model),
                workload,
                input_ids,
                clients_per_pass=workload.num_clients,
                store=lambda copied: backbone.hooked(copied, config),
            )
        finally:
            # DeepSpeed puts its own in the place of torch's function, for the whole process.
            self._linear, functional.linear = functional.linear, linear

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let steps on the shards use DeepSpeed's function; the others keep torch's."""
        linear, functional.linear = functional.linear, self._linear
        try:
            yield
        finally:
            functional.linear = linear


class HookedTwin:
    """The same step on a replica and on shards of the same weights.

    With one process there is nothing to gather, and DeepSpeed waits for the device at each layer:
    the difference is then one of a run that is never ahead of its device, and not of the hooks.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload, world: World) -> None:
        """Copy and shard the model. Collective."""
        ids, share = random_tokens(model.config, workload).to(world.device), workload.num_clients
        self._clock = Clock(world.device)
        self.plain = Sfed(twin(model), workload, ids, clients_per_pass=share)
        self.shards = Sharded(model, workload, ids)

    def seconds(self) -> float:
        """How much longer the step takes on shards. Collective."""
        plain = seconds_of_step(self.plain, self._clock, 1)
        with self.shards.in_place():
            return seconds_of_step(self.shards.contestant, self._clock, 1) - plain
