"""What is learned from a batch: the losses of its rows, and what is predicted for them."""

from __future__ import annotations

import torch
from torch.nn import functional

from sfed.data.batches import IGNORED_LABEL, Batch
from sfed.models.backbone import Backbone


def row_losses(backbone: Backbone, batch: Batch) -> torch.Tensor:
    """Return each row's loss in nats: (rows,) fp32, 0 for rows that are missing.

    The sum over a row's supervised tokens; or the cross-entropy of its class; or, for a value, the
    squared error.
    """
    if batch.targets is None:
        return backbone.token_losses(
            batch.input_ids, batch.labels, batch.positions, batch.documents
        )
    return target_losses(outputs(backbone, batch), batch.targets)


def outputs(backbone: Backbone, batch: Batch) -> torch.Tensor:
    """Return the classification head's outputs: (rows, outputs) fp32."""
    return backbone.outputs(batch.input_ids, batch.is_token, batch.is_second)


def target_losses(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Return the loss of each row, 0 where the target is NaN.

    Args:
        outputs: (rows, classes), or (rows, 1) for a value.
        targets: (rows,) classes or values.
    """
    present = ~torch.isnan(targets)
    targets = targets.nan_to_num()
    if outputs.shape[1] == 1:
        losses = functional.mse_loss(outputs[:, 0], targets, reduction="none")
    else:
        losses = functional.cross_entropy(outputs, targets.long(), reduction="none")
    return losses.where(present, 0.0)


def predictions(outputs: torch.Tensor) -> torch.Tensor:
    """Return the class of the largest output, or the value itself: (rows,) fp32."""
    return outputs[:, 0] if outputs.shape[1] == 1 else outputs.argmax(dim=1).float()


def counted_tokens(batch: Batch) -> torch.Tensor:
    """Return which tokens matter to the losses: (rows, tokens) bool, False on padding."""
    if batch.targets is None:
        return batch.labels != IGNORED_LABEL
    return batch.is_token & ~torch.isnan(batch.targets)[:, None]
