"""Where the parameters of a client's adapter stand in its flat row."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch

# Layers of one module that read the same input in every model that calls them so.
_SHARED_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


_ROW_MULTIPLE = 64
"""Numbers: rows begin at multiples of 128 bytes or more. At an address that is no multiple of 16
bytes, matrix products on a GPU take slower kernels."""


def zero_rows(
    num_rows: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return zeros of shape (num_rows, width); rows are a multiple of 64 numbers apart."""
    stride = -(-width // _ROW_MULTIPLE) * _ROW_MULTIPLE
    return torch.zeros(num_rows, stride, dtype=dtype, device=device)[:, :width]


@dataclass(frozen=True)
class Piece:
    """One factor of one layer, or one weight of the head, within a row."""

    layer: str
    """Name of the layer; of the weight, for the head."""
    factor: str
    """A, B or head."""
    shape: tuple[int, ...]
    start: int

    @property
    def end(self) -> int:
        """First position after the piece."""
        return self.start + math.prod(self.shape)

    def of(self, rows: torch.Tensor) -> torch.Tensor:
        """View it in rows of numbers: (rows, *shape)."""
        return rows[:, self.start : self.end].view(-1, *self.shape)

    def has_room_for(self, shape: Sequence[int]) -> bool:
        """Whether this shape is that of the factor, with its LoRA rank or with a smaller one."""
        along = "AB".find(self.factor)  # the dimension of the rank, which a head has not
        return len(shape) == len(self.shape) and all(
            size == most or (place == along and size < most)
            for place, (size, most) in enumerate(zip(shape, self.shape, strict=True))
        )

    def within(self, layout: Layout, values: torch.Tensor) -> torch.Tensor:
        """View it in flat values of its factor alone: (parameters of the factor,) -> shape."""
        start = self.start - layout.columns(self.factor).start
        return values[start : start + math.prod(self.shape)].view(self.shape)


@dataclass(frozen=True)
class Layout:
    """Where each factor stands in a client's row, which has room for the largest LoRA rank.

    A client of a smaller rank has zeros beyond it: in the last rows of A and the last columns of B.
    """

    pieces: tuple[Piece, ...]
    size: int
    ranks: tuple[int, ...] = ()
    """(N,) LoRA rank of each client; empty where all have the largest."""
    b_scales: tuple[float, ...] = ()
    """(N,) what each client multiplies the common B by when it takes it; empty = 1 of all."""

    @property
    def lora_rank(self) -> int:
        """The largest rank: R."""
        return next(piece.shape[0] for piece in self.pieces if piece.factor == "A")

    @property
    def has_mixed_ranks(self) -> bool:
        """Whether some client has a smaller rank than another."""
        return len(set(self.ranks)) > 1

    def rank_of(self, client: int) -> int:
        """The LoRA rank of a client."""
        return self.ranks[client] if self.ranks else self.lora_rank

    def along_rank(self, factor: str, rows: torch.Tensor) -> Iterator[torch.Tensor]:
        """Views of a factor of each layer, the dimension of the rank last; none of the head.

        Args:
            factor: A, B or head.
            rows: (C, parameters of the factor).

        Yields:
            (C, in, R) of an A, (C, out, R) of a B.
        """
        first = self.columns(factor).start
        for piece in self.pieces:
            if piece.factor == factor != "head":
                view = rows[:, piece.start - first : piece.end - first].view(-1, *piece.shape)
                yield view.transpose(1, 2) if factor == "A" else view

    def clear_padding(self, clients: Sequence[int], factor: str, rows: torch.Tensor) -> None:
        """Set to 0, in place, what lies beyond the ranks of these clients.

        Args:
            clients: C of them.
            factor: A, B or head.
            rows: (C, parameters of the factor), a row for each of them.
        """
        ranks = [self.rank_of(client) for client in clients]
        if min(ranks) == self.lora_rank:
            return
        numbers_R = torch.arange(self.lora_rank, device=rows.device)
        beyond_CR = numbers_R >= torch.tensor(ranks, device=rows.device)[:, None]
        for view in self.along_rank(factor, rows):
            view.masked_fill_(beyond_CR[:, None], 0.0)

    def take_common(self, clients: Sequence[int], factor: str, rows: torch.Tensor) -> None:
        """Make of a common factor what these clients hold of it, in place.

        Args:
            clients: C of them.
            factor: A, B or head.
            rows: (C, parameters of the factor), the common value in each row.
        """
        if factor == "B" and self.b_scales:
            scales = [self.b_scales[client] for client in clients]
            rows.mul_(torch.tensor(scales, dtype=rows.dtype, device=rows.device)[:, None])
        self.clear_padding(clients, factor, rows)

    def takes_all(self, client: int) -> bool:
        """Whether a client holds of a common factor all of it, as it is."""
        scale = self.b_scales[client] if self.b_scales else 1.0
        return scale == 1.0 and self.rank_of(client) == self.lora_rank

    @property
    def factors(self) -> tuple[str, ...]:
        """A, B, and head where there is one."""
        return tuple(dict.fromkeys(piece.factor for piece in self.pieces))

    def columns(self, factor: str) -> slice:
        """The columns of a row that hold all A, all B or the head; none where there is no head."""
        own = [piece for piece in self.pieces if piece.factor == factor]
        return slice(own[0].start, own[-1].end) if own else slice(self.size, self.size)

    def spans(self, factors: Sequence[str]) -> list[slice]:
        """The columns of some factors, as few slices as it goes."""
        merged: list[slice] = []
        for columns in sorted((self.columns(factor) for factor in factors), key=_start):
            if merged and merged[-1].stop == columns.start:
                columns = slice(merged.pop().start, columns.stop)
            merged.append(columns)
        return merged

    def with_the_same_input(self) -> Iterator[list[Piece]]:
        """The A factors of layers that read the same input, which follow one another."""
        a_pieces = (piece for piece in self.pieces if piece.factor == "A")
        for _, some in groupby(a_pieces, key=lambda piece: (_place(piece.layer)[0], piece.shape)):
            yield list(some)

    @staticmethod
    def of(
        shapes: Sequence[tuple[str, int, int]],
        lora_rank: int,
        head: Mapping[str, tuple[int, ...]] | None = None,
    ) -> Layout:
        """Lay out layers given as (name, in, out), in the order of ``_place``, then the head.

        Args:
            shapes: of the adapted layers.
            lora_rank: r.
            head: shape of each weight of the classification head.
        """
        layers = sorted(shapes, key=lambda shape: _place(shape[0]))
        planned: list[tuple[str, str, tuple[int, ...]]] = [
            *((name, "A", (lora_rank, in_features)) for name, in_features, _ in layers),
            *((name, "B", (out_features, lora_rank)) for name, _, out_features in layers),
            *((name, "head", shape) for name, shape in sorted((head or {}).items())),
        ]
        pieces: list[Piece] = []
        position = 0
        for name, factor, shape in planned:
            pieces.append(Piece(name, factor, shape, position))
            position = pieces[-1].end
        return Layout(tuple(pieces), position)


def _start(columns: slice) -> int:
    return int(columns.start)


def _place(name: str) -> tuple[str, int]:
    """What layers are sorted by: names, and those with the same input as the first of them."""
    parent, _, leaf = name.rpartition(".")
    shared = next((names for names in _SHARED_INPUT if leaf in names), (leaf,))
    return f"{parent}.{shared[0]}", shared.index(leaf)
