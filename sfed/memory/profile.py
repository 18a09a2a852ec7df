"""What a pass of a model costs in memory, measured on one and on two of its layers.

The trainer's own pass runs on a CPU, with zeros for weights and few tokens, and every tensor that
it makes is counted. Bytes are linear in layers, clients and rows and quadratic in the tokens of a
row, so five passes through each of two models tell all. No weights are read and no GPU is touched,
and what changes in the trainer changes the outcome by itself.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.autograd import Function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from sfed.clients.optimizer import StackedOptimizer
from sfed.clients.state import FACTORS, MOMENTS, Rows
from sfed.config.schema import Config
from sfed.data.batches import Batch
from sfed.data.tasks import task_of
from sfed.data.tokenize import Row
from sfed.lora.hf_blocks import make_lean
from sfed.memory.costs import Cost, Costs, Load
from sfed.memory.counts import attach
from sfed.models import heads, synthetic
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding, auto_class
from sfed.models.objective import objective_of

_TOKENS = 16
# So few that logits do not count: their size is known, and they would hide the layers' own.
_WORDS = 16
_SMALLEST_RANK = 2  # at 1 torch warns of how gradients lie in memory
_ALL = 2**62
# The fewest passes that tell apart what grows with clients, rows and tokens.
_LOADS = (
    Load(1, 1, _TOKENS),
    Load(1, 2, _TOKENS),
    Load(2, 1, _TOKENS),
    Load(1, 1, 2 * _TOKENS),
    Load(1, 2, 2 * _TOKENS),
)

# What transformers would say of a model that was read from its files.
_ALL_FOUND: dict[str, list[str]] = {"missing_keys": [], "mismatched_keys": []}


def measure(
    config: Config,
    model_config: PreTrainedConfig,
    dtype: torch.dtype,
    targets: tuple[str, ...],
    *,
    is_sharded: bool,
) -> Costs:
    """Make the passes and tell the parts from each other.

    Args:
        config: of the run.
        model_config: of the whole model.
        dtype: of the backbone.
        targets: names of the adapted layers within a layer of the transformer.
        is_sharded: ZeRO-3 keeps the input of every linear layer for the backward pass.
    """
    num_layers = int(model_config.num_hidden_layers)
    lora_rank = config.lora.rank

    def make(count: int, lora_rank: int) -> _Trial:
        shape = _small(model_config, count)
        return _Trial(config, shape, dtype, targets, lora_rank, keeps_inputs=is_sharded)

    # With the smallest adapters next to nothing is a client's and all is a token's.
    one, two, thin = make(1, lora_rank), make(2, lora_rank), make(1, _SMALLEST_RANK)
    of_one, of_two = (_cost([trial.kept(load) for load in _LOADS]) for trial in (one, two))
    of_layer = of_two.plus(of_one, -1)
    words = 0 if task_of(config).is_classification else int(model_config.vocab_size)
    in_chunks = one.backbone.logits_at_a_time(words)
    return Costs(
        kept=of_one.plus(of_layer, num_layers - 1),
        kept_by_layer=of_layer,
        transient=_most(one.transient, thin.transient),
        forward=_most(one.evaluated, thin.evaluated),
        logits_per_token=words * _bytes_per_logit(dtype, in_chunks=in_chunks is not None),
        logits_at_a_time=in_chunks or _ALL,
        cache_per_token=num_layers * _keys_and_values(model_config) * dtype.itemsize,
        optimizer_per_number=one.optimised(),
    )


def _small(model_config: PreTrainedConfig, num_layers: int) -> PreTrainedConfig:
    """The same layers, but few of them and few words."""
    small = copy.deepcopy(synthetic.with_layers(model_config, num_layers))
    small.vocab_size = _WORDS
    small.pad_token_id = None if model_config.pad_token_id is None else 0
    return small


def _bytes_per_logit(dtype: torch.dtype, *, in_chunks: bool) -> int:
    """Of a logit, itself and its log-softmax in fp32; and a gradient, where it is made later."""
    own = dtype.itemsize + (0 if dtype == torch.float32 else 4)
    return own + (4 if in_chunks else 8)


def _keys_and_values(model_config: PreTrainedConfig) -> int:
    """Numbers that a layer remembers of a token while answers are written."""
    query_heads = model_config.num_attention_heads
    num_heads = getattr(model_config, "num_key_value_heads", None) or query_heads
    width = getattr(model_config, "head_dim", None) or model_config.hidden_size // query_heads
    return 2 * int(num_heads) * int(width)


def _cost(values: Sequence[int]) -> Cost:
    """Solve for the parts of a cost, from its values for ``_LOADS``."""
    base, second_row, second_client, long_row, second_long_row = values
    row = second_row - base
    # A row of T tokens costs T t + T^2 q, and T positions p once for all rows.
    per_square = (second_long_row - long_row - 2 * row) / (2 * _TOKENS**2)
    per_token = row / _TOKENS - per_square * _TOKENS
    per_position = (long_row - base) / _TOKENS - per_token - 3 * per_square * _TOKENS
    per_client = second_client - base - row
    fixed = base - per_client - row - _TOKENS * per_position
    return Cost(fixed, per_client, per_token, per_square, per_position)


def _most(full: Callable[[Load], int], thin: Callable[[Load], int]) -> Cost:
    """Bound the most that is there at a time, by a sum of what it takes per client and per token.

    Which moment needs most depends on the load, so the most is no sum but a maximum of several;
    and a maximum is at most the sum of what is needed for the clients and for the tokens alone.

    Args:
        full: measures with the LoRA rank of the run.
        thin: measures with the smallest adapters.
    """
    of_tokens = _cost([thin(load) for load in _LOADS])
    per_token = of_tokens.per_token + _TOKENS * of_tokens.per_square
    return Cost(
        fixed=0.0,
        per_client=max(0.0, full(_LOADS[0]) - _TOKENS * per_token),
        per_token=per_token,
        per_square=0.0,
        per_position=0.0,
    )


class _KeepInput(Function):
    """Changes nothing and keeps its input, as linear layers do under ZeRO-3."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> torch.Tensor:
        return grads[0]


def _keep_input(_module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    kept: torch.Tensor = _KeepInput.apply(inputs[0])  # type: ignore[no-untyped-call]
    return (kept, *inputs[1:])


class _Trial:
    """A small model with the trainer's layers, on the CPU."""

    def __init__(
        self,
        config: Config,
        shape: PreTrainedConfig,
        dtype: torch.dtype,
        targets: tuple[str, ...],
        lora_rank: int,
        *,
        keeps_inputs: bool,
    ) -> None:
        eager = config.model.attention == "eager"
        with no_init_weights():
            model: PreTrainedModel = auto_class(config).from_config(
                # flash-attn, which needs a GPU, keeps what the fused kernel of torch keeps.
                shape,
                dtype=dtype,
                attn_implementation="eager" if eager else "sdpa",
            )
        model.tie_weights()
        synthetic.fill_with_zeros(model)
        model.requires_grad_(False)
        make_lean(model)
        head = heads.take_off(config, model, _ALL_FOUND, lambda _: nullcontext())
        if config.backbone.gradient_checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        for module in model.modules() if keeps_inputs else ():
            if isinstance(module, nn.Linear):
                module.register_forward_pre_hook(_keep_input)
        self._config = config
        self.backbone = Backbone(model, head, Sharding("none", "a trial"), None)
        self._adapters = attach(config, model, head, targets, lora_rank)

    def kept(self, load: Load) -> int:
        """Bytes that are there for the backward pass: copies of factors, and what is saved."""
        rows, batch = self._begin(load)
        live = LiveBytes()
        with live:
            loss = self._loss(rows, batch)
            kept = live.now
        del loss
        return kept

    def transient(self, load: Load) -> int:
        """Bytes at the worst moment of forward and backward pass, beside what is kept."""
        rows, batch = self._begin(load)
        live = LiveBytes()
        with live:
            loss = self._loss(rows, batch)
            kept = live.now
            torch.autograd.backward(loss)
        return live.peak - kept

    def _begin(self, load: Load) -> tuple[Rows, Batch]:
        seeds = tuple(range(load.clients)) if self._config.lora.dropout else None
        self._adapters.context.dropout_seeds = seeds
        self.backbone.training()
        return self._rows(load.clients), self._batch(load)

    def _loss(self, rows: Rows, batch: Batch) -> torch.Tensor:
        self._adapters.bind(rows.values, rows.grads, FACTORS)
        return objective_of(self.backbone).losses(batch).sum()

    def evaluated(self, load: Load) -> int:
        """Bytes at the worst moment of a forward pass without gradients."""
        rows = self._rows(load.clients)
        self._adapters.context.dropout_seeds = None
        self.backbone.evaluating()
        batch = self._batch(load)
        live = LiveBytes()
        with torch.no_grad(), live:
            self._adapters.bind(rows.values)
            objective_of(self.backbone).losses(batch)
        return live.peak

    def optimised(self) -> float:
        """Bytes at the worst moment of an optimizer step, per number of a client's row."""
        rows, layout = self._rows(1), self._adapters.layout
        adam = StackedOptimizer(self._config.train, layout, layout.factors)
        once = torch.ones(1)
        live = LiveBytes()
        with live:
            norms = adam.gradient_norms(rows)
            adam.step(rows, once, norms, once.bool())
        return live.peak / layout.size

    def _rows(self, clients: int) -> Rows:
        shape = (clients, self._adapters.layout.size)
        names = MOMENTS if self._config.train.optimizer == "adamw" else ()
        moments = {name: torch.zeros(shape) for name in names}
        steps = torch.zeros(clients, len(FACTORS))
        return Rows(tuple(range(clients)), torch.zeros(shape), torch.zeros(shape), moments, steps)

    def _batch(self, load: Load) -> Batch:
        target = None if self.backbone.head is None else 0.0
        # Shorter than its row, so that there is padding: attention then needs a mask.
        part = load.tokens // _TOKENS
        row = Row(np.zeros(load.tokens - part, dtype=np.int32), part, target)
        some = [[row] * load.rows] * load.clients
        return objective_of(self.backbone).collate(some, load.rows)


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes that tensors made within it hold: now, and at most so far.

    Tensors that were there before count nothing, nor does what an operation needs inside itself.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Do one operation and count what is new in its results."""
        result = func(*args, **(kwargs or {}))
        known = {storage._cdata for storage in _storages((args, kwargs))}
        for storage in _storages(result):
            if storage._cdata not in known:
                known.add(storage._cdata)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, num_bytes: int) -> None:
        self.now -= num_bytes


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [leaf.untyped_storage() for leaf in tree_leaves(values) if torch.is_tensor(leaf)]
