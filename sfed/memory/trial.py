"""A small model with the trainer's layers, whose passes are followed to count bytes."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sfed.clients.optimizer import StackedOptimizer
from sfed.clients.state import FACTORS, MOMENTS, PassState
from sfed.config.schema import Config
from sfed.data import batches
from sfed.data.batches import Batch
from sfed.data.tokenize import Row
from sfed.lora import packed_attention
from sfed.lora.frozen import fp8
from sfed.lora.frozen.quantized import put_stand_ins
from sfed.lora.hf_blocks import patch_blocks
from sfed.memory.costs import Load
from sfed.memory.counts import attach
from sfed.memory.fake import FakeFloats
from sfed.memory.live_bytes import LiveBytes
from sfed.models import heads, synthetic
from sfed.models.backbone import Backbone, recompute_layers
from sfed.models.hf_config import Sharding, asked_attention, from_config
from sfed.models.losses import Traits
from sfed.models.objective import objective_of, why_padded

TOKENS = 16
"""Tokens of the shortest row of a trial."""
# Tokens of the short sequence of a packed row: fewer than a row's width is rounded up by.
_SHORT = 7
# So few that logits do not count: their size is known, and they would hide the layers' own.
_WORDS = 16
# What transformers would say of a model that was read from its files.
_ALL_FOUND: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}
# Autograd's names of operations that leave every number as it is.
_COPIES = ("ToCopyBackward0", "AliasBackward0", "CloneBackward0", "ViewBackward0")


@dataclass(frozen=True)
class Frozen:
    """The frozen model of a run, as far as a pass depends on it.

    How it is stored is no part of that: a pass on shards keeps what one on a replica keeps.
    """

    config: PreTrainedConfig
    """Configuration of the whole model."""
    dtype: torch.dtype
    targets: tuple[str, ...]
    """Names of the adapted layers within a layer of the transformer."""
    device: str
    """Type of the device that will train it: cpu or cuda."""

    def small(self, num_layers: int) -> PreTrainedConfig:
        """Return the same configuration with few layers and a small vocabulary."""
        small = copy.deepcopy(synthetic.with_layers(self.config, num_layers))
        for part in (small, small.get_text_config()):
            part.vocab_size = _WORDS
            part.pad_token_id = None if self.config.pad_token_id is None else 0
        return small


class Trial:
    """A model of few layers on the CPU, with the adapters of a run."""

    def __init__(
        self,
        config: Config,
        frozen: Frozen,
        num_layers: int,
        lora_rank: int,
        fake: FakeFloats | None,
    ) -> None:
        """Make the model.

        Args:
            config: of the run.
            frozen: its model.
            num_layers: of the trial.
            lora_rank: of the trial.
            fake: under which nothing is computed; None = real tensors, with zeros for weights.
        """
        self._config = config
        self._fake: AbstractContextManager[Any] = fake or nullcontext()
        with self._fake:
            self.backbone = _backbone(config, frozen, num_layers)
        self._objective = objective_of(self.backbone)
        is_padded = why_padded(config, self.backbone) is not None
        # A kernel that needs no mask for packed rows: they cost no more than padded ones. On a CPU
        # the masks of short documents are not counted: such passes hold less than long ones.
        is_told = frozen.device == "cuda" and packed_attention.is_installed(self.backbone.model)
        has_kernel = is_told or config.model.attention == "flash_attention_2"
        self.packing = None if is_padded or has_kernel else self.backbone.packing
        # Not under fake tensors: PEFT puts its own weights on the meta device.
        model, head = self.backbone.model, self.backbone.head
        self._adapters = attach(config, model, head, frozen.targets, lora_rank)

    def kept(self, load: Load) -> int:
        """Bytes that are there for the backward pass: copies of factors, and what is saved."""
        with self._forward(load) as (live, _loss):
            return live.now

    def transient(self, load: Load) -> int:
        """Bytes at the worst moment of forward and backward pass, beside what is kept."""
        with self._forward(load) as (live, loss):
            kept = live.now
            torch.autograd.backward(loss)
            return live.peak - kept

    @contextmanager
    def _forward(self, load: Load) -> Iterator[tuple[LiveBytes, torch.Tensor]]:
        """Make a forward pass with gradients; gives what counts its bytes, and its loss."""
        self.backbone.training()
        with self._fake:
            rows, batch, live = self._rows(load.clients), self.batch(load), LiveBytes()
            if self._config.lora.dropout > 0.0:
                batch = batch.with_keys(range(load.clients))
            self._adapters.context.token_keys = batch.token_keys
            with live:
                self._adapters.bind(rows.values, rows.grads, FACTORS)
                yield live, self._objective.losses(batch).sum()

    def evaluated(self, load: Load) -> int:
        """Bytes at the worst moment of a forward pass without gradients."""
        live = LiveBytes()
        with self._fake:
            rows, batch = self._rows(load.clients), self.batch(load)
            self._adapters.context.token_keys = None
            self.backbone.evaluating()
            with torch.no_grad(), live:
                self._adapters.bind(rows.values)
                self._objective.losses(batch)
        return live.peak

    def optimised(self) -> float:
        """Bytes at the worst moment of an optimizer step, per parameter of an adapter."""
        layout = self._adapters.layout
        stacked = StackedOptimizer(self._config.train, layout, layout.factors)
        live = LiveBytes()
        with self._fake:
            rows, once = self._rows(1), torch.ones(1)
            with live:
                norms = stacked.gradient_norms(rows)
                stacked.step(rows, once, norms, once.bool())
        return live.peak / layout.size

    def _rows(self, clients: int) -> PassState:
        shape = (clients, self._adapters.layout.size)
        names = MOMENTS if self._config.train.optimizer == "adamw" else ()
        moments = {name: torch.zeros(shape) for name in names}
        steps = torch.zeros(clients, len(FACTORS))
        return PassState(
            tuple(range(clients)), torch.zeros(shape), torch.zeros(shape), moments, steps
        )

    def batch(self, load: Load) -> Batch:
        """Rows that are shorter than the batch is wide: attention may then need a mask.

        Where the run packs, each row holds two sequences.
        """
        part = load.tokens // TOKENS
        if self.packing is None:
            target = None if self.backbone.head is None else 0.0
            row = Row(np.zeros(load.tokens - part, dtype=np.int32), part, target)
            return self._objective.collate([[row] * load.rows] * load.clients, load.rows)
        lengths = [load.tokens - _SHORT, _SHORT] * load.rows
        rows = [Row(np.zeros(length, dtype=np.int32), part, None) for length in lengths]
        as_wide = replace(self.packing.all_in_one()[0], widest=load.tokens)
        return batches.collate([rows] * load.clients, len(rows), as_wide)


def _backbone(config: Config, frozen: Frozen, num_layers: int) -> Backbone:
    """The frozen model as ``models.backbone.load`` makes it, but with zeros for weights."""
    asked = asked_attention(config)
    with no_init_weights():
        model = from_config(
            config,
            # flash-attn, which needs a GPU, keeps what the fused kernel of torch keeps.
            frozen.small(num_layers),
            dtype=frozen.dtype,
            attn_implementation="sdpa" if asked == "flash_attention_2" else asked,
        )
    model.tie_weights()
    synthetic.fill_with_zeros(model)
    if config.model.quantization != "none":
        put_stand_ins(model, config.model.quantization, frozen.dtype)
    if config.backbone.compute == "fp8":
        fp8.convert(model)
    model.requires_grad_(False)
    patch_blocks(model)
    head = heads.detach_head(config, model, _ALL_FOUND, lambda _: nullcontext())
    if config.backbone.gradient_checkpointing:
        recompute_layers(model)
    if asked is None:
        packed_attention.install(model, torch.device(frozen.device))
    traits = None if head else Traits(keeps_documents_apart=True, returns_logits=_returns(model))
    return Backbone(model, head, Sharding("none", "a trial"), None, traits)


def _returns(model: PreTrainedModel) -> bool:
    """Whether the model returns its head's output as it is, and not scaled or capped.

    Told by the operations between the two, since the weights of a trial hold nothing.
    """
    hook = model.get_output_embeddings().register_forward_hook(
        lambda _head, _inputs, output: output.detach().requires_grad_()
    )
    try:
        ids = torch.zeros(1, TOKENS, dtype=torch.long)
        node = model(input_ids=ids, use_cache=False).logits.grad_fn
    finally:
        hook.remove()
    while node is not None and node.name() in _COPIES:
        node = node.next_functions[0][0]
    return node is None or node.name().endswith("AccumulateGrad")
