"""What a pass of a model costs in memory, counted on one and on two of its layers.

The trainer's own pass is followed with fake tensors (``fake``), for few tokens and few layers, and
every tensor that it makes is counted. Bytes are linear in layers, clients and rows and quadratic in
the tokens of a row, so five passes through each of two models tell all. No weights are read, no
number is computed and no GPU is touched. What changes in the trainer changes the outcome by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedConfig

from sfed.config.clients import largest_rank
from sfed.config.schema import Config
from sfed.data.tasks import task_of
from sfed.memory.costs import Cost, Costs, Load
from sfed.memory.fake import CANNOT_TRACE, FakeFloats
from sfed.memory.trial import TOKENS, Frozen, Trial
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

_SMALLEST_RANK = 2  # at 1 torch warns of how gradients lie in memory
_ALL = 2**62
# The fewest passes that tell apart what grows with clients, rows and tokens.
_LOADS = (
    Load(1, 1, TOKENS),
    Load(1, 2, TOKENS),
    Load(2, 1, TOKENS),
    Load(1, 1, 2 * TOKENS),
    Load(1, 2, 2 * TOKENS),
)
# So long that a mask, or the scores of attention, are what there is most of; shorter where they
# have to be computed.
_LONG, _LONG_COMPUTED = 2048, 128


def measure(config: Config, frozen: Frozen, say: Callable[[str], None]) -> Costs:
    """Follow the passes and tell the parts of their costs from each other.

    Args:
        config: of the run.
        frozen: its model.
        say: told where the passes have to be computed.
    """
    try:
        return _costs(config, frozen, FakeFloats())
    except UserError:
        raise
    except CANNOT_TRACE as error:
        reason = one_line(f"{type(error).__name__}: {error}", most=120)
        say(
            f"fake tensors cannot follow a pass of {frozen.config.model_type} ({reason}); passes "
            "through two layers are computed instead, which takes minutes where these are large"
        )
        return _costs(config, frozen, None)


def _costs(config: Config, frozen: Frozen, fake: FakeFloats | None) -> Costs:
    """The costs, with fake tensors or with real ones."""
    text = frozen.config.get_text_config()
    lora_rank, num_layers = largest_rank(config), int(text.num_hidden_layers)
    one, two = (Trial(config, frozen, count, lora_rank, fake) for count in (1, 2))
    # With the smallest adapters next to nothing is a client's and all is a token's.
    thin = Trial(config, frozen, 1, _SMALLEST_RANK, fake)
    of_one, of_two = (_cost([trial.kept(load) for load in _LOADS]) for trial in (one, two))
    of_layer = of_two.plus(of_one, -1)
    long = min(one.backbone.context_tokens // 2, _LONG_COMPUTED if fake is None else _LONG)
    words = 0 if task_of(config).is_classification else int(text.vocab_size)
    in_chunks = one.backbone.logits_at_a_time(words)
    return Costs(
        kept=of_one.plus(of_layer, num_layers - 1),
        kept_by_layer=of_layer,
        transient=_most(one.transient, thin.transient, long),
        forward=_most(one.evaluated, thin.evaluated, long),
        logits_per_token=words * _bytes_per_logit(frozen.dtype, in_chunks=in_chunks is not None),
        logits_at_a_time=in_chunks or _ALL,
        cache_per_token=num_layers * _keys_and_values(text) * frozen.dtype.itemsize,
        optimizer_per_number=one.optimised(),
        packing=one.packing,
    )


def _bytes_per_logit(dtype: torch.dtype, *, in_chunks: bool) -> int:
    """Bytes of a logit and its log-softmax in fp32, and of a gradient made later."""
    own = dtype.itemsize + (0 if dtype == torch.float32 else 4)
    return own + (4 if in_chunks else 8)


def _keys_and_values(model_config: PreTrainedConfig) -> int:
    """Numbers that a layer remembers of a token while answers are written."""
    query_heads = getattr(model_config, "num_attention_heads", None)
    if query_heads is None:  # a model without attention remembers a state, and nothing of a token
        return 0
    num_heads = getattr(model_config, "num_key_value_heads", None) or query_heads
    width = getattr(model_config, "head_dim", None) or model_config.hidden_size // query_heads
    return 2 * int(num_heads) * int(width)


def _cost(values: Sequence[int]) -> Cost:
    """Solve for the parts of a cost, from its values for ``_LOADS``."""
    base, second_row, second_client, long_row, second_long_row = values
    row = second_row - base
    # A row of T tokens costs T t + T^2 q, and T positions p once for all rows.
    per_square = (second_long_row - long_row - 2 * row) / (2 * TOKENS**2)
    per_token = row / TOKENS - per_square * TOKENS
    per_position = (long_row - base) / TOKENS - per_token - 3 * per_square * TOKENS
    per_client = second_client - base - row
    fixed = base - per_client - row - TOKENS * per_position
    return Cost(fixed, per_client, per_token, per_square, per_position)


def _most(full: Callable[[Load], int], thin: Callable[[Load], int], long: int) -> Cost:
    """Bound the most that is there at a time, by a sum of what it takes per client and per token.

    Which moment needs most depends on the load, so the most is no sum but a maximum of several;
    and a maximum is at most the sum of what is needed for the clients and for the tokens alone.

    Args:
        full: measures with the LoRA rank of the run.
        thin: measures with the smallest adapters.
        long: tokens of a row in which what grows with their square is seen.
    """
    one_row, two_rows = _LOADS[:2]
    per_token = (thin(two_rows) - thin(one_row)) / TOKENS
    curved = thin(Load(1, 1, 2 * long)) - 2 * thin(Load(1, 1, long)) + thin(one_row)
    return Cost(
        fixed=0.0,
        per_client=max(0.0, full(one_row) - TOKENS * per_token),
        per_token=per_token,
        per_square=max(0.0, curved / (2 * long**2)),
        per_position=0.0,
    )
