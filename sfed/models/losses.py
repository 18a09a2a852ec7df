"""The losses of a language model's tokens: logits in chunks, documents side by side in a row.

Logits are made for supervised tokens only, some at a time, and their gradient at once:

    loss_s = log sum_v exp(z_sv) - z_st        d loss_s / d h_s = (softmax(z_s) - onehot(t)) W

with z_s = W h_s + b, so that a pass keeps one vector of the hidden width for each supervised token
and never vocabulary x tokens numbers. Both happen in the vocabulary head's own forward, where
ZeRO-3 has its weight gathered.

Shape suffixes: S supervised tokens, D hidden width, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.autograd import Function
from torch.nn import functional
from transformers import PreTrainedModel

from sfed.data.batches import IGNORED_LABEL, Documents
from sfed.lora import packed_attention

# Of fp32 logits at a time. Two more buffers of the size or less exist beside them for a moment.
CHUNK_BYTES = 128 * 2**20
# Rows that a matrix product on a GPU computes at a time; some of the last ones for nothing.
_TILE = 128
# An error below this share of what is at stake counts as round-off (see TokenLosses._probe).
_ROUND_OFF = 0.1


@dataclass(frozen=True)
class Traits:
    """What a causal model does with documents and logits."""

    keeps_documents_apart: bool
    """Whether documents that are packed into a row do not see each other."""
    returns_logits: bool
    """Whether it returns its head's output as it is: softcaps and scales are then in the head."""


class TokenLosses:
    """Makes a causal model give losses in the place of logits. One per model, made once."""

    def __init__(self, model: PreTrainedModel, traits: Traits | None = None) -> None:
        """Find out what the model does with logits and documents, by one small pass.

        Collective under a sharded backbone.

        Args:
            model: changed in place.
            traits: of the model, where they are known; no pass is made then.
        """
        self._model = model
        self._head = model.get_output_embeddings()
        self._logits = self._head.forward
        self._positions: torch.Tensor | None = None
        self._targets: torch.Tensor | None = None
        self._head.register_forward_pre_hook(self._only_positions)
        traits = traits or self._probe()
        self.keeps_documents_apart = traits.keeps_documents_apart
        self._is_chunked = traits.returns_logits and type(self._head) is nn.Linear
        if self._is_chunked:
            self._head.forward = self._forward

    def __call__(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        documents: Documents | None,
    ) -> torch.Tensor:
        """Return each row's summed cross-entropy; see ``Backbone.token_losses``."""
        by_token = torch.zeros(labels.shape, device=labels.device).flatten()
        losses = self._of_positions(
            input_ids, labels.flatten()[positions + 1], positions, documents
        )
        return by_token.index_put((positions,), losses).view(labels.shape).sum(dim=1)

    def logits_at_a_time(self, num_words: int) -> int | None:
        """Tokens whose logits exist at once where there are so many words; None = all."""
        is_adapted = self._model.get_output_embeddings() is not self._head
        return (
            None if is_adapted or not self._is_chunked else tokens_of_chunk(num_words, CHUNK_BYTES)
        )

    def _of_positions(
        self,
        input_ids: torch.Tensor,
        targets_S: torch.Tensor,
        positions_S: torch.Tensor,
        documents: Documents | None,
    ) -> torch.Tensor:
        """Return the loss of each supervised token: (S,) fp32, 0 where the target is ignored."""
        if self._model.get_output_embeddings() is not self._head:
            # The head is adapted: it needs the rows of all clients, as any adapted layer.
            logits = self._outputs(input_ids, documents).flatten(0, 1)[positions_S]
            return _cross_entropy(logits, targets_S)
        self._positions = positions_S
        self._targets = targets_S if self._is_chunked else None
        try:
            outputs = self._outputs(input_ids, documents)[0]
        finally:
            self._positions = self._targets = None
        return outputs[:, 0] if self._is_chunked else _cross_entropy(outputs, targets_S)

    def _outputs(self, input_ids: torch.Tensor, documents: Documents | None) -> torch.Tensor:
        """What the model gives out as its logits."""
        told: dict[str, Any] = {}
        needs_no_mask = packed_attention.is_installed(self._model)
        if documents is None:
            told = packed_attention.told_of_rows(input_ids.device) if needs_no_mask else {}
        else:
            # transformers makes a mask of the positions where attention is told no more.
            told["position_ids"] = documents.position_ids
            if needs_no_mask and not documents.is_masked:
                told |= packed_attention.told(documents.starts, documents.lengths)
            elif self._model.config._attn_implementation == "flash_attention_2":
                starts, longest = documents.starts, max(documents.lengths)
                told |= {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts}
                told |= {"max_length_q": longest, "max_length_k": longest}
        logits: torch.Tensor = self._model(input_ids=input_ids, use_cache=False, **told).logits
        return logits

    def _only_positions(
        self, _head: nn.Module, inputs: tuple[torch.Tensor, ...]
    ) -> tuple[torch.Tensor, ...] | None:
        """Select the hidden states of supervised tokens for the vocabulary's head: (1, S, D)."""
        if self._positions is None:
            return None
        # Indexing would sort the positions in the backward pass, since they might repeat.
        selected_SD = inputs[0].flatten(0, 1).index_select(0, self._positions)
        return (selected_SD[None], *inputs[1:])

    def _forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The head's forward: logits as ever, or (1, S, 1) losses where targets are set."""
        if self._targets is None:
            logits: torch.Tensor = self._logits(hidden)
            return logits
        losses_S = linear_cross_entropy(
            hidden[0], self._head.weight, self._head.bias, self._targets, CHUNK_BYTES
        )
        return losses_S[None, :, None]

    @torch.no_grad()
    def _probe(self) -> Traits:
        """Compare a document alone, behind another one, and packed behind it.

        Documents are kept apart where the losses of the packed one are those of the document alone,
        up to a tenth of what the other would have changed.
        """
        first, second, device = 5, 11, self._head.weight.device
        width = first + second
        ids = (torch.arange(width) * 7 + 3) % self._model.config.get_text_config().vocab_size
        alone = torch.cat([ids[first:], ids[:first]])
        input_ids = torch.stack([alone, ids, ids]).to(device)
        counted = torch.arange(second - 1)
        begins = torch.tensor([0, width + first, 2 * width + first])
        positions = (begins[:, None] + counted).flatten().to(device)
        position_ids = torch.arange(width).repeat(3, 1)
        position_ids[2, first:] -= first
        lengths = (width, width, first, second)
        starts = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
        documents = Documents(position_ids.to(device), starts.to(device), lengths)
        may_pack = "position_ids" in inspect.signature(self._model.forward).parameters
        given: list[torch.Tensor] = []
        hook = self._head.register_forward_hook(
            lambda _head, _inputs, output: given.append(output.clone())
        )
        self._positions = positions
        try:
            logits = self._outputs(input_ids, documents if may_pack else None)
        finally:
            self._positions = None
            hook.remove()
        losses = _cross_entropy(logits[0], input_ids.flatten()[positions + 1]).view(3, -1)
        at_stake, error = (losses[1] - losses[0]).norm(), (losses[2] - losses[0]).norm()
        is_apart = may_pack and bool(error <= _ROUND_OFF * at_stake)
        return Traits(is_apart, torch.equal(logits.float(), given[0].float()))


def _cross_entropy(logits_SV: torch.Tensor, targets_S: torch.Tensor) -> torch.Tensor:
    return functional.cross_entropy(
        logits_SV.float(), targets_S, ignore_index=IGNORED_LABEL, reduction="none"
    )


def tokens_of_chunk(num_words: int, chunk_bytes: int) -> int:
    """Tokens of a chunk: whole tiles of a GPU's matrix product, unless one tile is too much."""
    fitting = max(1, chunk_bytes // (4 * num_words))
    return fitting // _TILE * _TILE or fitting


def linear_cross_entropy(
    hidden_SD: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_S: torch.Tensor,
    chunk_bytes: int,
) -> torch.Tensor:
    """Return the cross-entropy of a frozen linear layer's outputs, made a chunk at a time.

    Args:
        hidden_SD: inputs of the layer; gets a gradient.
        weight_VD: its weight, in the dtype of the inputs; gets none.
        bias_V: its bias; None where it has none.
        targets_S: int64 outputs to predict, ``IGNORED_LABEL`` for a loss of 0.
        chunk_bytes: of the outputs in fp32 that exist at a time; one token at least.

    Returns:
        (S,) fp32 losses in nats.
    """
    chunk_tokens = tokens_of_chunk(len(weight_VD), chunk_bytes)
    losses: torch.Tensor = _LinearCrossEntropy.apply(  # type: ignore[no-untyped-call]
        hidden_SD, weight_VD, bias_V, targets_S, chunk_tokens
    )
    return losses


class _LinearCrossEntropy(Function):
    """Saves the gradient of each token's loss, (S, D), and nothing else."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_SD: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_S: torch.Tensor,
        chunk_tokens: int,
    ) -> torch.Tensor:
        losses_S = torch.empty(len(hidden_SD), dtype=torch.float32, device=hidden_SD.device)
        wants_gradient = ctx.needs_input_grad[0]
        grad_SD = torch.empty_like(hidden_SD) if wants_gradient else None
        is_ignored_S = targets_S == IGNORED_LABEL
        targets_S1 = targets_S.masked_fill(is_ignored_S, 0)[:, None]
        minus_one = torch.full_like(targets_S1, -1.0, dtype=torch.float32)
        for start in range(0, len(hidden_SD), chunk_tokens):
            some = slice(start, start + chunk_tokens)
            factors = (hidden_SD[some], weight_VD.t())
            logits = torch.mm(*factors) if bias_V is None else torch.addmm(bias_V, *factors)
            log_shares = functional.log_softmax(logits, dim=-1, dtype=torch.float32)
            losses_S[some] = -log_shares.gather(1, targets_S1[some])[:, 0]
            if grad_SD is not None:
                shares = log_shares.exp_()
                shares.scatter_add_(1, targets_S1[some], minus_one[some])
                grad_SD[some] = shares.to(weight_VD.dtype) @ weight_VD
        if grad_SD is not None:
            grad_SD.masked_fill_(is_ignored_S[:, None], 0.0)
        ctx.save_for_backward(grad_SD)
        return losses_S.masked_fill_(is_ignored_S, 0.0)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """The saved gradients times those of the losses."""
        (grad_S,), (grad_SD,) = grads, ctx.saved_tensors
        return (grad_SD * grad_S[:, None]).to(grad_SD.dtype), None, None, None, None
