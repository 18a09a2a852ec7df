"""What ZeRO-3 costs a step: the same step with its hooks and without, one after the other."""

from __future__ import annotations

import copy

from torch.nn import functional
from transformers import PreTrainedModel

from sfed import backbone
from sfed.cli import validate
from sfed.contestants import Sfed
from sfed.distributed import World
from sfed.lineup import seconds_of_step
from sfed.meters import Clock
from sfed.mockups import Workload, random_tokens, twin


class HookedTwin:
    """The trainer with all clients in one pass, on a replica and on shards of the same weights.

    With one process there is nothing to gather, so the difference is that of the hooks alone.
    """

    def __init__(self, model: PreTrainedModel, workload: Workload, world: World) -> None:
        """Copy and shard the model. Collective."""
        ids, share = random_tokens(model.config, workload).to(world.device), workload.num_clients
        self._clock = Clock(world.device)
        self._plain = Sfed(twin(model), workload, ids, clients_per_pass=share)
        self._linear = functional.linear
        self._hooked = Sfed(
            copy.deepcopy(model),
            workload,
            ids,
            clients_per_pass=share,
            store=lambda copied: backbone.hooked(copied, validate({})),
        )
        # DeepSpeed puts its own in the place of torch's function, for the whole process.
        self._hooked_linear, functional.linear = functional.linear, self._linear

    def seconds(self) -> float:
        """How much longer the step takes on shards. Collective."""
        plain = seconds_of_step(self._plain, self._clock, 1)
        functional.linear = self._hooked_linear
        try:
            return seconds_of_step(self._hooked, self._clock, 1) - plain
        finally:
            functional.linear = self._linear
