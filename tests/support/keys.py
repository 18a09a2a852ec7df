"""Keys of tokens for dropout, as batches of padded rows have them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from sfed.data.batches import collate
from sfed.data.tokenize import Row


def token_keys(seeds: Sequence[int], rows: int, tokens: int) -> torch.Tensor:
    """(clients * rows, tokens) keys of examples that fill their rows."""
    row = Row(np.zeros(tokens, dtype=np.int32), 0, None)
    keys = collate([[row] * rows] * len(seeds), rows).with_keys(seeds).token_keys
    assert keys is not None
    return keys[:, :tokens].contiguous()
