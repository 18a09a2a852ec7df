"""Batches of several clients: who reads which examples, and rows of tokens padded to one length."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from sfed.backbone import IGNORED_LABEL
from sfed.seeds import Stream, generator
from sfed.tokens import Examples, Row

_PAD_TO_MULTIPLE = 8


@dataclass(frozen=True)
class Batch:
    """The rows of C clients in order, equally many for each; what is missing is empty rows.

    Args:
        input_ids: (C * rows, tokens) int64, padded at the right.
        labels: same shape, ``IGNORED_LABEL`` where nothing is supervised.
        positions: (supervised,) int64 places in the flattened rows from which a supervised token is
            predicted; one that is ignored where there is none.
        targets: (C * rows,) fp32 classes or values to predict, NaN for missing rows; None where the
            labels are what is learned.
        is_token: (C * rows, tokens) bool, False on padding; one token of an empty row counts as
            such, since nothing can be attended to otherwise.
        is_second: same shape, True on the second of two texts.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor | None
    is_token: torch.Tensor
    is_second: torch.Tensor

    def to(self, device: torch.device) -> Batch:
        """Move to a device."""
        return Batch(
            self.input_ids.to(device),
            self.labels.to(device),
            self.positions.to(device),
            None if self.targets is None else self.targets.to(device),
            self.is_token.to(device),
            self.is_second.to(device),
        )


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


def supervised_count(rows: Sequence[Row]) -> float:
    """What a mean loss is taken over: rows with a target, or tokens of the completions.

    A row's first token is never predicted.
    """
    return float(
        sum(len(row.ids) - max(row.prompt_length, 1) if row.target is None else 1 for row in rows)
    )


def collate(
    rows_by_client: Sequence[Sequence[Row]], rows_per_client: int, *, with_targets: bool = False
) -> Batch:
    """Pad the rows of C clients at the right, to the longest of them and to a multiple of 8."""
    longest = max((len(row.ids) for rows in rows_by_client for row in rows), default=2)
    width = -(-longest // _PAD_TO_MULTIPLE) * _PAD_TO_MULTIPLE
    shape = (len(rows_by_client) * rows_per_client, width)
    input_ids = np.zeros(shape, dtype=np.int64)
    labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
    targets = np.full(shape[0], np.nan, dtype=np.float32)
    lengths, seconds = np.ones(shape[0], dtype=np.int64), np.full(shape[0], width)
    for client, rows in enumerate(rows_by_client):
        for number, row in enumerate(rows):
            place, length = client * rows_per_client + number, len(row.ids)
            input_ids[place, :length] = row.ids
            lengths[place], seconds[place] = length, row.prompt_length
            if row.target is None:
                labels[place, row.prompt_length : length] = row.ids[row.prompt_length :]
            else:
                targets[place] = row.target
    is_token = np.arange(width) < lengths[:, None]
    return Batch(
        torch.from_numpy(input_ids),
        torch.from_numpy(labels),
        torch.from_numpy(_positions(labels)),
        torch.from_numpy(targets) if with_targets else None,
        torch.from_numpy(is_token),
        torch.from_numpy(is_token & (np.arange(width) >= seconds[:, None])),
    )


def _positions(labels: NDArray[np.int64]) -> NDArray[np.int64]:
    """Where supervised tokens are predicted from; found on the host, so that no device waits."""
    found = np.flatnonzero(labels[:, 1:] != IGNORED_LABEL)
    width = labels.shape[1]
    found = found // (width - 1) * width + found % (width - 1)
    # A pass without any still goes through the head, as under ZeRO-3 all processes must.
    return found if len(found) else np.zeros(1, dtype=np.int64)


def empty(num_clients: int, *, with_targets: bool = False) -> Batch:
    """The smallest batch there is: for a pass that only keeps other processes company."""
    return collate([[] for _ in range(num_clients)], 1, with_targets=with_targets)
