"""One round of all clients, as every contestant makes it.

All start from the same adapters, read the same batches of rows of unequal length, make the same
optimizer steps with clipping, and end a round with the mean of A; so their losses and adapters are
the same up to round-off (a test, and every run of the bench checks the losses).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch

from sfed.bench.against.material import Material
from sfed.bench.measure import Clock
from sfed.data.batches import IGNORED_LABEL
from sfed.data.tokenize import Row

Parts = dict[str, float]
"""Seconds of a round by part: steps, similarity, mean."""


class Rounds(ABC):
    """One way to train all clients for a round."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.clock = Clock(material.world.device)
        self.losses: list[list[float]] = []
        """By round: each client's mean over the tokens that it learned in it."""

    @property
    def about(self) -> str:
        """What a reader should know of it; empty where there is nothing."""
        return ""

    @abstractmethod
    def round(self) -> Parts:
        """Train every client and take the mean of A."""

    @abstractmethod
    def factor(self, client: int, layer: str, factor: str) -> torch.Tensor:
        """A client's factor of a layer."""


class OneByOne(Rounds):
    """One client after another, as a loop is written without this trainer."""

    def round(self) -> Parts:
        """All steps of a client, then the next; the mean at the end."""
        moments, found = [self.clock.read()], []
        for client in range(self.material.job.num_clients):
            first = len(self.losses) * self.material.job.steps * self.material.job.rows
            found.append(self.train(client, first))
        moments.append(self.clock.read())
        self.average()
        moments.append(self.clock.read())
        self.losses.append(found)
        return {"steps": moments[1] - moments[0], "mean": moments[2] - moments[1]}

    @abstractmethod
    def train(self, client: int, position: int) -> float:
        """Make the steps of a round, from a position of the client's order.

        Returns:
            The mean loss over the tokens that were learned.
        """

    @abstractmethod
    def average(self) -> None:
        """Replace the A of all clients by their mean."""


def average(of_clients: Sequence[Sequence[torch.Tensor]]) -> None:
    """Replace the tensors of each client by the means over clients, in place."""
    with torch.no_grad():
        sums = [torch.zeros_like(one) for one in of_clients[0]]
        for own in of_clients:
            torch._foreach_add_(sums, list(own), alpha=1.0 / len(of_clients))
        for own in of_clients:
            torch._foreach_copy_(list(own), sums)


def padded_labels(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tokens) ids and labels, padded at the right to the longest."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED_LABEL)
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(row.ids.astype(np.int64))
        ids[place, : len(tokens)] = tokens
        learned = torch.from_numpy(np.flatnonzero(row.is_learned))
        labels[place, learned] = tokens[learned]
    return ids, labels
