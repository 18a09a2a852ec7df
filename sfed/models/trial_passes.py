"""Passes over a few made-up tokens: by the trainer, and plainly, a row at a time.

The plain passes are the reference. They know nothing of stacked layers, of lean blocks or of
chunked losses: the model's own modules, ``W0 x + gamma * B (A x)`` as it is written, and the
cross-entropy of logits.

Suffixes: C clients, N parameters of a client's adapter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from sfed.data import batches
from sfed.data.batches import Batch, Documents
from sfed.data.packing import Packing, padded_width
from sfed.data.tokenize import Row
from sfed.kernels.plain.quantise import CODES as FP8
from sfed.lora.adapters import Adapters
from sfed.lora.frozen import fp8
from sfed.lora.hf_blocks import without_patched_blocks
from sfed.lora.linear import StackedLoraLinear
from sfed.models.backbone import Backbone
from sfed.models.objective import objective_of, target_losses

# Output of an adapter over its input: enough that an adapter on other rows shows.
_ADAPTER_SHARE = 0.5


@dataclass(frozen=True)
class Subject:
    """What is tried."""

    backbone: Backbone
    adapters: Adapters
    device: torch.device
    tokens: Sequence[int]
    """Ids to draw from; see ``ordinary_tokens``."""
    longest_row: int
    """Tokens of the longest row of the run, on any process."""
    packing: Packing | None
    """None where rows are padded anyway."""

    @property
    def widest_row(self) -> int:
        """Tokens of the longest row with its padding."""
        return padded_width(self.longest_row, self.backbone.context_tokens)

    @property
    def model(self) -> PreTrainedModel:
        """The backbone's model."""
        return self.backbone.model

    @property
    def precision(self) -> torch.dtype:
        """The dtype in which the frozen layers compute."""
        return FP8 if fp8.fp8_layers(self.model) else self.model.dtype

    @property
    def has_targets(self) -> bool:
        """Whether a classification head is trained."""
        return self.backbone.head is not None

    @property
    def takes_positions(self) -> bool:
        """Whether the model can be told the positions of tokens."""
        return "position_ids" in inspect.signature(self.model.forward).parameters


def ordinary_tokens(tokenizer: PreTrainedTokenizerFast, vocabulary_size: int) -> list[int]:
    """The tokens that stand for text, not for padding, images or roles; all where none is left."""
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    known = range(min(len(tokenizer), vocabulary_size))
    return [i for i in known if i not in special] or list(known)


@dataclass(frozen=True)
class Numbers:
    """What a client gets from a pass."""

    loss: float
    gradient: torch.Tensor
    """(N,) fp32."""


@dataclass(frozen=True)
class Case:
    """A batch: some rows of each client, and the clients' adapters."""

    rows: list[list[Row]]
    values: torch.Tensor
    """(C, N) fp32."""
    first_positions: list[list[int]] | None = None
    """Position of the first token of each row; None = as the model counts."""

    @property
    def most_rows(self) -> int:
        """Rows of a client in the batch."""
        return max(map(len, self.rows))


def read_only(ids: Any) -> Row:
    """A row of which nothing is learned."""
    return Row(np.asarray(ids, dtype=np.int32), len(ids))


def learned(ids: Any, target: float | None) -> Row:
    """A row of which each token but the first is learned, or its target."""
    return Row(np.asarray(ids, dtype=np.int32), 1, target)


def random_adapter(subject: Subject, generator: torch.Generator) -> torch.Tensor:
    """A client's (N,) row whose adapters change the output of each layer by about a third."""
    adapters, layout = subject.adapters, subject.adapters.layout
    lora_scaling = next(iter(adapters.layers.values())).lora_scaling
    lora_rank = next(piece.shape[0] for piece in layout.pieces if piece.factor == "A")
    row, columns = torch.zeros(layout.size), layout.columns("B")
    row[layout.columns("A")] = adapters.initial_a(generator)
    std = _ADAPTER_SHARE / (lora_scaling * lora_rank**0.5)
    row[columns] = torch.randn(columns.stop - columns.start, generator=generator) * std
    row[layout.columns("head")] = adapters.initial_head()
    return row.to(subject.device)


# --- passes of the trainer ----------------------------------------------------------------------


def together(subject: Subject, case: Case, packing: Packing | None = None) -> list[Numbers]:
    """Make one pass of the trainer over the rows of all clients of a case; a client each."""
    grads_CN = torch.zeros_like(case.values)
    subject.adapters.bind(case.values, grads_CN, subject.adapters.layout.factors)
    batch = batches.collate(case.rows, case.most_rows, packing).to(subject.device)
    assert packing is None or batch.documents is not None, "these rows cannot be packed"
    losses = _losses(subject, case, batch)
    torch.autograd.backward(losses.sum())
    sums_C = losses.detach().view(len(case.rows), -1).sum(dim=1).tolist()
    return [Numbers(*pair) for pair in zip(sums_C, grads_CN, strict=True)]


@torch.no_grad()
def long_losses(subject: Subject, short: Row, values_N: torch.Tensor) -> list[list[float]]:
    """Losses of a row as long as the longest of the run, in passes that keep nothing.

    Args:
        subject: what is tried.
        short: another row of the same client.
        values_N: the client's adapter.

    Returns:
        Of the long row alone, of it once more, and of both rows in one pass.
    """
    subject.adapters.bind(
        values_N[None], torch.zeros_like(values_N[None]), subject.adapters.layout.factors
    )
    drawn = np.random.default_rng(subject.longest_row)
    ids = drawn.choice(np.asarray(subject.tokens), subject.longest_row).astype(np.int32)
    long = Row(ids, max(1, len(ids) - len(short.ids)), short.target)
    objective = objective_of(subject.backbone)
    batches_of_rows = (
        objective.collate([rows], len(rows)) for rows in ([long], [long], [long, short])
    )
    return [objective.losses(batch.to(subject.device)).tolist() for batch in batches_of_rows]


def _losses(subject: Subject, case: Case, batch: Batch) -> torch.Tensor:
    backbone, ids = subject.backbone, batch.input_ids
    if case.first_positions is None:
        return objective_of(backbone).losses(batch)
    first = torch.tensor(case.first_positions, device=ids.device).view(-1, 1)
    position_ids = first + torch.arange(ids.shape[1], device=ids.device)
    if subject.has_targets:
        outputs = backbone.outputs(ids, batch.is_token, batch.is_second, position_ids)
        return target_losses(outputs, batch.targets)
    starts = torch.arange(len(ids) + 1, device=ids.device, dtype=torch.int32) * ids.shape[1]
    documents = Documents(position_ids, starts, (ids.shape[1],) * len(ids))
    return backbone.token_losses(ids, batch.labels, batch.positions, documents)


# --- plain passes -------------------------------------------------------------------------------


class PlainPasses:
    """Forward and backward passes of one row, and how often each adapted layer was called."""

    def __init__(self, subject: Subject) -> None:
        self._subject = subject
        self.calls = dict.fromkeys(subject.adapters.layers, 0)

    def numbers(self, row: Row, values_N: torch.Tensor) -> Numbers:
        """Loss and gradient of one row alone, with one adapter."""
        ids = torch.tensor([row.ids.tolist()], device=self._subject.device)
        with self._plain_layers(values_N[None]) as grads_1N:
            loss = self._token_loss(row, ids) if row.target is None else self._target_loss(row, ids)
            torch.autograd.backward(loss)
        return Numbers(float(loss.detach()), grads_1N[0])

    @torch.no_grad()
    def logits(self, ids: Sequence[int], values_N: torch.Tensor) -> torch.Tensor:
        """Logits of one row alone, (tokens, words) fp32."""
        with self._plain_layers(values_N[None]):
            return self._logits(torch.tensor([ids], device=self._subject.device))

    def _logits(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self._subject.model(input_ids=ids, use_cache=False).logits
        return logits[0].float()

    def _token_loss(self, row: Row, ids: torch.Tensor) -> torch.Tensor:
        learned = torch.from_numpy(np.flatnonzero(row.is_learned[1:])).to(ids.device)
        predicted = self._logits(ids)[learned]
        wanted = ids[0, learned + 1]
        return functional.cross_entropy(predicted, wanted, reduction="sum")

    def _target_loss(self, row: Row, ids: torch.Tensor) -> torch.Tensor:
        is_second = torch.arange(ids.shape[1], device=ids.device)[None] >= row.prompt_length
        outputs = self._subject.backbone.outputs(ids, torch.ones_like(ids).bool(), is_second)
        return target_losses(outputs, torch.tensor([row.target], device=ids.device)).sum()

    @contextmanager
    def _plain_layers(self, values_1N: torch.Tensor) -> Iterator[torch.Tensor]:
        """Use the model's own modules and plain adapters within the block; yields the gradients."""
        adapters, grads_1N = self._subject.adapters, torch.zeros_like(values_1N)
        adapters.bind(values_1N, grads_1N, ("head",))
        factors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in adapters.layers}
        for piece in adapters.layout.pieces:
            if piece.layer in factors and piece.factor in ("A", "B"):
                leaf = piece.of(values_1N)[0].detach().requires_grad_()
                leaf.grad = piece.of(grads_1N)[0]
                factors[piece.layer][piece.factor] = leaf
        try:
            for name, layer in adapters.layers.items():
                plain = self._plain_forward(name, layer, **factors[name])
                layer.forward = plain  # type: ignore[method-assign, assignment]
            with without_patched_blocks(self._subject.model):
                yield grads_1N
        finally:
            for layer in adapters.layers.values():
                del layer.__dict__["forward"]

    def _plain_forward(
        self,
        name: str,
        layer: StackedLoraLinear,
        A: torch.Tensor,
        B: torch.Tensor,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        def forward(x: torch.Tensor) -> torch.Tensor:
            self.calls[name] += 1
            y: torch.Tensor = layer.base_layer(x)
            return y + layer.lora_scaling * ((x @ A.to(x.dtype).t()) @ B.to(x.dtype).t())

        return forward


# --- where two passes part ----------------------------------------------------------------------


@dataclass(frozen=True)
class View:
    """Which part of the outputs of modules belongs to one row of a batch."""

    num_rows: int
    width: int
    row: int
    length: int
    """Tokens of the row that are looked at."""

    def of(self, output: torch.Tensor) -> torch.Tensor:
        """The row's part of an output of (rows, tokens, ...) or (rows * tokens, ...), else all."""
        if output.dim() >= 2 and output.shape[:2] == (self.num_rows, self.width):
            return output[self.row, : self.length]
        if output.dim() >= 1 and output.shape[0] == self.num_rows * self.width:
            start = self.row * self.width
            return output[start : start + self.length]
        if output.dim() >= 1 and output.shape[0] == self.num_rows:
            return output[self.row]
        if output.dim() >= 2 and output.shape[:2] == (1, self.width):  # the same for all rows
            return output[0, : self.length]
        return output


@dataclass
class Traced:
    """What the modules of a model gave out in a pass, innermost first."""

    outputs: list[tuple[str, int, torch.Tensor]]
    """(name of the module, which of its calls, first tensor of its output)."""
    entered: list[str]
    """Modules that were entered and not left."""

    @property
    def failed_in(self) -> str | None:
        """The innermost module in which a forward pass failed."""
        return self.entered[-1] if self.entered else None


@contextmanager
def tracing(model: PreTrainedModel) -> Iterator[Traced]:
    """Record what the modules of a model give out, but for the vocabulary's head.

    That gives out losses in a pass of the trainer, and logits in a plain one.
    """
    traced, calls, handles = Traced([], []), dict[str, int](), []

    def enter(name: str) -> None:
        traced.entered.append(name)

    def leave(name: str, output: Any) -> None:
        traced.entered.pop()
        calls[name] = calls.get(name, 0) + 1
        first = next((o for o in _leaves(output) if isinstance(o, torch.Tensor)), None)
        if first is not None and first.is_floating_point():
            traced.outputs.append((name, calls[name], first.detach().clone()))

    for name, module in model.named_modules():
        if module is model.get_output_embeddings():
            continue
        handles += [
            module.register_forward_pre_hook(lambda _m, _i, name=name: enter(name)),
            module.register_forward_hook(lambda _m, _i, output, name=name: leave(name, output)),
        ]
    try:
        yield traced
    finally:
        for handle in handles:
            handle.remove()


def _leaves(output: Any) -> Iterator[Any]:
    if isinstance(output, tuple | list):
        for one in output:
            yield from _leaves(one)
    elif isinstance(output, dict):
        yield from _leaves(list(output.values()))
    else:
        yield output


def first_difference(
    one: tuple[Traced, View], other: tuple[Traced, View], tolerance: float
) -> str | None:
    """The innermost module, in the order of calls, whose output for a row is not the same."""
    (mine, my_view), (theirs, their_view) = one, other
    known = {(name, call): output for name, call, output in theirs.outputs}
    for name, call, output in mine.outputs:
        if (name, call) not in known:
            continue
        a, b = my_view.of(output).float(), their_view.of(known[name, call]).float()
        if a.shape != b.shape or not (a - b).norm() <= tolerance * max(float(b.norm()), 1e-6):
            return name
    return None
