"""The five ways of the bench, made on one model's weights; a step timed, a layer counted."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sfed.bench.measure import Clock, Operations, SavedBytes
from sfed.bench.peft_baseline import StockPeft
from sfed.bench.steps import Contestant, FrozenOnly, Sfed
from sfed.bench.workload import Workload, smaller
from sfed.models.synthetic import build, twin, with_layers

# Tokens of a row where only counting matters; attention kernels of GPUs fill up blocks.
_TOKENS_TO_COUNT = {"cuda": 128, "cpu": 4}


@dataclass(frozen=True)
class Variant:
    """How a contestant is made, and what it is called."""

    key: str
    name: str
    make: Callable[[PreTrainedModel, Workload, torch.Tensor], Contestant]


VARIANTS: tuple[Variant, ...] = (
    Variant("a", "HF + PEFT", StockPeft),
    Variant(
        "b",
        "PEFT, base's dtype",
        lambda model, load, ids: StockPeft(model, load, ids, autocast_adapter_dtype=False),
    ),
    Variant(
        "c",
        "sfed, one by one",
        lambda model, load, ids: Sfed(model, load, ids, clients_per_pass=1),
    ),
    Variant(
        "d",
        "sfed, one pass",
        lambda model, load, ids: Sfed(model, load, ids, clients_per_pass=load.num_clients),
    ),
    Variant("e", "frozen model", FrozenOnly),
)


def line_up(
    model: PreTrainedModel, workload: Workload, input_ids: torch.Tensor, keys: str = "abcde"
) -> dict[str, Contestant]:
    """Make the contestants by their letters, all on the weights of one model, which is left alone.

    PEFT's start from the adapters of the trainer's.
    """
    made = {
        variant.key: variant.make(twin(model), workload, input_ids)
        for variant in VARIANTS
        if variant.key in keys
    }
    ours = next((one for one in made.values() if isinstance(one, Sfed)), None)
    for one in made.values():
        if ours is not None and isinstance(one, StockPeft):
            one.start_from(ours.clients.layout, ours.clients.load_values(ours.clients.own))
    return made


def seconds_of_step(contestant: Contestant, clock: Clock, consecutive: int) -> float:
    """Seconds of one step of every client.

    Args:
        contestant: who makes them.
        clock: of the device.
        consecutive: steps that a client makes between two readings of the clock, so that the host
            may run ahead of the device, as it does in a round.
    """
    seconds = 0.0
    for turn in range(contestant.num_turns):
        contestant.enter(turn)
        start = clock.read()
        for _ in range(consecutive):
            contestant.step()
        seconds += clock.read() - start
        contestant.leave()
    return seconds / consecutive


@dataclass(frozen=True)
class Count:
    """What one layer of a contestant costs, whatever the machine's load."""

    saved_bytes: float
    """That autograd keeps, per token and layer."""
    saved_bytes_fixed: float
    """Saved bytes per client of a pass and layer, however many tokens: copies of factors."""
    operations: int
    """Operations of a forward and backward pass, per layer; views are not counted."""


def count(
    variants: Iterable[Variant], config: PreTrainedConfig, workload: Workload, device: torch.device
) -> dict[str, Count]:
    """Count saved bytes and operations on models of one and two layers of the real dimensions.

    A layer is the difference of the two; a token, the difference between one row and two. So what
    exists once for all layers, or once for all tokens, is not in it. Weights are zeros.
    """
    shapes = [with_layers(config, num_layers) for num_layers in (1, 2)]
    models = [build(shape, workload.dtype, workload.seed, device, blank=True) for shape in shapes]
    found = {variant.key: _count(variant, models, workload, device) for variant in variants}
    del models
    gc.collect()  # models refer to themselves in circles
    return found


def _count(
    variant: Variant, models: Sequence[PreTrainedModel], workload: Workload, device: torch.device
) -> Count:
    """Count for one contestant, on the models of one and of two layers."""
    tokens = min(workload.tokens, _TOKENS_TO_COUNT[device.type])
    num_clients = min(workload.num_clients, 2) if variant.key == "d" else 1
    width = num_clients * tokens
    saved: dict[tuple[int, int], int] = {}
    operations: dict[int, int] = {}
    for num_layers, model in enumerate(models, start=1):
        for rows in (2, 1):
            load = smaller(workload, num_clients, rows, tokens)
            ids = torch.zeros(num_clients * rows, tokens, dtype=torch.long, device=device)
            contestant = variant.make(twin(model), load, ids)
            contestant.enter(0)
            with SavedBytes(contestant.frozen()) as bytes_saved, Operations() as seen:
                losses = contestant.losses()
            saved[num_layers, rows] = bytes_saved.total
        with seen:
            torch.autograd.backward(losses.sum())
        operations[num_layers] = seen.count
    layer = {rows: saved[2, rows] - saved[1, rows] for rows in (1, 2)}
    slope = (layer[2] - layer[1]) / width
    return Count(
        saved_bytes=slope,
        saved_bytes_fixed=(layer[1] - slope * width) / num_clients,
        operations=operations[2] - operations[1],
    )
