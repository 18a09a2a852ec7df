"""The plan of a run as plain data: memory by part, what fits, time and bytes of a round.

Time is arithmetic: operations, bytes on the links, and stated assumptions.

    operations per token = 4 P + 6 s d L + 6 (numbers of A and B)       [+ 2 P + 2 s d L + 2 (...)]

P weights of the matrix products (forward 2 P, gradients of inputs 2 P, frozen weights get none), s
tokens of a row, d width, L layers: attention, causal; twice as much where it is not. In brackets
what gradient checkpointing computes again.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from sfed.config.schema import DEFAULT_LOCAL_STEPS, Config
from sfed.data.tasks import task_of
from sfed.memory.costs import USABLE_SHARE
from sfed.methods import method as methods
from sfed.models import shapes
from sfed.plan.checks import check_plan
from sfed.plan.planner import CONTEXT_BYTES, Machine, Outlook, Planner, remedies
from sfed.utils.errors import ConfigError
from sfed.utils.text import parse_size

# Of the datasheet's rate; good public LoRA steps reach 37 to 45 % of it on an H100.
USED_SHARE = 0.4
H100_FLOPS = 989e12
"""Of its datasheet: dense, bf16."""
# A pass takes at least this long for each layer: a guess at what eager kernel launches cost.
LAUNCH_SECONDS_PER_LAYER = 1.25e-3
# Bytes per second of one GPU in a ring of all: NVLink as measured on 8 x H200, PCIe 5 x16 and
# 100 Gbit/s Ethernet by what the link carries.
LINKS = {"nvlink": 361e9, "pcie": 55e9, "100gbe": 12.5e9}


@dataclass(frozen=True)
class Pass:
    """One pass through the backbone on one GPU."""

    rows: int
    tokens: int
    """Of a row, padding included."""
    matmul_weights: int
    adapter_numbers: int
    """A and B of one client."""
    hidden_size: int
    num_layers: int
    is_causal: bool
    recomputes: bool
    """Whether gradient checkpointing is on."""

    @property
    def operations(self) -> float:
        """FLOPs of the pass."""
        scores = self.tokens * self.hidden_size * self.num_layers * (1 if self.is_causal else 2)
        of_token = 4.0 * self.matmul_weights + 6.0 * (scores + self.adapter_numbers)
        if self.recomputes:
            of_token += 2.0 * (self.matmul_weights + scores + self.adapter_numbers)
        return of_token * self.rows * self.tokens

    def seconds(self, flops_per_second: float) -> float:
        """Seconds of computing."""
        launches = LAUNCH_SECONDS_PER_LAYER * self.num_layers
        return max(self.operations / flops_per_second, launches)


def gather_seconds(stored_bytes: int, num_gpus: int, bandwidth: float, recomputes: bool) -> float:
    """What ZeRO-3 takes to bring the weights to a GPU, once for each time that a pass reads them.

    Args:
        stored_bytes: of the whole backbone.
        num_gpus: that share it.
        bandwidth: bytes per second of a GPU.
        recomputes: whether gradient checkpointing reads the weights once more.
    """
    times = 3 if recomputes else 2
    return times * stored_bytes * (num_gpus - 1) / num_gpus / bandwidth


def reduce_seconds(message_bytes: int, num_gpus: int, bandwidth: float) -> float:
    """What the mean of a round takes: an all_reduce in a ring."""
    return 2 * message_bytes * (num_gpus - 1) / num_gpus / bandwidth


def estimate(
    config: Config, *, gpus: int = 8, gpu_memory: str = "80GiB", link: str = "nvlink"
) -> dict[str, Any]:
    """Predict memory and time of a run; no GPU is touched and no weights are read.

    Args:
        config: the run.
        gpus: number of GPUs, with one process on each.
        gpu_memory: memory of each GPU, such as 80GiB.
        link: between the GPUs: nvlink, pcie or 100gbe.

    Returns:
        What ``sfed plan --json`` writes, such as ``fits``, ``needed_bytes`` (per GPU),
        ``clients_per_pass`` and ``round`` (seconds). Times assume the datasheet rate of an H100.

    Raises:
        ConfigError: where the configuration and the arguments exclude each other.
        UserError: where the model or a target of the adapters is not found.
    """
    memory_bytes = parse_size(gpu_memory)
    if memory_bytes is None:
        raise ConfigError(f"gpu_memory = {gpu_memory!r} is no size such as 80GiB")
    if link not in LINKS:
        raise ConfigError(f"link = {link!r}: it is one of {', '.join(LINKS)}")
    check_plan(config, gpus)
    return predict(
        config,
        gpus=gpus,
        memory_bytes=memory_bytes,
        link=link,
        datasheet_flops=H100_FLOPS,
        mean_tokens=None,
        tokens_per_second=None,
    )


def predict(
    config: Config,
    *,
    gpus: int,
    memory_bytes: int,
    link: str,
    datasheet_flops: float,
    mean_tokens: int | None,
    tokens_per_second: float | None,
) -> dict[str, Any]:
    """Predict a run.

    Args:
        config: of the run.
        gpus: all alike, a process on each.
        memory_bytes: of each.
        link: between them, one of ``pace.LINKS``.
        datasheet_flops: per second, dense, in the backbone's dtype.
        mean_tokens: of a row, for times; None = the longest.
        tokens_per_second: of a GPU, in place of the assumed share of the datasheet's rate.

    Raises:
        UserError: where the model or a target of the adapters is not to be found.
    """
    planner = Planner(Machine(gpus, memory_bytes, link, datasheet_flops))
    found = planner.outlook(config)
    needs = found.needs
    return {
        "model": config.model.name,
        "weights": found.facts.num_weights,
        "adapter_numbers": found.facts.numbers,
        "lora_rank": config.lora.rank,
        "targets": config.lora.target_modules,
        "gpus": gpus,
        "gpu_memory_bytes": memory_bytes,
        "num_clients": found.num_clients,
        "work": dataclasses.asdict(found.work),
        "clients_per_pass": found.clients_per_pass,
        "sharding": dataclasses.asdict(found.sharding),
        "context_bytes": CONTEXT_BYTES,
        "backbone_bytes": found.device_bytes,
        "gathered_bytes": found.gathered_bytes,
        "needs": {**dataclasses.asdict(needs), "training": needs.training, "total": needs.total},
        "kept_per_token_and_layer": found.costs.kept_by_layer.per_token,
        "spare_for_gaps_bytes": round(needs.total * (1 / USABLE_SHARE - 1)),
        "needed_bytes": found.smallest_gpu_bytes,
        "fits": found.fits,
        "most_clients_per_pass": found.most_clients,
        "most_rows_per_client_and_pass": found.most_rows(found.clients_per_pass),
        "host_bytes": _host_bytes(found),
        "checkpoint_bytes": found.num_clients * found.state.resting_bytes,
        "upload": _upload(config, found),
        "round": _round(config, found, mean_tokens, tokens_per_second),
        "remedies": [] if found.fits else remedies(config, planner),
    }


def _host_bytes(found: Outlook) -> int:
    """Of each process: shards that are offloaded, and clients that rest."""
    rests = found.clients_per_pass < found.work.own_clients
    resting = found.work.own_clients * found.state.resting_bytes if rests else 0
    return found.host_bytes + resting


def _upload(config: Config, found: Outlook) -> dict[str, Any]:
    """What a process sends in the first round."""
    factors: list[str] = list(methods.resolve(config).averaged_in(0))
    facts = found.facts
    numbers = {"A": facts.a_numbers, "B": facts.b_numbers, "head": facts.head_numbers}
    factors += ["head"] if config.federated.share_head and facts.head_numbers else []
    return {"factors": factors, "bytes": 4 * sum(numbers[factor] for factor in factors)}


def _round(
    config: Config, found: Outlook, mean_tokens: int | None, tokens_per_second: float | None
) -> dict[str, Any]:
    """Seconds of a round's local steps and of its mean; None where epochs decide on the steps."""
    machine, work, train = found.machine, found.work, config.train
    model_config = shapes.shape_of(config)
    tokens = min(mean_tokens or work.tokens, work.tokens)
    one = Pass(
        rows=found.clients_per_pass * work.train_rows,
        tokens=tokens,
        matmul_weights=found.facts.matmul_weights,
        adapter_numbers=found.facts.a_numbers + found.facts.b_numbers,
        hidden_size=int(model_config.hidden_size),
        num_layers=int(model_config.num_hidden_layers),
        is_causal=not task_of(config).is_classification,
        recomputes=config.backbone.gradient_checkpointing,
    )
    computing = one.seconds(USED_SHARE * machine.datasheet_flops)
    if tokens_per_second is not None:
        computing = one.rows * tokens / tokens_per_second
    bandwidth = LINKS[machine.link]
    gathering = 0.0
    if found.sharding.is_sharded:
        gathering = gather_seconds(found.stored_bytes, machine.gpus, bandwidth, one.recomputes)
    groups = -(-work.round_clients // found.clients_per_pass)
    passes = groups * -(-train.batch_size // work.train_rows)
    steps = None if train.local_epochs else train.local_steps or DEFAULT_LOCAL_STEPS
    uploaded = _upload(config, found)["bytes"]
    mean = reduce_seconds(uploaded, machine.gpus, bandwidth)
    per_step = passes * max(computing, gathering)
    return {
        "tokens_per_row": tokens,
        "passes_per_step": passes,
        "compute_seconds_per_pass": computing,
        "gather_seconds_per_pass": gathering,
        "seconds_per_step": per_step,
        "steps": steps,
        "mean_seconds": mean,
        "seconds": None if steps is None else steps * per_step + mean,
        "link": machine.link,
        "link_bytes_per_second": bandwidth,
        "tokens_per_second": tokens_per_second,
        "used_share": USED_SHARE,
        "datasheet_flops_per_second": machine.datasheet_flops,
    }
