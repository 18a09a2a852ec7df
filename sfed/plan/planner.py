"""What a run will need and how long a round will take, before any weight is there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.data.partition import place
from sfed.memory import clients_per_pass, counts, profile
from sfed.memory.costs import USABLE_SHARE, ClientState, Costs, Needs, Work, largest
from sfed.memory.counts import Facts
from sfed.models import shapes
from sfed.models.deepspeed import deepspeed_settings
from sfed.models.hf_config import DTYPES, Sharding, resolve_sharding

# The driver's context, kernels and the buffers of NCCL: an assumption.
CONTEXT_BYTES = 2**30
_MOST_ROWS, _MOST_CLIENTS = 2**12, 2**16


@dataclass(frozen=True)
class Machine:
    """GPUs, all alike, one process on each."""

    gpus: int
    memory_bytes: int
    """Of each."""
    link: str
    datasheet_flops: float


@dataclass(frozen=True)
class Outlook:
    """The memory of one GPU: of one that holds the most clients."""

    machine: Machine
    num_clients: int
    facts: Facts
    costs: Costs
    sharding: Sharding
    stored_bytes: int
    """Of the whole backbone."""
    device_bytes: int
    """Of it, on each GPU between passes."""
    gathered_bytes: int
    """Of it, on each GPU for a while."""
    host_bytes: int
    """Of it, in host memory, for each GPU."""
    work: Work
    state: ClientState
    clients_per_pass: int

    @property
    def free_bytes(self) -> int:
        """What is left for clients and passes."""
        taken = CONTEXT_BYTES + self.device_bytes + self.gathered_bytes
        return max(0, self.machine.memory_bytes - taken)

    @property
    def needs(self) -> Needs:
        """Of the passes as they will be."""
        return self.work.needs(self.costs, self.state, self.clients_per_pass)

    @property
    def fits(self) -> bool:
        """Whether it all fits."""
        return self._fits(self.work, self.clients_per_pass)

    def _fits(self, work: Work, clients: int) -> bool:
        total = work.needs(self.costs, self.state, clients).total
        return total <= USABLE_SHARE * self.free_bytes

    @property
    def smallest_gpu_bytes(self) -> int:
        """The least memory of a GPU that would do."""
        taken = CONTEXT_BYTES + self.device_bytes + self.gathered_bytes
        return taken + round(self.needs.total / USABLE_SHARE)

    @property
    def most_clients(self) -> int:
        """Clients that would fit into a pass, were there as many on a GPU."""
        most = _MOST_CLIENTS
        many = dataclasses.replace(self.work, own_clients=most, round_clients=most)
        return many.most_clients(self.costs, self.state, self.free_bytes)

    def most_rows(self, clients: int) -> int:
        """The most sequences of a client in a training pass of so many clients."""

        def fits(rows: int) -> bool:
            return self._fits(dataclasses.replace(self.work, train_rows=rows), clients)

        return largest(fits, _MOST_ROWS)

    def most_eval_rows(self, clients: int) -> int:
        """The same of an evaluation pass."""

        def fits(rows: int) -> bool:
            return self._fits(dataclasses.replace(self.work, eval_rows=rows), clients)

        return largest(fits, _MOST_ROWS)

    def most_tokens(self, clients: int) -> int:
        """The longest row for passes of so many clients."""

        def fits(tokens: int) -> bool:
            return self._fits(dataclasses.replace(self.work, tokens=tokens), clients)

        return largest(fits, self.work.tokens)


class Planner:
    """Predicts configurations for one machine; what has been measured once is kept."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._costs: dict[str, Costs] = {}

    def outlook(self, config: Config) -> Outlook:
        """Predict the memory of a configuration.

        Raises:
            UserError: where the model or a target of the adapters is not to be found.
        """
        model_config = shapes.shape_of(config)
        dtype = DTYPES["bf16" if config.model.dtype == "auto" else config.model.dtype]
        facts = counts.facts_of(config, model_config)
        machine, stored = self._machine, facts.num_weights * dtype.itemsize
        sharding = resolve_sharding(
            config.backbone, machine.gpus, lambda: (stored, machine.memory_bytes - CONTEXT_BYTES)
        )
        device, gathered, host = _weights(config, model_config, dtype, stored, machine, sharding)
        num_clients = config.federated.num_clients or machine.gpus
        own = max(map(len, place(num_clients, machine.gpus)))
        tokens = min(config.data.max_tokens, _positions(model_config))
        found = Outlook(
            machine=machine,
            num_clients=num_clients,
            facts=facts,
            costs=self._measured(config, model_config, dtype, facts, sharding),
            sharding=sharding,
            stored_bytes=stored,
            device_bytes=device,
            gathered_bytes=gathered,
            host_bytes=host,
            work=clients_per_pass.work_of(config, own, tokens),
            state=clients_per_pass.state_of(config, facts.numbers),
            clients_per_pass=1,
        )
        return dataclasses.replace(found, clients_per_pass=_clients_per_pass(config, found))

    def _measured(
        self,
        config: Config,
        model_config: PreTrainedConfig,
        dtype: torch.dtype,
        facts: Facts,
        sharding: Sharding,
    ) -> Costs:
        asked = config.model_dump(include={"model", "lora", "backbone"}, mode="json")
        key = json.dumps([asked, config.train.optimizer, sharding.is_sharded], sort_keys=True)
        if key not in self._costs:
            self._costs[key] = profile.measure(
                config, model_config, dtype, facts.targets, is_sharded=sharding.is_sharded
            )
        return self._costs[key]


def _positions(model_config: PreTrainedConfig) -> int:
    return int(getattr(model_config, "max_position_embeddings", None) or 2**31)


def _clients_per_pass(config: Config, found: Outlook) -> int:
    asked, most = config.federated.clients_per_pass, found.work.round_clients
    if asked != "auto":
        return min(most, asked or most)
    return max(1, found.work.most_clients(found.costs, found.state, found.free_bytes))


def _weights(
    config: Config,
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    stored: int,
    machine: Machine,
    sharding: Sharding,
) -> tuple[int, int, int]:
    """Bytes of the backbone on a GPU between passes, on it for a while, and in host memory."""
    if not sharding.is_sharded:
        return stored, 0, 0
    zero = deepspeed_settings(config, model_config, dtype)["zero_optimization"]
    live = int(zero.get("stage3_max_live_parameters", 1e9)) * dtype.itemsize
    share = -(-stored // machine.gpus)
    gathered = min(stored, live)
    return (0, gathered, share) if config.backbone.offload == "cpu" else (share, gathered, 0)


def remedies(config: Config, planner: Planner) -> list[str]:
    """What would make a configuration fit that does not: ``key=value``, each alone enough.

    Where nothing alone is, what does together; nothing where even that does not.
    """
    found = planner.outlook(config)
    alone = [change for change in _candidates(config, found) if _does(config, planner, [change])]
    if alone:
        return alone
    together: list[str] = []
    for change in _candidates(config, found, to_the_least=True):
        together.append(change)
        if _does(config, planner, together):
            return [" ".join(together)]
    return []


def _candidates(config: Config, found: Outlook, to_the_least: bool = False) -> Iterator[str]:
    """Changes, the one that costs least first."""
    if config.federated.clients_per_pass != "auto":  # noqa: S105  (no password)
        yield "federated.clients_per_pass=auto"
    rows = 1 if to_the_least else found.most_eval_rows(1)
    if 0 < rows < found.work.eval_rows:
        yield f"evaluation.batch_size={rows}"
    rows = 1 if to_the_least else found.most_rows(1)
    if 0 < rows < found.work.train_rows:
        yield f"train.micro_batch_size={rows}"
    if not found.sharding.is_sharded and found.machine.gpus > 1:
        yield "backbone.sharding=zero3"
    if not config.backbone.gradient_checkpointing:
        yield "backbone.gradient_checkpointing=true"
    tokens = found.most_tokens(1)
    if not to_the_least and 64 <= tokens < found.work.tokens:
        yield f"data.max_tokens={tokens}"


def _does(config: Config, planner: Planner, changes: list[str]) -> bool:
    """Whether the configuration fits with these changes."""
    data = json.loads(config.model_dump_json())
    for change in changes:
        data = config_load.overridden(data, change)
    return planner.outlook(config_load.validate(data)).fits
