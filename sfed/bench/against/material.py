"""What the contestants work on: a model, the examples of the clients, first adapters."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from sfed.bench.against.job import LONGEST_SHARE, SEED, SIGMA_OF_LENGTHS, Job
from sfed.config.clients import settings_of
from sfed.data import batches, splits
from sfed.data.assignment.placement import Placement
from sfed.data.batches import Order
from sfed.data.splits import Data
from sfed.data.tokenize import Examples, Row, Tokens
from sfed.distributed.world import World
from sfed.lora.layout import Layout
from sfed.models.hf_config import DTYPES
from sfed.models.synthetic import build
from sfed.models.tokenizer import load_tokenizer

_EXAMPLES_PER_CLIENT = 64
_STD_OF_A = 0.05


@dataclass(frozen=True)
class Material:
    """A model, what the clients read, and the adapters that they start from."""

    job: Job
    world: World
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    data: Data
    layout: Layout
    first_a: torch.Tensor
    """(parameters of A,) of every client; B is 0."""

    def batch(self, client: int, position: int) -> list[Row]:
        """The examples of a client's step."""
        order = Order(SEED, client, len(self.data.train[client]))
        return batches.draw(self.data.train[client], order, position, self.job.rows)

    def first_values(self, layer: str, factor: str) -> torch.Tensor:
        """The factor of a layer that every client starts with."""
        piece = next(p for p in self.layout.pieces if (p.layer, p.factor) == (layer, factor))
        if factor == "B":
            return torch.zeros(piece.shape, device=self.world.device)
        return piece.within(self.layout, self.first_a).clone()


def material(job: Job, world: World) -> Material:
    """Make what a contestant works on; the same in every process."""
    dtype, tokenizer = DTYPES[job.dtype], None
    if job.data is None:
        model = build(job.shape, dtype, SEED, world.device)
        data = _random_data(job, int(model.config.vocab_size))
    else:
        tokenizer, _ = load_tokenizer(job.config, job.model)
        data = splits.load(job.config, tokenizer, world, job.num_clients, False)
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).to(world.device)
        model.requires_grad_(False)
        model.config.use_cache = False
    layout = job.layout
    generator = torch.Generator().manual_seed(SEED)
    columns = layout.columns("A")
    first_a = torch.randn(columns.stop - columns.start, generator=generator)
    first_a *= _STD_OF_A
    return Material(job, world, model.eval(), tokenizer, data, layout, first_a.to(world.device))


def _random_data(job: Job, vocabulary_size: int) -> Data:
    """Random tokens with lengths like those of GSM8K; the second half of each row is learned."""
    everyone = range(job.num_clients)
    train = {client: _random_examples(job, client, vocabulary_size) for client in everyone}
    nothing = Examples(train[0].table, np.arange(0))
    return Data(
        train=train,
        held_out=dict.fromkeys(everyone, nothing),
        train_counts=(_EXAMPLES_PER_CLIENT,) * job.num_clients,
        eval_counts=(0,) * job.num_clients,
        summary={"clients": []},
        notes=(),
        lines=(),
        used_columns=frozenset(),
        parts=("",),
        settings=settings_of(job.config, [""] * job.num_clients),
        placement=Placement((tuple(everyone),), "one process holds all"),
    )


def _random_examples(job: Job, client: int, vocabulary_size: int) -> Examples:
    generator = np.random.default_rng([SEED, client])
    drawn = job.tokens * np.exp(SIGMA_OF_LENGTHS * generator.standard_normal(_EXAMPLES_PER_CLIENT))
    lengths = np.clip(np.rint(drawn).astype(np.int64), 2, LONGEST_SHARE * job.tokens)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    table = Tokens(
        generator.integers(vocabulary_size, size=starts[-1], dtype=np.int32),
        starts,
        (lengths // 2).astype(np.int32),
        keys=None,
        targets=np.full(len(lengths), np.nan),
        predicts_targets=False,
        parts=("",),
        part_of_row=np.zeros(len(lengths), dtype=np.int64),
        left_out=0,
    )
    return Examples(table, np.arange(len(lengths)))
