"""Classification of own texts: what a record holds, and the labels that are the classes.

A label is a text or an integer. The classes are the same on all processes and in both splits: those
of ``data.labels`` in this order, else the labels of all training files, sorted. Needs no torch.
"""

from __future__ import annotations

import json
import math
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from sfed.config.fields import Label
from sfed.config.sections.data import LEAST_LABELS, MOST_LABELS
from sfed.config.sections.train import TrainSection
from sfed.data.forms.pair import Row, read_row, text_of
from sfed.utils.errors import ConfigError, DataError
from sfed.utils.text import some_of

_PAIR = "text_pair"


class Columns:
    """The columns of a record: a text, perhaps a second one, and a label."""

    def __init__(self, names: Mapping[str, str]) -> None:
        """Read the columns of these names.

        Args:
            names: ``data.columns``.
        """
        self.text, self.label = names.get("text", "text"), names.get("label", "label")
        self.pair = names.get("text_pair")

    @property
    def form(self) -> str:
        """The form of a record, for messages."""
        return ", ".join([*self.texts, self.label])

    @property
    def texts(self) -> tuple[str, ...]:
        """The columns of the texts."""
        return (self.text,) if self.pair is None else (self.text, self.pair)

    def texts_of(self, row: Row) -> tuple[str, str]:
        """The text and the second text of a record, "" where it has none.

        Raises:
            KeyError, TypeError, ValueError: where a column is missing, holds no text, or is a
                second text that nothing asks to read.
        """
        if self.pair is None and row.get(_PAIR) is not None:
            raise ValueError(
                f"it holds {_PAIR!r}, which is not read; set data.columns.{_PAIR}={_PAIR} to read "
                "it, or remove the column"
            )
        return text_of(row, self.text), "" if self.pair is None else text_of(row, self.pair)

    def label_of(self, row: Row) -> Label:
        """The label of a record.

        Raises:
            KeyError, TypeError, ValueError: where there is none.
        """
        label = row[self.label]
        if not isinstance(label, str | int) or isinstance(label, bool):
            raise TypeError(
                f"{self.label!r} holds {_shown(label)}; a label is a text or an integer"
            )
        if not str(label).strip():
            raise ValueError(f"{self.label!r} is empty, so the record has no label")
        return label


def _shown(value: object) -> str:
    return json.dumps(value, default=str, ensure_ascii=False)


def class_reader(columns: Columns, labels: Sequence[Label] | None) -> Callable[[Row], float]:
    """Return what reads the class of a record: the place of its label in ``labels``.

    While these are not known (None) every label is class 0. It raises as ``Columns.label_of`` does,
    and ValueError for a label that is not there.
    """
    # A text is never equal to an integer, and bool is refused before.
    places = {label: float(place) for place, label in enumerate(labels or ())}

    def class_of(row: Row) -> float:
        label = columns.label_of(row)
        if labels is None:
            return 0.0
        if label not in places:
            raise ValueError(
                f"{columns.label!r} is {_shown(label)}, not one of the {len(labels)} labels "
                f"(those of data.labels, or of the training files: {some_of(labels)})"
            )
        return places[label]

    return class_of


def labels_in(rows: Iterable[tuple[str, Any]], columns: Columns) -> Iterator[Label]:
    """Yield each label once, of records given as (place, record).

    Raises:
        DataError: naming the place of a record without a label.
    """
    seen: set[Label] = set()
    for where, row in rows:
        label = read_row(columns.label_of, row, where, columns.form)
        if label not in seen:
            seen.add(label)
            yield label


def ordered(labels: Iterable[Label]) -> tuple[Label, ...]:
    """Return the labels that some files hold as classes: each once, sorted.

    Raises:
        DataError: for texts beside integers, labels that read alike, fewer than two labels or more
            than a thousand.
    """
    distinct = set(labels)
    if not distinct:
        raise DataError("data.train_files: the training files hold no records")
    texts = [label for label in distinct if isinstance(label, str)]
    numbers = [label for label in distinct if isinstance(label, int)]
    if texts and numbers:
        raise DataError(
            f"the labels of the training files are texts ({some_of(sorted(texts))}) and integers "
            f"({some_of(sorted(numbers))}); write them alike"
        )
    if not LEAST_LABELS <= len(distinct) <= MOST_LABELS:
        raise DataError(
            f"the training files hold {len(distinct)} different labels "
            f"({some_of(sorted(texts) or sorted(numbers))}); a classification has {LEAST_LABELS} "
            f"to {MOST_LABELS}: look at the column that data.columns.label names"
        )
    read_alike: dict[str, str] = {}
    for label in sorted(texts):
        other = read_alike.setdefault(_as_read(label), label)
        if other != label:
            raise DataError(
                f"the labels {_shown(other)} and {_shown(label)} of the training files differ in "
                "case, space or coding alone "
                f"({other!a}, {label!a}); write them alike, or name all labels in "
                "data.labels"
            )
    return tuple(sorted(texts)) or tuple(sorted(numbers))


def _as_read(label: str) -> str:
    """A label without case, space, the coding of accents, and letters that are not seen."""
    plain = unicodedata.normalize("NFC", label)
    seen = "".join(letter for letter in plain if unicodedata.category(letter) != "Cf")
    return " ".join(seen.split()).casefold()


def class_weights(
    section: TrainSection, names: Sequence[str], counts: Sequence[int]
) -> list[float] | None:
    """Return the weight of each class in the training loss, as ``train.class_weights`` says.

    The mean of the weights over all training examples is 1.

    Args:
        section: of the configuration.
        names: of the classes.
        counts: training examples of each class, of all clients; a class without any gets 0 where
            weights are balanced.

    Returns:
        None where all classes count the same.

    Raises:
        ConfigError: where the weights are not those of the classes.
    """
    asked = section.class_weights
    if asked == "none":
        return None
    if isinstance(asked, dict):
        for name in asked.keys() ^ set(names):
            problem = "has no weight" if name in names else "is no label"
            raise ConfigError(
                f"train.class_weights: {name!r} {problem}; give a weight to each of "
                f"{some_of(names)}"
            )
        relative = [asked[name] for name in names]
    else:
        relative = [1.0 / count if count else 0.0 for count in counts]
    total = math.fsum(weight * count for weight, count in zip(relative, counts, strict=True))
    return [weight * sum(counts) / total for weight in relative]
