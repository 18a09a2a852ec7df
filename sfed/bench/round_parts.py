"""What a round costs beside forward and backward passes, timed.

Drawing, averaging, evaluation and export; the hooks of ZeRO-3, as the same step with and without
them; and what collectives take on the links between the processes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from sfed.bench.measure import Clock, Spread, interleaved
from sfed.bench.peft_baseline import StockPeft
from sfed.bench.sharded import HookedTwin
from sfed.bench.steps import Contestant, Sfed
from sfed.bench.workload import Workload
from sfed.data import batches
from sfed.data.batches import Batch, Order
from sfed.data.packing import Packing
from sfed.data.tokenize import Examples, Tokens
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.methods import aggregation

_EXAMPLES_PER_CLIENT = 64
_SIZES_BYTES = (4 * 2**10, 256 * 2**10, 4 * 2**20, 64 * 2**20)
_CALLS = 3


@dataclass(frozen=True)
class Part:
    """One part of a round for all clients of this process."""

    name: str
    variant: str
    """Letter of the contestant whose round it belongs to."""
    in_every_step: bool
    """Otherwise once in a round."""
    seconds: Callable[[], float]
    """Does it and returns how long it took."""


def measure_parts(
    world: World,
    contestants: Mapping[str, Contestant],
    workload: Workload,
    model: PreTrainedModel,
    repeat: int,
) -> list[dict[str, Any]]:
    """Time the parts of a round in turns. Collective: all processes make equally many turns."""
    clock = Clock(world.device)
    stock, ours, paged = (contestants[key] for key in "adc")
    assert isinstance(stock, StockPeft)
    assert isinstance(ours, Sfed)
    _prepare_update(ours)
    vocabulary_size, packing = int(model.config.vocab_size), ours.backbone.packing
    assemble = _assembly(world.device, workload, vocabulary_size, None)
    pack = _assembly(world.device, workload, vocabulary_size, packing)
    varied = _varied_steps(ours, workload, vocabulary_size, clock)
    parts = [
        Part("optimizer, PEFT", "a", True, lambda: _seconds_of_updates(stock, clock)),
        Part("optimizer, sfed", "d", True, lambda: clock.seconds_of(ours.update)),
        Part("batch assembly", "d", True, lambda: clock.seconds_of(assemble)),
        Part("batch assembly, packing", "d", True, lambda: clock.seconds_of(pack)),
        Part("clients in and out, PEFT", "a", False, lambda: _seconds_of_changes(stock, clock)),
        Part("clients in and out, sfed", "c", False, lambda: _seconds_of_changes(paged, clock)),
        Part(
            "aggregation of A", "d", False, lambda: _seconds_of_mean(world, ours, workload, clock)
        ),
        Part("evaluation, same tokens", "d", False, lambda: clock.seconds_of(ours.evaluate)),
        Part("step, widths vary as packed", "d", True, varied),
    ]
    if world.size > 1:
        hooks = HookedTwin(model, workload, world)
        parts.append(Part("hooks of ZeRO-3, gathers too", "d", True, hooks.seconds))
    samples = interleaved({part.name: part.seconds for part in parts}, repeat, None)
    return [
        {
            "name": part.name,
            "variant": part.variant,
            "in_every_step": part.in_every_step,
            "seconds": Spread.of(samples[part.name]).as_json(),
        }
        for part in parts
    ]


def _prepare_update(contestant: Contestant, turn: int = 0) -> None:
    """Bring clients in and give them gradients."""
    contestant.enter(turn)
    torch.autograd.backward(contestant.losses().sum())


def _seconds_of_mean(world: World, ours: Sfed, workload: Workload, clock: Clock) -> float:
    """Seconds of the mean over all clients of all processes, who start together."""
    share = 1.0 / (world.size * workload.num_clients)
    weights = [share] * workload.num_clients
    distributed.all_reduce_sum(torch.zeros(1, device=world.device))
    return clock.seconds_of(lambda: aggregation.share(world, ours.clients, ("A",), weights))


def _seconds_of_updates(stock: StockPeft, clock: Clock) -> float:
    """Seconds of the optimizers of all clients, one after another."""
    seconds = 0.0
    for turn in range(stock.num_turns):
        _prepare_update(stock, turn)
        seconds += clock.seconds_of(stock.update)
        stock.leave()
    return seconds


def _seconds_of_changes(contestant: Contestant, clock: Clock) -> float:
    """Seconds of bringing every client in and out once."""
    seconds = 0.0
    for turn in range(contestant.num_turns):
        seconds += clock.seconds_of(lambda turn=turn: contestant.enter(turn))  # type: ignore[misc]
        seconds += clock.seconds_of(contestant.leave)
    return seconds


def _assembly(
    device: torch.device, workload: Workload, vocabulary_size: int, packing: Packing | None
) -> Callable[[], Batch]:
    """Drawing, laying out and moving one step's rows of all clients; to pack, of many lengths."""
    shortest = workload.tokens if packing is None else -(-workload.tokens // 4)
    examples = _random_examples(workload, vocabulary_size, shortest)
    orders = [Order(workload.seed, c, len(examples)) for c in range(workload.num_clients)]
    position = 0

    def assemble() -> Batch:
        nonlocal position
        drawn = [batches.draw(examples, order, position, workload.rows) for order in orders]
        position += workload.rows
        return batches.collate(drawn, workload.rows, packing=packing).to(device)

    return assemble


def _varied_steps(
    ours: Sfed, workload: Workload, vocabulary_size: int, clock: Clock
) -> Callable[[], float]:
    """Steps on rows as they come, each of another width: seconds for as many computed tokens.

    What a device has to do for a new shape is in it: kernels that are chosen anew, and gaps that
    the allocator leaves.
    """
    next_batch = _assembly(clock.device, workload, vocabulary_size, ours.backbone.packing)

    def seconds() -> float:
        batch = next_batch()
        return (
            clock.seconds_of(lambda: ours.step_on(batch)) * workload.tokens_per_step / batch.slots
        )

    return seconds


def _random_examples(workload: Workload, vocabulary_size: int, shortest: int) -> Examples:
    count = _EXAMPLES_PER_CLIENT
    generator = np.random.default_rng(workload.seed)
    lengths = generator.integers(shortest, workload.tokens + 1, size=count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    table = Tokens(
        generator.integers(vocabulary_size, size=starts[-1], dtype=np.int32),
        starts,
        np.zeros(count, dtype=np.int32),
        keys=None,
        targets=np.full(count, np.nan),
        predicts_targets=False,
        parts=("",),
        part_of_row=np.zeros(count, dtype=np.int64),
        left_out=0,
    )
    return Examples(table, np.arange(count))


def measure_collectives(world: World, a_bytes: int, repeat: int) -> list[dict[str, Any]]:
    """Time all_reduce and all_gather of fp32 buffers among the job's own processes. Collective.

    Args:
        world: at least two processes.
        a_bytes: of the message of a round, A of the configured shape.
        repeat: readings of each size and kind, interleaved.

    Returns:
        For each kind and size: the bytes of the whole buffer, seconds, and the bus rate in bytes a
        second, that is what each link must carry: 2 (W - 1) / W of the buffer for all_reduce,
        (W - 1) / W for all_gather.
    """
    # gloo carries device tensors through the host anyway, and cannot gather them.
    device = torch.device("cpu") if distributed.is_on_host() else world.device
    clock = Clock(device)
    sizes = sorted({*_SIZES_BYTES, a_bytes})
    tasks: dict[tuple[str, int], Callable[[], float]] = {}
    for size in sizes:
        whole = torch.ones(max(1, size // 4), device=device)
        share = torch.ones(max(1, size // 4 // world.size), device=device)
        for kind, call in (
            ("all_reduce", lambda whole=whole: distributed.all_reduce_sum(whole)),
            ("all_gather", lambda share=share: distributed.all_gather_flat(world, share)),
        ):
            tasks[kind, size] = lambda call=call: _seconds_of_call(world, clock, call)  # type: ignore[misc]
    named = {f"{kind} {size}": task for (kind, size), task in tasks.items()}
    samples = interleaved(named, repeat, None)
    results = []
    for kind, size in sorted(tasks):
        spread = Spread.of(samples[f"{kind} {size}"])
        carried = (2 if kind == "all_reduce" else 1) * (world.size - 1) / world.size * size
        results.append(
            {
                "kind": kind,
                "bytes": size,
                "is_a_of_a_round": size == a_bytes,
                "seconds": spread.as_json(),
                "bus_bytes_per_second": carried / spread.median,
            }
        )
    return results


def _seconds_of_call(world: World, clock: Clock, call: Callable[[], object]) -> float:
    """Seconds of one call, all processes starting together."""
    distributed.all_reduce_sum(torch.zeros(1, device=clock.device))
    start = clock.read()
    for _ in range(_CALLS):
        call()
    return (clock.read() - start) / _CALLS
