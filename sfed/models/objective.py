"""What is learned from a batch: the tokens of a completion, or the target of each row.

A run chooses its objective once (``objective_of``); everything else asks the objective and never
whether the task is a classification.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.nn import functional

from sfed.config.schema import Config
from sfed.data import batches
from sfed.data.batches import IGNORED_LABEL, Batch
from sfed.data.packing import Packing
from sfed.data.tasks import task_of
from sfed.data.tokenize import Row
from sfed.models.backbone import Backbone


class Objective(Protocol):
    """How examples become a batch, and a batch becomes losses and predictions."""

    def collate(self, rows_by_client: Sequence[Sequence[Row]], rows_per_client: int) -> Batch:
        """Lay the examples of C clients into a batch; arguments as of ``batches.collate``."""

    def losses(self, batch: Batch) -> torch.Tensor:
        """Return each row's loss in nats: (rows,) fp32, 0 for rows that are missing.

        It is the loss that is trained.
        """

    def losses_and_predictions(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return each row's loss, and its predicted class or value: (rows,) fp32 both.

        There are no predictions where tokens are learned.
        """

    def counted_tokens(self, batch: Batch) -> torch.Tensor:
        """Return which tokens matter to the losses: (rows, tokens) bool, False on padding."""


def objective_of(
    backbone: Backbone, packing: Packing | None = None, class_weights: torch.Tensor | None = None
) -> Objective:
    """Return the objective of a backbone: targets where it has a classification head.

    Args:
        backbone: the frozen model.
        packing: how short sequences share a row; None = never.
        class_weights: see ``TargetObjective``.
    """
    if backbone.head is None:
        return TokenObjective(backbone, packing)
    return TargetObjective(backbone, class_weights)


def why_padded(config: Config, backbone: Backbone) -> str | None:
    """Say why each sequence has a row of its own; None where short ones share rows."""
    if not config.data.packing:
        return "data.packing=false"
    if task_of(config).is_classification:
        return "a classifier reads one text in a row"
    if backbone.packing is None:
        return "this model would let documents in one row see each other"
    return None


@dataclass(frozen=True)
class TokenObjective:
    """Learn completions: a row's loss is the sum over its supervised tokens."""

    backbone: Backbone
    packing: Packing | None

    def collate(self, rows_by_client: Sequence[Sequence[Row]], rows_per_client: int) -> Batch:
        """See ``Objective.collate``: packed where that is cheaper and allowed."""
        context = self.backbone.context_tokens
        return batches.collate(rows_by_client, rows_per_client, self.packing, context)

    def losses(self, batch: Batch) -> torch.Tensor:
        """See ``Objective.losses``."""
        return self.backbone.token_losses(
            batch.input_ids, batch.labels, batch.positions, batch.documents
        )

    def losses_and_predictions(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Objective.losses_and_predictions``: there are no predictions."""
        return self.losses(batch), None

    def counted_tokens(self, batch: Batch) -> torch.Tensor:
        """See ``Objective.counted_tokens``: those of completions."""
        return batch.labels != IGNORED_LABEL


@dataclass(frozen=True)
class TargetObjective:
    """Learn a class (cross-entropy) or a value (squared error) per row, by a head."""

    backbone: Backbone
    class_weights: torch.Tensor | None = None
    """(classes,) fp32 on the device: what the losses of a training step are multiplied by, by
    the class of a row; None = 1."""

    def collate(self, rows_by_client: Sequence[Sequence[Row]], rows_per_client: int) -> Batch:
        """See ``Objective.collate``: one example in a row."""
        context = self.backbone.context_tokens
        return batches.collate(rows_by_client, rows_per_client, context=context)

    def losses(self, batch: Batch) -> torch.Tensor:
        """See ``Objective.losses``: weighted by the class of each row."""
        return target_losses(self._outputs(batch), batch.targets, self.class_weights)

    def losses_and_predictions(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor | None]:
        """See ``Objective.losses_and_predictions``: the largest class, or the value itself.

        These losses are not weighted.
        """
        outputs = self._outputs(batch)
        is_value = outputs.shape[1] == 1
        predictions = outputs[:, 0] if is_value else outputs.argmax(dim=1).float()
        return target_losses(outputs, batch.targets), predictions

    def counted_tokens(self, batch: Batch) -> torch.Tensor:
        """See ``Objective.counted_tokens``: all of the rows that have a target."""
        return batch.is_token & ~torch.isnan(batch.targets)[:, None]

    def _outputs(self, batch: Batch) -> torch.Tensor:
        return self.backbone.outputs(batch.input_ids, batch.is_token, batch.is_second)


def target_losses(
    outputs: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the loss of each row, 0 where the target is NaN: (rows,) fp32.

    Args:
        outputs: (rows, classes), or (rows, 1) for a value.
        targets: (rows,) classes or values.
        class_weights: (classes,) factors of the losses, for classes; None = 1.
    """
    present = ~torch.isnan(targets)
    targets = targets.nan_to_num()
    if outputs.shape[1] == 1:
        losses = functional.mse_loss(outputs[:, 0], targets, reduction="none")
    else:
        losses = functional.cross_entropy(
            outputs, targets.long(), weight=class_weights, reduction="none"
        )
    return losses.where(present, 0.0)
