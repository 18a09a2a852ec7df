"""Batches of several clients: who reads which examples, and how these lie in rows of one length.

In a pass every client has equally many rows of one width. Padded, a row holds one example, and the
longest of all sets the width. Packed, a row holds several examples of one client, as documents that
do not see each other.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from sfed.data.packing import UNBOUNDED, Layout, Packing, pack, padded_width
from sfed.data.tokenize import Examples, Row
from sfed.distributed.transfer import to_device
from sfed.utils.rng import Stream, generator, mix

IGNORED_LABEL = -100


@dataclass(frozen=True)
class Documents:
    """Several documents in a row of a batch, of which none sees another."""

    position_ids: torch.Tensor
    """(rows, tokens) int64: from 0 in each document, those that are padding included."""
    starts: torch.Tensor
    """(documents + 1,) int32: first places of the documents in the flattened rows, and the end."""
    lengths: tuple[int, ...]
    """Tokens of each document, known without asking the device."""
    is_masked: bool = False
    """Whether a mask is to keep them apart although attention could go without: it is cheaper."""


@dataclass(frozen=True)
class Batch:
    """The rows of C clients in order, equally many for each; what is missing is empty rows.

    Args:
        input_ids: (C * rows, tokens) int64, padded at the right.
        labels: same shape, ``IGNORED_LABEL`` where nothing is supervised.
        positions: (supervised,) int64 places in the flattened rows from which a supervised token is
            predicted; one that is ignored where there is none.
        targets: (C * rows,) fp32 classes or values to predict, NaN where a row has none.
        is_token: (C * rows, tokens) bool, False on padding; one token of an empty row counts as
            such, since nothing can be attended to otherwise.
        is_second: same shape, True on the second of two texts.
        documents: where the examples of packed rows begin; None where a row is one example.
        places: (C * rows, tokens) uint64, on the host: the number of a token's example among those
            of its client times 2^32, plus its position in the example.
        token_keys: same shape, int64: what a token's dropout masks follow from; None without.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    positions: torch.Tensor
    targets: torch.Tensor
    is_token: torch.Tensor
    is_second: torch.Tensor
    documents: Documents | None
    places: NDArray[np.uint64]
    token_keys: torch.Tensor | None = None

    @property
    def slots(self) -> int:
        """Tokens that a pass computes, padding included."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Move to a device, in one copy."""
        own = {name: one for name, one in vars(self).items() if isinstance(one, torch.Tensor)}
        told = self.documents
        if told is not None:
            own |= {"position_ids": told.position_ids, "starts": told.starts}
        moved: dict[str, Any] = to_device(own, device)
        if told is not None:
            places = (moved.pop("position_ids"), moved.pop("starts"))
            moved["documents"] = Documents(*places, told.lengths, told.is_masked)
        return dataclasses.replace(self, **moved)

    def with_keys(self, seeds: Sequence[int], first: int = 0) -> Batch:
        """Give every token a key that follows from its client's seed and its place.

        Args:
            seeds: (C,) of each client, below 2^63; used for these examples alone.
            first: number of each client's first example among those that share its seed.
        """
        seeds_C = np.array(seeds, dtype=np.uint64)
        places = self.places + (np.uint64(first) << np.uint64(32))
        keys = mix(seeds_C[:, None] + mix(places).reshape(len(seeds), -1))
        token_keys = torch.from_numpy(keys.view(np.int64).reshape(self.places.shape))
        return dataclasses.replace(self, token_keys=token_keys)


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
        sum(np.count_nonzero(row.is_learned[1:]) if row.target is None else 1 for row in rows)
    )


def collate(
    rows_by_client: Sequence[Sequence[Row]],
    rows_per_client: int,
    packing: Packing | None = None,
    context: int = UNBOUNDED,
) -> Batch:
    """Lay the examples of C clients into rows as long as the longest, and a multiple of 8.

    Args:
        rows_by_client: the examples of each client.
        rows_per_client: rows of a padded batch, at least as many as a client has examples.
        packing: lay several examples into a row where that is cheaper; None = never.
        context: of the model, in tokens; padding goes no further.
    """
    lengths_by_client = [[len(row.ids) for row in rows] for rows in rows_by_client]
    layout, is_packed = _laid_out(lengths_by_client, rows_per_client, packing, context)
    if is_packed:
        rows_per_client = max(map(len, layout.lines))
    filling = _Filling(len(rows_by_client) * rows_per_client, layout.width)
    for client, (rows, lines) in enumerate(zip(rows_by_client, layout.lines, strict=True)):
        for place, line in enumerate(lines, start=client * rows_per_client):
            filling.fill(place, {number: rows[number] for number in line})
    documents = filling.documents(is_masked=layout.is_masked) if is_packed else None
    return filling.batch(documents)


@dataclass(frozen=True)
class PassSize:
    """What a pass computes."""

    slots: int
    """Tokens, padding included."""
    places: float
    """To which attention attends for each of them, at the rate of matrix products: under a mask all
    of a row, at half the rate."""


def pass_size(
    lengths_by_client: Sequence[Sequence[int]],
    rows_per_client: int,
    packing: Packing | None,
    context: int = UNBOUNDED,
) -> PassSize:
    """The size of the batch that ``collate`` makes of examples of these lengths."""
    layout, is_packed = _laid_out(lengths_by_client, rows_per_client, packing, context)
    rows = max(map(len, layout.lines)) if is_packed else rows_per_client
    seen = 2 * layout.width if layout.is_masked else _width(lengths_by_client, context) / 2
    return PassSize(len(lengths_by_client) * rows * layout.width, seen)


def _laid_out(
    lengths_by_client: Sequence[Sequence[int]],
    rows_per_client: int,
    packing: Packing | None,
    context: int,
) -> tuple[Layout, bool]:
    """The rows of a pass, and whether they hold several examples."""
    if packing is not None:
        packed = pack(lengths_by_client, rows_per_client, packing, context)
        if packed is not None:
            return packed, True
    lines = [[[number] for number in range(len(lengths))] for lengths in lengths_by_client]
    return Layout(_width(lengths_by_client, context), lines, is_masked=False), False


def _width(lengths_by_client: Sequence[Sequence[int]], context: int) -> int:
    """Tokens of padded rows."""
    longest = max((length for lengths in lengths_by_client for length in lengths), default=2)
    return padded_width(longest, context)


class _Filling:
    """The arrays of a batch while examples are laid into them, on the host."""

    def __init__(self, num_rows: int, width: int) -> None:
        shape = (num_rows, width)
        self._input_ids = np.zeros(shape, dtype=np.int64)
        self._labels = np.full(shape, IGNORED_LABEL, dtype=np.int64)
        self._targets = np.full(num_rows, np.nan, dtype=np.float32)
        self._is_token = np.zeros(shape, dtype=bool)
        self._is_token[:, 0] = True
        self._is_second = np.zeros(shape, dtype=bool)
        self._position_ids = np.tile(np.arange(width), (num_rows, 1))
        self._examples = np.zeros(shape, dtype=np.uint64)
        self._predicted_from = [np.zeros(0, dtype=np.int64)]

    def fill(self, place: int, rows: Mapping[int, Row]) -> None:
        """Lay examples, by their numbers, into a row of the batch, one behind the other."""
        width, start = self._labels.shape[1], 0
        for number, row in rows.items():
            length, prompt = len(row.ids), row.prompt_length
            here = slice(start, start + length)
            self._input_ids[place, here] = row.ids
            self._is_token[place, here] = True
            self._is_second[place, start + prompt : start + length] = True
            self._position_ids[place, here] = np.arange(length)
            self._examples[place, here] = number
            if row.target is None:
                learned = np.flatnonzero(row.is_learned)
                self._labels[place, start + learned] = row.ids[learned]
                # Nothing predicts the first token of an example, not even the one before it.
                self._predicted_from.append(place * width + start + learned[learned > 0] - 1)
            else:
                self._targets[place] = row.target
            start += length
        # Padding counts as documents no longer than the row's own: a position that no document
        # has would change the rotary embeddings of all, where these follow the largest.
        longest = max((len(row.ids) for row in rows.values()), default=width)
        self._position_ids[place, start:] = np.arange(width - start) % longest

    def batch(self, documents: Documents | None) -> Batch:
        """The filled batch."""
        positions = np.concatenate(self._predicted_from)
        # A pass without any still goes through the head, as under ZeRO-3 all processes must.
        positions = positions if len(positions) else np.zeros(1, dtype=np.int64)
        return Batch(
            torch.from_numpy(self._input_ids),
            torch.from_numpy(self._labels),
            torch.from_numpy(positions),
            torch.from_numpy(self._targets),
            torch.from_numpy(self._is_token),
            torch.from_numpy(self._is_second),
            documents,
            (self._examples << np.uint64(32)) + self._position_ids.astype(np.uint64),
        )

    def documents(self, *, is_masked: bool) -> Documents:
        """The examples, and the padding of the rows."""
        starts = np.append(np.flatnonzero(self._position_ids == 0), self._position_ids.size)
        return Documents(
            torch.from_numpy(self._position_ids),
            torch.from_numpy(starts.astype(np.int32)),
            tuple(np.diff(starts).tolist()),
            is_masked,
        )
