"""Batches of several clients: who reads which examples, and rows of tokens padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sfed.backbone import IGNORED_LABEL
from sfed.seeds import Stream, generator
from sfed.tokens import Examples

Row = tuple[NDArray[np.int32], int]
_PAD_TO_MULTIPLE = 8


@dataclass(frozen=True)
class Batch:
    """The rows of C clients in order, equally many for each; what is missing is empty rows.

    Args:
        input_ids: (C * rows, tokens) int64.
        labels: same shape, ``IGNORED_LABEL`` where nothing is supervised.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Move to a device."""
        return Batch(self.input_ids.to(device), self.labels.to(device))


class Order:
    """The endless order in which one client reads its examples: a fresh shuffle per epoch.

    Position p is example p mod n of epoch p div n, so what a client reads depends on
    (seed, client, position) and on nothing else.
    """

    def __init__(self, seed: int, client: int, num_examples: int) -> None:
        self._words = (seed, client)
        self._num_examples = num_examples
        self._epoch = -1
        self._shuffle: NDArray[np.int64] = np.arange(0)

    def at(self, position: int) -> int:
        """The example at a position."""
        epoch, place = divmod(position, self._num_examples)
        if epoch != self._epoch:
            self._epoch = epoch
            self._shuffle = generator(Stream.ORDER, *self._words, epoch).permutation(
                self._num_examples
            )
        return int(self._shuffle[place])


def draw(examples: Examples, order: Order, start: int, count: int) -> list[Row]:
    """Return the rows at positions start .. start + count - 1 of a client's order."""
    return [examples.row(order.at(position)) for position in range(start, start + count)]


def supervised_tokens(rows: Sequence[Row]) -> float:
    """Tokens that have a loss: the completions, without a row's first token."""
    return float(sum(len(ids) - max(prompt_length, 1) for ids, prompt_length in rows))


def collate(rows_by_client: Sequence[Sequence[Row]], rows_per_client: int) -> Batch:
    """Pad the rows of C clients at the right, to the longest of them and to a multiple of 8."""
    longest = max((len(ids) for rows in rows_by_client for ids, _ in rows), default=2)
    width = -(-longest // _PAD_TO_MULTIPLE) * _PAD_TO_MULTIPLE
    shape = (len(rows_by_client) * rows_per_client, width)
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    for client, rows in enumerate(rows_by_client):
        for number, (ids, prompt_length) in enumerate(rows):
            row = client * rows_per_client + number
            input_ids[row, : len(ids)] = ids
            labels[row, prompt_length : len(ids)] = ids[prompt_length:]
    return Batch(torch.from_numpy(input_ids), torch.from_numpy(labels))


def empty(num_clients: int) -> Batch:
    """The smallest batch there is: for a pass that only keeps other processes company."""
    return collate([[] for _ in range(num_clients)], 1)
