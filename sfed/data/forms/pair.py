"""What a row becomes: a prompt that is read and a completion that is learned, or two texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeVar

from sfed.utils.errors import DataError

T = TypeVar("T")
Row = Mapping[str, Any]
Span = tuple[int, int]
"""First character and the one after the last."""


@dataclass(frozen=True)
class Pair:
    """A prompt, which is only read, and its completion, which is learned; or two texts."""

    prompt: str
    completion: str
    target: float | None = None
    """The class or value to predict, or the number that a worked answer ends in."""
    read: tuple[Span, ...] = ()
    """Spans of the completion, in order, that are only read too: what stands between two answers of
    a conversation, and behind the last."""
    is_chat: bool = False
    """Whether a chat template has set all marks, so that the tokenizer adds none."""


def conversation(text: str, answers: Sequence[Span]) -> Pair:
    """A text of which some spans, at least one, are learned.

    Args:
        text: as the chat template renders it.
        answers: spans of it, in order, none empty, none overlapping another.
    """
    start = answers[0][0]
    edges = [*answers, (len(text), len(text))]
    between = [
        (end - start, following - start)
        for (_, end), (following, _) in pairwise(edges)
        if end < following
    ]
    return Pair(text[:start], text[start:], read=tuple(between), is_chat=True)


class Columns(Row):
    """A row under our names of its columns; notes which of its own are read and hold something."""

    def __init__(self, row: Row, names: Mapping[str, str] | None = None) -> None:
        self._row = row
        self._names = names or {}
        self.used: set[str] = set()

    @property
    def plain(self) -> Row:
        """The row itself; what is read of it is not noted."""
        return self._row

    def renamed(self, names: Mapping[str, str]) -> Columns:
        """The same row under other names; what is read of it is noted in both."""
        other = Columns(self._row, names)
        other.used = self.used
        return other

    def own_name(self, name: str) -> str:
        """The row's own name of a column."""
        return self._names.get(name, name)

    def __getitem__(self, name: str) -> Any:
        own = self.own_name(name)
        value = self._row[own]
        if value is not None:
            self.used.add(own)
        return value

    def __iter__(self) -> Iterator[str]:
        return iter(self._row)

    def __len__(self) -> int:
        return len(self._row)


def read_row(read: Callable[[Row], T], row: Any, where: str, form: str) -> T:
    """Read something of a row.

    Args:
        read: raises KeyError, TypeError or ValueError where the row is not of its form.
        row: as a file holds it.
        where: it stands, for messages.
        form: that is expected, for messages.

    Raises:
        DataError: naming the place and the form.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: it holds {type(row).__name__}; expected {form}")
    try:
        return read(row)
    except DataError as error:
        raise DataError(f"{where}: {error}") from None
    except KeyError as missing:
        raise DataError(f"{where}: no key {missing}; expected {form}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}; expected {form}") from None


def text_of(row: Row, name: str) -> str:
    """The text in a column.

    Raises:
        KeyError: where there is no such column.
        TypeError: where it holds anything else.
    """
    value = row[name]
    if not isinstance(value, str):
        own = row.own_name(name) if isinstance(row, Columns) else name
        raise TypeError(f"{own!r} holds {type(value).__name__}, not text")
    return value
