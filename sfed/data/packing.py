"""Which examples share a row of a pass, and how wide the rows are. Plain numbers; needs no torch.

All clients of a pass have equally many rows of one width, since the adapters are a product batched
over clients. Packed rows have fewer empty slots. But where documents are kept apart by a mask,
attention computes all pairs of places in a row, not half of them, so wide rows cost more a slot;
and where attention takes one document after another, each costs some time of its own.
Of all numbers of rows the cheapest is taken, each with the least width that holds every client's
examples and the cheaper way to keep them apart; padded rows, one for each example, where none is
cheaper.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

PAD_TO_MULTIPLE = 8
UNBOUNDED = 2**31
"""Context of a model that has no longest sequence."""
# A width that does not do is raised by this share of itself, or by PAD_TO_MULTIPLE.
_STEP = 1 / 32

Lines = list[list[int]]
"""The rows of one client: numbers of the examples in each."""


@dataclass(frozen=True)
class Packing:
    """What a model says about packed rows."""

    widest: int
    """Tokens that a row may have: the model's context, where it was not seen to read wider rows."""
    even_width: float
    """Width at which attention under a mask takes as long as all matrix products of a token."""
    document_slots: float = math.inf
    """What a document of its own costs attention without a mask, in slots without attention: 0
    where one kernel computes them all, inf where there has to be a mask."""

    def cost(self, slots: int, seen_width: float) -> float:
        """Time of a pass, in slots without attention, where a slot attends to so many places."""
        return slots * (1.0 + seen_width / self.even_width)

    def all_in_one(self) -> list[Packing]:
        """For each way in which this one may keep documents apart, one that packs all it can."""
        ways = [0.0] if self.document_slots < math.inf else []
        ways += [math.inf] if self.document_slots > 0 else []
        return [Packing(UNBOUNDED, math.inf, slots) for slots in ways]

    def widest_row(self, padded_rows: int, padded_width: int) -> int:
        """Bound the width of the rows that ``pack`` chooses over so many padded ones.

        The widest is a row that holds everything. Under a mask w (1 + w / even_width) < cost of the
        padded rows.
        """
        widest = min(self.widest, padded_rows * padded_width)
        if self.document_slots < math.inf:
            return widest
        padded = self.cost(padded_rows * padded_width, padded_width / 2)
        width = 2 * padded / (1 + math.sqrt(1 + 4 * padded / self.even_width))
        return min(widest, math.floor(width))


@dataclass(frozen=True)
class Layout:
    """The rows of a packed pass."""

    width: int
    lines: list[Lines]
    """Of each client."""
    is_masked: bool
    """Whether a mask keeps the examples apart at less cost than attention of each by itself."""


def round_up(tokens: int) -> int:
    """The next width that is a multiple of 8."""
    return -(-tokens // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE


def round_down(tokens: int) -> int:
    """The last width that is a multiple of 8, or 8."""
    return max(1, tokens // PAD_TO_MULTIPLE) * PAD_TO_MULTIPLE


def padded_width(longest: int, context: int = UNBOUNDED) -> int:
    """The width of rows of one example each: a multiple of 8, or the model's context before it.

    A table of positions has no entries behind the context, for padding neither.

    Args:
        longest: tokens of the longest example.
        context: of the model, in tokens.
    """
    return min(round_up(longest), max(longest, context))


def pack(
    lengths_by_client: Sequence[Sequence[int]],
    padded_rows: int,
    packing: Packing,
    context: int = UNBOUNDED,
) -> Layout | None:
    """Choose width and rows of a packed pass.

    Args:
        lengths_by_client: tokens of each example of each client.
        padded_rows: rows of a client without packing.
        packing: of the model.
        context: of the model, in tokens.

    Returns:
        None where padded rows cost no more.
    """
    longest = max((length for lengths in lengths_by_client for length in lengths), default=0)
    most = max(map(sum, lengths_by_client))
    examples = sum(map(len, lengths_by_client)) / len(lengths_by_client)
    padded = padded_width(longest, context)

    def costs(num_rows: int, width: int) -> tuple[float, float]:
        """Of a client's rows without a mask, where their padding is a document too; and under one.

        Without, a token sees no more than in padded rows.
        """
        apart = packing.document_slots * (examples + num_rows)
        apart += packing.cost(num_rows * width, padded / 2)
        return apart, packing.cost(num_rows * width, width)

    best, least = None, packing.cost(padded_rows * padded, padded / 2)
    for num_rows in range(1, padded_rows):
        width = max(padded, round_up(-(-most // num_rows)))
        while (
            width <= packing.widest
            and num_rows * width < padded_rows * padded
            and min(costs(num_rows, width)) < least
        ):
            lines = [first_fit_decreasing(lengths, width) for lengths in lengths_by_client]
            if max(map(len, lines)) <= num_rows:
                apart, masked = costs(num_rows, width)
                best, least = Layout(width, lines, masked < apart), min(apart, masked)
            else:
                width = round_up(max(width + 1, math.ceil(width * (1 + _STEP))))
    return best


def first_fit_decreasing(lengths: Sequence[int], width: int) -> Lines:
    """Group examples so that each group fits into the width: the longest first, where they fit.

    It takes at most 11/9 of the fewest groups, and 6/9 of one (Dosa 2007).
    """
    groups: Lines = []
    room: list[int] = []
    for number in sorted(range(len(lengths)), key=lambda number: -lengths[number]):
        length = lengths[number]
        place = next((i for i, left in enumerate(room) if left >= length), len(groups))
        if place == len(groups):
            groups.append([])
            room.append(width)
        groups[place].append(number)
        room[place] -= length
    return groups
