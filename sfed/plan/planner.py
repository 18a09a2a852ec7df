"""What a run will need and how long a round will take, before any weight is there."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from transformers import PreTrainedConfig

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.data.partition import place
from sfed.files.silos import num_clients_of
from sfed.memory import clients_per_pass, counts, profile
from sfed.memory.clients_per_pass import ClientsPerPass, Estimate
from sfed.memory.costs import USABLE_SHARE, ClientState, Costs, Needs, Work, largest
from sfed.memory.counts import ModelCounts
from sfed.memory.trial import Frozen
from sfed.models import shapes
from sfed.models.deepspeed import deepspeed_settings, most_gathered_bytes
from sfed.models.hf_config import DTYPES, MetaModel, Sharding, resolve_sharding
from sfed.plan.request import Machine

# The driver's context, kernels and the buffers of NCCL: an assumption.
CONTEXT_BYTES = 2**30
_MOST_ROWS, _MOST_CLIENTS = 2**12, 2**16


@dataclass(frozen=True)
class BackboneBytes:
    """Where the frozen weights are."""

    stored: int
    """Bytes of the whole backbone; of a sharded one, those that are shared out."""
    device: int
    """Bytes of the backbone that stay on each GPU between passes."""
    gathered: int = 0
    """Bytes of the backbone that a pass gathers on each GPU."""
    host: int = 0
    """Bytes of the backbone in host memory, for each GPU."""


@dataclass(frozen=True)
class MemoryPlan:
    """The memory of one GPU: of one that holds the most clients."""

    machine: Machine
    model_config: PreTrainedConfig
    num_clients: int
    counts: ModelCounts
    costs: Costs
    sharding: Sharding
    backbone: BackboneBytes
    work: Work
    state: ClientState
    clients_per_pass: int
    limit: ClientsPerPass | None = None
    """As many as fit, where a run takes fewer if these are as fast; None where it does not."""

    @property
    def free_bytes(self) -> int:
        """What is left for clients and passes."""
        return max(0, self.machine.memory_bytes - self._taken_bytes)

    @property
    def _taken_bytes(self) -> int:
        return CONTEXT_BYTES + self.backbone.device + self.backbone.gathered

    @property
    def needs(self) -> Needs:
        """Memory of the planned passes."""
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
        return self._taken_bytes + round(self.needs.total / USABLE_SHARE)

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
        """Most rows per client that fit in an evaluation pass."""

        def fits(rows: int) -> bool:
            return self._fits(dataclasses.replace(self.work, eval_rows=rows), clients)

        return largest(fits, _MOST_ROWS)

    def most_tokens(self, clients: int) -> int:
        """The longest row for passes of so many clients."""

        def fits(tokens: int) -> bool:
            return self._fits(dataclasses.replace(self.work, tokens=tokens), clients)

        return largest(fits, self.work.tokens)


class Planner:
    """Predicts configurations for one machine; what has been found out once is kept."""

    def __init__(self, machine: Machine, say: Callable[[str], None]) -> None:
        """Make a planner.

        Args:
            machine: the GPUs.
            say: told what is under way, before it takes time.
        """
        self._machine, self._say = machine, say
        self._models: dict[str, tuple[MetaModel, ModelCounts]] = {}
        self._costs: dict[str, Costs] = {}

    def outlook(self, config: Config) -> MemoryPlan:
        """Predict the memory of a configuration.

        Raises:
            UserError: where the model or a target of the adapters is not to be found.
        """
        machine, dtype = self._machine, DTYPES[_dtype_name(config)]
        meta, counted = self._counted(config)
        stored = counted.stored.bytes(dtype)
        sharding = resolve_sharding(
            config.backbone, machine.gpus, lambda: (stored, machine.memory_bytes - CONTEXT_BYTES)
        )
        num_clients = num_clients_of(config) or machine.gpus
        # Unequal clients are dealt by work, which is in the data: a GPU may then hold more of them.
        own = max(map(len, place(num_clients, machine.gpus)))
        tokens = min(config.data.max_tokens, _positions(meta.config))
        frozen = Frozen(meta.config, dtype, counted.targets, "cuda")
        found = MemoryPlan(
            machine=machine,
            model_config=meta.config,
            num_clients=num_clients,
            counts=counted,
            costs=self._measured(config, frozen),
            sharding=sharding,
            backbone=BackboneBytes(stored, device=stored),
            work=clients_per_pass.work_of(config, own, tokens),
            state=clients_per_pass.state_of(config, counted.numbers),
            clients_per_pass=1,
        )
        if sharding.is_sharded:
            found = dataclasses.replace(found, backbone=_shards(config, meta, found))
        sharing = clients_per_pass.planned(
            config, Estimate(found.work, found.costs), counted.numbers, found.free_bytes
        )
        clients = sharing.of(range(found.work.round_clients))
        is_free = sharing.is_limit and clients > 1 and not sharding.is_sharded
        return dataclasses.replace(
            found, clients_per_pass=clients, limit=sharing if is_free else None
        )

    def _counted(self, config: Config) -> tuple[MetaModel, ModelCounts]:
        """The model and its counts."""
        key = _key(config)
        if key not in self._models:
            self._say(f"counting the weights of {config.model.name}")
            meta = MetaModel(config, shapes.shape_of(config))
            self._models[key] = meta, counts.counts_of(config, meta)
        return self._models[key]

    def _measured(self, config: Config, frozen: Frozen) -> Costs:
        """What a pass costs."""
        backbone = config.backbone.model_dump_json()
        key = "".join((_key(config), backbone, config.train.optimizer))
        if key not in self._costs:
            how = " (checkpointed)" if config.backbone.gradient_checkpointing else ""
            self._say(f"following a pass through two layers of {config.model.name}{how}")
            self._costs[key] = profile.measure(config, frozen, self._say)
        return self._costs[key]


def _key(config: Config) -> str:
    """What tells the model and its adapters from others."""
    return config.model_dump_json(
        include={
            "model": True,
            "lora": True,
            "data": {"task": True, "name": True, "packing": True},
            "backbone": {"compute": True},
        }
    )


def _dtype_name(config: Config) -> str:
    return "bf16" if config.model.dtype == "auto" else config.model.dtype


def _positions(model_config: PreTrainedConfig) -> int:
    return int(getattr(model_config, "max_position_embeddings", None) or 2**31)


def _shards(config: Config, meta: MetaModel, found: MemoryPlan) -> BackboneBytes:
    """Where the weights are that all GPUs share; each has all scales of quantised ones."""
    dtype, gpus = DTYPES[_dtype_name(config)], found.machine.gpus
    stored, scales = found.counts.stored.sharded_bytes(dtype), found.counts.stored.scale_bytes
    settings = deepspeed_settings(config, meta, dtype)
    gathered = min(stored, most_gathered_bytes(settings, meta.model, dtype))
    share = -(-stored // gpus)
    secondary = min(gpus, int(settings["zero_optimization"].get("zero_hpz_partition_size", 1)))
    share += -(-stored // secondary) if secondary > 1 else 0
    on_host = config.backbone.offload == "cpu"
    device, host = (0, share) if on_host else (share, 0)
    return BackboneBytes(stored, device + scales, gathered, host)


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


def _candidates(config: Config, found: MemoryPlan, to_the_least: bool = False) -> Iterator[str]:
    """Changes, the one that costs least first."""
    if config.federated.clients_per_pass != "auto":  # noqa: S105  (no password)
        yield "federated.clients_per_pass=auto"
    rows = 1 if to_the_least else found.most_eval_rows(1)
    if 0 < rows < found.work.eval_rows:
        yield f"evaluation.batch_size={rows}"
    rows = 1 if to_the_least else found.most_rows(1)
    if 0 < rows < found.work.train_rows:
        yield f"train.micro_batch_size={rows}"
    may_shard = not found.sharding.is_sharded and config.backbone.compute == "full"
    if may_shard and found.machine.gpus > 1:
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
