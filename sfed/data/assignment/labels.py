"""What a split goes by: the value of a column, the class, or the length of each example."""

from __future__ import annotations

import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfed.config.schema import Config
from sfed.data import partition
from sfed.data.partition import Indices
from sfed.data.tokenize import Tokens
from sfed.utils.errors import DataError
from sfed.utils.text import some_of


@dataclass(frozen=True)
class Chosen:
    """Some rows of a table."""

    table: Tokens
    rows: Indices


@dataclass(frozen=True)
class Labels:
    """A label for each training and each held-out row."""

    names: list[str]
    of_train: Indices
    of_eval: Indices
    """-1 where no training row has this value: such rows belong to nobody."""
    notes: list[str]
    """What a person should know."""


def labels_of(config: Config, train: Chosen, held_out: Chosen | None) -> Labels:
    """Return the labels by which rows are dealt.

    With ``partition.key`` a label is a value of that column; without one, the class of an example
    where it has one, else a quantile of the length in tokens, which stands for the kind of
    instruction (short answers, long texts).

    Raises:
        DataError: where values of the column that differ cannot be told apart, or equal ones are
            written in two ways.
    """
    if train.table.keys is not None:
        return _of_values(config, train, held_out)
    edges = partition.length_edges(train.table.lengths[train.rows])
    names = [f"length quantile {i + 1}" for i in range(partition.LENGTH_QUANTILES)]
    eval_lengths = np.arange(0) if held_out is None else held_out.table.lengths[held_out.rows]
    of_train = np.digitize(train.table.lengths[train.rows], edges)
    return Labels(names, of_train, np.digitize(eval_lengths, edges), [])


def _of_values(config: Config, train: Chosen, held_out: Chosen | None) -> Labels:
    what = "the class" if config.partition.key is None else f"partition.key={config.partition.key}"
    form_of = _forms(train.table, what)
    train_values = _values(train)
    names = sorted(set(train_values))
    number = {name: label for label, name in enumerate(names)}
    notes = [_note_on_nothing(train_values, form_of, f"training rows have no value of {what}")]
    eval_labels: list[int] = []
    if held_out is not None:
        eval_form_of = _forms(held_out.table, what)
        _refuse_other_types(form_of, eval_form_of, what)
        number_of_form = {form_of[name]: label for name, label in number.items()}
        eval_values = _values(held_out)
        eval_labels = [number_of_form.get(eval_form_of[value], -1) for value in eval_values]
        notes += [
            _note_on_nothing(eval_values, eval_form_of, f"held-out rows have no value of {what}"),
            _note_on_nobodys(eval_values, eval_labels, what),
        ]
    of_train = _array([number[value] for value in train_values])
    return Labels(names, of_train, _array(eval_labels), [note for note in notes if note])


def _values(chosen: Chosen) -> list[str]:
    keys = chosen.table.keys or ()
    return [keys[row] for row in chosen.rows]


def _array(values: Sequence[int]) -> Indices:
    return np.asarray(values, dtype=np.int64)


def _forms(table: Tokens, what: str) -> dict[str, str]:
    """Text of a value -> its JSON form, one to one."""
    for text, forms in table.key_forms.items():
        if len(forms) > 1:
            raise DataError(
                f"{what}: {' and '.join(forms)} are values of different types that read the same, "
                f"{text}; write them alike, or apart"
            )
    form_of = {text: forms[0] for text, forms in table.key_forms.items()}
    text_of: dict[str, str] = {}
    as_read: dict[str, str] = {}
    for text, form in form_of.items():
        _refuse_other_coding(
            as_read.setdefault(unicodedata.normalize("NFC", text), text), text, what
        )
        if (other := text_of.setdefault(form, text)) != text:
            raise DataError(
                f"{what}: {other} and {text} are one value that is written in two ways; write it "
                "in one"
            )
    return form_of


def _refuse_other_coding(one: str, other: str, what: str) -> None:
    """Refuse accents that are written in two ways: a person sees one value.

    Args:
        one: a value with the same letters as the other.
        other: which may be the same.
        what: is read, for the message.
    """
    if one != other:
        raise DataError(
            f"{what}: {one!a} and {other!a} are the same letters in two codings; write "
            "them in one, such as by unicodedata.normalize('NFC', value) of Python"
        )


def _refuse_other_types(train: dict[str, str], held_out: dict[str, str], what: str) -> None:
    as_read = {unicodedata.normalize("NFC", text): text for text in train}
    for text in sorted(held_out):
        _refuse_other_coding(as_read.get(unicodedata.normalize("NFC", text), text), text, what)
    for text in sorted(train.keys() & held_out.keys()):
        if train[text] != held_out[text]:
            raise DataError(
                f"{what}: the training data hold {train[text]} and the held-out data "
                f"{held_out[text]}, which are not equal; write them alike"
            )


def _note_on_nothing(values: Sequence[str], form_of: dict[str, str], what: str) -> str:
    """Rows without a value are dealt by that, as by any other: a person may not expect it."""
    nothing = {text for text, form in form_of.items() if _is_nothing(form)}
    found = Counter(value for value in values if value in nothing)
    if not found:
        return ""
    kinds = ", ".join(form_of[value] for value in sorted(found))
    return f"{found.total()} {what} ({kinds}); they are dealt by it all the same"


def _is_nothing(form: str) -> bool:
    """Whether a JSON form is null, NaN or a text of nothing but space."""
    return form in ("null", "NaN") or (form.startswith('"') and not json.loads(form).strip())


def _note_on_nobodys(values: Sequence[str], labels: Sequence[int], what: str) -> str:
    nobodys = [value for value, label in zip(values, labels, strict=True) if label < 0]
    if not nobodys:
        return ""
    return (
        f"{len(nobodys)} of {len(values)} held-out rows belong to no client and are not evaluated: "
        f"no training row has their value of {what} ({some_of(sorted(set(nobodys)))})"
    )
