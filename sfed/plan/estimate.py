"""The plan of a run as plain data: memory by part, what fits, time and bytes of a round.

Time is arithmetic: operations, bytes on the links, and stated assumptions.

    operations per token = 4 P + 6 s d L + 6 (parameters of A and B)  [+ 2 P + 2 s d L + 2 (...)]

P weights of the matrix products (forward 2 P, gradients of inputs 2 P, frozen weights get none), s
tokens of a row, d width, L layers: attention, causal; twice as much where it is not. In brackets
what gradient checkpointing computes again.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sfed.config.clients import largest_batch, largest_rank, may_have_mixed_ranks, most_steps
from sfed.config.schema import Config
from sfed.data.tasks import task_of
from sfed.memory.costs import USABLE_SHARE
from sfed.memory.knee import Reading, Typical, sizes_up_to, smallest_good
from sfed.memory.pass_time import GPU, PassTime, Trained
from sfed.methods import method as methods
from sfed.plan.checks import check_plan
from sfed.plan.planner import CONTEXT_BYTES, MemoryPlan, Planner, remedies
from sfed.plan.request import LINKS, Machine, Pace
from sfed.privacy import mean as private_mean
from sfed.storage import origin
from sfed.utils.errors import ConfigError
from sfed.utils.text import parse_size

# Of the datasheet's rate; good public LoRA steps reach 37 to 45 % of it on an H100.
USED_SHARE = 0.4
# A pass takes at least this long for each layer: a guess at what eager kernel launches cost.
LAUNCH_SECONDS_PER_LAYER = 1.25e-3


@dataclass(frozen=True)
class Pass:
    """One pass through the backbone on one GPU."""

    rows: int
    tokens: int
    """Tokens of a row, padding included."""
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

    A few passes through two layers of the model are followed with fake tensors: seconds of CPU.

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
    config = origin.adopted(config)
    check_plan(config, gpus)
    return predict(config, Machine(gpus, memory_bytes, link), Pace(), lambda _: None)


def predict(
    config: Config, machine: Machine, pace: Pace, say: Callable[[str], None]
) -> dict[str, Any]:
    """Plan a run that has been checked; see ``estimate``.

    Args:
        config: of the run.
        machine: the GPUs.
        pace: what is known of its speed.
        say: told what is under way.

    Raises:
        UserError: where the model or a target of the adapters is not to be found.
    """
    planner = Planner(machine, say)
    found = planner.outlook(config)
    return {
        **_asked(config, found),
        **_memory(config, found),
        "auto_clients_per_pass": _auto(config, found, pace),
        "upload": _upload(config, found),
        "round": _round(config, found, pace),
        "remedies": [] if found.fits else remedies(config, planner),
    }


def _asked(config: Config, found: MemoryPlan) -> dict[str, Any]:
    """The model, the adapters, the GPUs and the clients."""
    return {
        "model": config.model.name,
        "weights": found.counts.num_weights,
        "adapter_numbers": found.counts.numbers,
        "lora_rank": largest_rank(config),
        "mixed_ranks": may_have_mixed_ranks(config),
        "targets": config.lora.target_modules,
        "gpus": found.machine.gpus,
        "gpu_memory_bytes": found.machine.memory_bytes,
        "num_clients": found.num_clients,
    }


def _memory(config: Config, found: MemoryPlan) -> dict[str, Any]:
    """Bytes by part, and what fits."""
    needs, backbone, change = found.needs, found.backbone, _change_bytes(config, found)
    return {
        "work": dataclasses.asdict(found.work),
        "clients_per_pass": found.clients_per_pass,
        "sharding": dataclasses.asdict(found.sharding),
        "context_bytes": CONTEXT_BYTES,
        "backbone_bytes": backbone.device,
        "gathered_bytes": backbone.gathered,
        "needs": {**dataclasses.asdict(needs), "training": needs.training, "total": needs.total},
        "kept_per_token_and_layer": found.costs.kept_by_layer.per_token,
        "spare_for_gaps_bytes": round(needs.total * (1 / USABLE_SHARE - 1)),
        "needed_bytes": found.smallest_gpu_bytes,
        "fits": found.fits,
        "most_clients_per_pass": found.most_clients,
        "most_rows_per_client_and_pass": found.most_rows(found.clients_per_pass),
        "host_bytes": _host_bytes(found) + _original_bytes(config, found) + change,
        "checkpoint_bytes": found.num_clients * found.state.resting_bytes + change,
    }


def _host_bytes(found: MemoryPlan) -> int:
    """Host memory of each process: offloaded shards and inactive clients.

    While a checkpoint is written, the state that it reads is there beside that of the next round.
    """
    work = found.work
    rests = found.clients_per_pass < work.own_clients or found.limit is not None
    held = work.own_clients + work.round_clients
    return found.backbone.host + (held * found.state.resting_bytes if rests else 0)


def _cohort(config: Config, found: MemoryPlan) -> int:
    """Clients that train in a round, on all processes."""
    return min(config.federated.clients_per_round or found.num_clients, found.num_clients)


def _change_bytes(config: Config, found: MemoryPlan) -> int:
    """At most what has been added to frozen weights in all rounds: factors, or matrices."""
    if not methods.resolve(config).changes_base:
        return 0
    counted = found.counts
    of_round = _cohort(config, found) * (counted.a_numbers + counted.b_numbers)
    return 4 * min(config.federated.num_rounds * of_round, counted.adapted_weights)


def _original_bytes(config: Config, found: MemoryPlan) -> int:
    """Host memory of the original weights that a method changes."""
    if not methods.resolve(config).changes_base:
        return 0
    size = found.backbone.stored // found.counts.num_weights
    processes = found.machine.gpus if found.sharding.is_sharded else 1
    return found.counts.adapted_weights * size // processes


def _upload(config: Config, found: MemoryPlan) -> dict[str, Any]:
    """What a process sends in the first round: bytes, and the seconds that it takes."""
    method, counted, machine = methods.resolve(config), found.counts, found.machine
    numbers = {"A": counted.a_numbers, "B": counted.b_numbers}
    factors: list[str] = list(method.averaged_in(0))
    adapter = 4 * sum(numbers[factor] for factor in factors)
    has_head = config.federated.share_head and counted.head_numbers > 0
    head = 4 * counted.head_numbers if has_head else 0
    has_controls = config.federated.scaffold
    controls = sum(4 * numbers[f] for f in factors if f in method.received) + head
    mean, exchanged, given = adapter + head + controls * has_controls, 0, 0
    if method.server_step is not None:
        mean, exchanged, given = head, found.work.round_clients * adapter, adapter
        if method.changes_base:  # of rank n r, so as large as the adapters of n clients
            given += _cohort(config, found) * 4 * (counted.a_numbers + counted.b_numbers)
    if config.privacy.is_on:
        mean = private_mean.message_bytes(config, (adapter + head) // 4)
    bandwidth = LINKS[machine.link]
    others = (machine.gpus - 1) / machine.gpus / bandwidth
    return {
        "factors": [*factors, *["head"] * has_head, *["control variates"] * has_controls],
        "changes_weights": method.changes_base,
        "bytes": mean + exchanged + -(-given // machine.gpus),
        "seconds": reduce_seconds(mean, machine.gpus, bandwidth) + (exchanged + given) * others,
    }


def _round(config: Config, found: MemoryPlan, pace: Pace) -> dict[str, Any]:
    """Seconds of a round's local steps and of its mean; None where epochs decide on the steps."""
    machine, work = found.machine, found.work
    one = _pass(config, found, pace)
    computing = one.seconds(USED_SHARE * machine.datasheet_flops)
    if pace.tokens_per_second is not None:
        computing = one.rows * one.tokens / pace.tokens_per_second
    bandwidth = LINKS[machine.link]
    gathering = 0.0
    if found.sharding.is_sharded:
        stored = found.backbone.stored
        gathering = gather_seconds(stored, machine.gpus, bandwidth, one.recomputes)
    groups = -(-work.round_clients // found.clients_per_pass)
    passes = groups * -(-largest_batch(config) // work.train_rows)
    steps = most_steps(config)
    mean = _upload(config, found)["seconds"]
    per_step = passes * max(computing, gathering)
    return {
        "tokens_per_row": one.tokens,
        "passes_per_step": passes,
        "compute_seconds_per_pass": computing,
        "gather_seconds_per_pass": gathering,
        "seconds_per_step": per_step,
        "steps": steps,
        "mean_seconds": mean,
        "seconds": None if steps is None else steps * per_step + mean,
        "link": machine.link,
        "link_bytes_per_second": bandwidth,
        "tokens_per_second": pace.tokens_per_second,
        "used_share": USED_SHARE,
        "datasheet_flops_per_second": machine.datasheet_flops,
    }


def _auto(config: Config, found: MemoryPlan, pace: Pace) -> dict[str, Any] | None:
    """What ``federated.clients_per_pass: auto`` takes of rows of one length; None = what fits."""
    if found.limit is None:
        return None
    one, rows, clients = _pass(config, found, pace), largest_batch(config), found.work.round_clients
    trained = Trained(
        one.num_layers,
        one.hidden_size,
        one.matmul_weights,
        found.backbone.stored // found.counts.num_weights,
        one.adapter_numbers,
        one.recomputes,
    )
    reading = Reading(config.seed, (), config.train.micro_batch_size, packing=None)
    steps = Typical(reading, PassTime.of(trained, GPU), [[[one.tokens] * rows] * clients])
    sizes = sizes_up_to(found.clients_per_pass, clients)
    rates = {size: steps.tokens / steps.seconds(size) for size in sizes}
    chosen = smallest_good(found.limit, rates)
    return {
        "clients_per_pass": chosen.of(range(clients)),
        "tokens_per_row": one.tokens,
        "reason": chosen.reason,
    }


def _pass(config: Config, found: MemoryPlan, pace: Pace) -> Pass:
    """One pass of as many clients as share one."""
    text, work = found.model_config.get_text_config(), found.work
    return Pass(
        rows=found.clients_per_pass * work.train_rows,
        tokens=min(pace.mean_tokens or work.tokens, work.tokens),
        matmul_weights=found.counts.matmul_weights,
        adapter_numbers=found.counts.a_numbers + found.counts.b_numbers,
        hidden_size=int(text.hidden_size),
        num_layers=int(text.num_hidden_layers),
        is_causal=not task_of(config).is_classification,
        recomputes=config.backbone.gradient_checkpointing,
    )
