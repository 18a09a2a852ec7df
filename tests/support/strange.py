"""A tiny LLaMA with layers of which the trainer's assumptions are not true, put in on purpose."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
)

WORDS, WIDTH = 96, 32


class Experts(nn.Module):
    """Linear experts that are called on the tokens routed to them, whoever's these are."""

    def __init__(self):
        super().__init__()
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x):
        flat = x.reshape(-1, WIDTH)
        weights, chosen = self.router(flat).softmax(dim=-1).max(dim=-1)
        y = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            at = (chosen == number).nonzero()[:, 0]
            if len(at):
                y = y.index_add(0, at, expert(flat[at]) * weights[at, None])
        return y.view(x.shape)


class RelativePositions(nn.Module):
    """A projection of a table of positions, which belongs to no row."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(64, WIDTH))
        self.position_proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return x * self.position_proj(self.table[None, : x.shape[1]])


class TokensFirst(nn.Module):
    """A layer that is called with the tokens before the rows."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x.transpose(0, 1).contiguous()).transpose(0, 1)


class Backwards(nn.Module):
    """A layer that is called with the rows in another order."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x.flip(0)).flip(0)


class MeanOverRows(nn.Module):
    """Rows that see the mean of their batch."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(x) + x.mean(dim=0, keepdim=True)


class RowBefore(MeanOverRows):
    """Rows that see the row before them."""

    def forward(self, x):
        return self.proj(x) + 0.1 * functional.pad(x, (0, 0, 0, 0, 1, 0))[:-1]


class LongestRow(MeanOverRows):
    """Rows that see how wide their batch is."""

    def forward(self, x):
        return self.proj(x) * (1 + x.shape[1] / 16)


class BatchStatistics(nn.Module):
    """Normalises by the batch while it trains, by what it has collected otherwise."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(self.norm(x.transpose(1, 2)).transpose(1, 2))


class Jitter(MeanOverRows):
    """Shakes its input while it trains, as routers do."""

    def forward(self, x):
        if self.training:
            x = x * torch.empty_like(x).uniform_(0.8, 1.2)
        return self.proj(x)


class AlwaysJitter(MeanOverRows):
    """Shakes its input whatever the mode."""

    def forward(self, x):
        return self.proj(x * torch.empty_like(x).uniform_(0.8, 1.2))


class LongRowsJitter(MeanOverRows):
    """Shakes its input where rows are long, as attention by hashes does."""

    def forward(self, x):
        is_long = x.shape[1] > 24
        return self.proj(x * torch.empty_like(x).uniform_(0.8, 1.2) if is_long else x)


class LongRowsMix(MeanOverRows):
    """Rows that see the mean of their batch where the longest is long."""

    def forward(self, x):
        return super().forward(x) if x.shape[1] > 24 else self.proj(x)


class LayerDrop(MeanOverRows):
    """Leaves itself out by chance while it trains."""

    def forward(self, x):
        if self.training and torch.rand([]) < 0.5:
            return torch.zeros_like(x)
        return self.proj(x)


class Counter(MeanOverRows):
    """Counts its calls, and has other numbers after some of them."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.calls += 1
        return self.proj(x) * (1 if self.calls < 100 else 2)


class ReadsWeight(nn.Module):
    """Uses the weight of a layer and never calls it."""

    def __init__(self):
        super().__init__()
        self.read_proj = nn.Linear(WIDTH, WIDTH)
        self.proj = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.proj(functional.linear(x, self.read_proj.weight, self.read_proj.bias))


class LooksAtDtype(MeanOverRows):
    """Reads the dtype of a weight and calls the layer."""

    def forward(self, x):
        return self.proj(x.to(self.proj.weight.dtype))


class InPlace(MeanOverRows):
    """Writes over the output of a layer."""

    def forward(self, x):
        y = self.proj(x)
        y *= 2
        return y


class Twice(MeanOverRows):
    """Calls a layer twice."""

    def forward(self, x):
        return self.proj(functional.silu(self.proj(x)))


class SeesLaterTokens(MeanOverRows):
    """Lets a token see the one after it."""

    def forward(self, x):
        return self.proj(x) + functional.pad(x, (0, 0, 0, 1))[:, 1:]


class LeaksThroughDocuments(MeanOverRows):
    """Carries a state over the whole row, whatever documents lie in it."""

    def forward(self, x):
        return self.proj(x) + 0.5 * functional.pad(x, (0, 0, 1, 0))[:, :-1]


def llama(seed: int = 0, **changes: int) -> LlamaForCausalLM:
    """A LLaMA of three layers, or of other sizes."""
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
    }
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes}, initializer_range=0.2))


def model(layer: Callable[[], nn.Module], at: int = 1, seed: int = 0) -> PreTrainedModel:
    """A LLaMA of three layers, with a strange one in the place of the MLP of one of them."""
    made = llama(seed)
    strange = layer()
    for weight in strange.parameters():
        nn.init.normal_(weight, std=0.2)
    made.model.layers[at].mlp = strange
    return made


def longrope(original_tokens: int) -> PreTrainedModel:
    """A Phi-3 whose rotary embedding is another one for batches with a longer row."""
    torch.manual_seed(0)
    config = Phi3Config(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        original_max_position_embeddings=original_tokens,
        initializer_range=0.2,
        pad_token_id=0,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 4,
            "long_factor": [1.0, 2.0, 4.0, 8.0],
            "original_max_position_embeddings": original_tokens,
        },
    )
    return Phi3ForCausalLM(config)
