"""The tasks as data: where the rows come from and how a row becomes something to learn.

A row of a text task becomes a ``Pair`` whose completion is supervised; a row of a classification
task becomes a ``Pair`` of one or two texts with a target. Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from sfed.config.fields import Label
from sfed.config.schema import Config
from sfed.config.sections.data import DataSection
from sfed.data.classification import Columns, class_reader
from sfed.data.forms import prompts
from sfed.data.forms.pair import Pair, Row, read_row, text_of
from sfed.data.forms.prompts import Written
from sfed.data.forms.text import Render, TextForms
from sfed.data.scores import final_number
from sfed.files.readers import MOST_CHARACTERS, too_long
from sfed.utils.errors import DataError


@dataclass(frozen=True)
class Task:
    """One kind of example."""

    to_pair: Callable[[Row], Pair]
    """Raises KeyError, TypeError or ValueError where the row is not of this form."""
    form: str
    """The form of a row, for messages."""
    hub: str | None = None
    hub_config: str | None = None
    eval_splits: tuple[str, ...] = ()
    """Held-out splits of the hub's data set; the scores of each are kept apart too."""
    classes: tuple[str, ...] | None = None
    """Names of the classes; () = a value to regress on; None = the completion is learned."""
    scores: tuple[str, ...] = ()
    """Names in ``sfed.data.scores``, the main one first."""
    written: tuple[Written, ...] = ()
    """How its examples are written, but for conversations, whose template is the model's."""
    texts: tuple[str, ...] = ()
    """The columns of the texts that are classified: one, or two."""
    labels: tuple[Label, ...] | None = None
    """What the data hold for each class; None = the number of the class."""

    @property
    def is_classification(self) -> bool:
        """Whether a head on the model is trained to predict the target."""
        return self.classes is not None

    @property
    def has_pair(self) -> bool:
        """Whether two texts are read."""
        return len(self.texts) > 1

    @property
    def needs(self) -> str:
        """What a row without which is left out."""
        return f"text in {' or '.join(map(repr, self.texts))}" if self.texts else "completion"

    @property
    def num_outputs(self) -> int:
        """Outputs of the classification head; 1 for a value."""
        if self.labels == ():
            raise AssertionError("the labels have not been read (splits.with_labels)")
        return len(self.classes or ()) or 1

    @property
    def loss_unit(self) -> str:
        """What a loss is a mean over: a supervised token, or an example."""
        return "example" if self.is_classification else "token"

    @property
    def loss_in_words(self) -> str:
        """What a loss is, for persons."""
        regresses = self.is_classification and not self.classes
        return "squared error" if regresses else f"nats per {self.loss_unit}"


def _worked_answer(row: Row) -> Pair:
    pair = prompts.question(row)
    number = final_number(pair.completion)
    return Pair(pair.prompt, pair.completion, None if number is None else float(number))


def _sentences(keys: tuple[str, ...], num_classes: int) -> Callable[[Row], Pair]:
    """Read one or two texts and their class, or their value where there are no classes."""

    def to_pair(row: Row) -> Pair:
        texts = [text_of(row, key) for key in keys]
        label = row["label"]
        is_number = isinstance(label, int | float) and not isinstance(label, bool)
        if not is_number or not abs(label) <= sys.float_info.max:
            raise TypeError(f"'label' holds {label!r}, not a number")
        if num_classes and label not in range(num_classes):
            raise ValueError(
                f"'label' is {label}, not one of 0 to {num_classes - 1} (the test files of GLUE "
                "hold no labels)"
            )
        return Pair(texts[0], "".join(texts[1:]), float(label))

    return to_pair


def _glue(
    name: str,
    keys: str,
    classes: str,
    scores: str = "accuracy",
    eval_splits: tuple[str, ...] = ("validation",),
) -> Task:
    """One task of GLUE (arXiv 1804.07461) with its standard scores."""
    columns, names = tuple(keys.split()), tuple(classes.split())
    meaning = ", ".join(f"{i} {word}" for i, word in enumerate(names)) or "a value"
    return Task(
        _sentences(columns, len(names)),
        f"{', '.join(columns)}, label ({meaning})",
        "nyu-mll/glue",
        name,
        eval_splits,
        names,
        tuple(scores.split()),
        texts=columns,
        written=(Written(*[f"{{{column}}}" for column in columns]),),
    )


_MNLI_SPLITS = ("validation_matched", "validation_mismatched")
GLUE: dict[str, Task] = {
    "cola": _glue("cola", "sentence", "unacceptable acceptable", "matthews accuracy"),
    "sst2": _glue("sst2", "sentence", "negative positive"),
    "mrpc": _glue("mrpc", "sentence1 sentence2", "not_equivalent equivalent", "accuracy f1"),
    "qqp": _glue("qqp", "question1 question2", "not_duplicate duplicate", "accuracy f1"),
    "stsb": _glue("stsb", "sentence1 sentence2", "", "pearson spearman"),
    "mnli": _glue(
        "mnli", "premise hypothesis", "entailment neutral contradiction", eval_splits=_MNLI_SPLITS
    ),
    "qnli": _glue("qnli", "question sentence", "entailment not_entailment"),
    "rte": _glue("rte", "sentence1 sentence2", "entailment not_entailment"),
}

TASKS: dict[str, Task] = {
    "demo": Task(prompts.question, "question, answer", written=(prompts.QUESTION,)),
    "gsm8k": Task(
        _worked_answer,
        "question, answer",
        "openai/gsm8k",
        "main",
        ("test",),
        scores=("exact_match",),
        written=(prompts.QUESTION,),
    ),
    "alpaca": Task(
        prompts.instruction,
        "instruction, input (may be empty), output",
        "tatsu-lab/alpaca",
        written=(prompts.INSTRUCTION, prompts.INSTRUCTION_WITH_INPUT),
    ),
    "text": Task(TextForms().to_pair, TextForms().expected),
}
TASKS["jsonl"] = TASKS["text"]  # its older name


def _own_texts(section: DataSection) -> Task:
    """Classification of own texts; without classes while nothing names the labels."""
    columns, labels = Columns(section.column_names), section.labels or ()
    class_of = class_reader(columns, section.labels)
    return Task(
        lambda row: Pair(*columns.texts_of(row), class_of(row)),
        columns.form,
        classes=tuple(map(str, labels)),
        scores=("accuracy", "macro_f1", "matthews"),
        texts=columns.texts,
        labels=labels,
    )


def task_of(config: Config, render: Render | None = None) -> Task:
    """The configured task.

    Args:
        config: of the run.
        render: makes text of a conversation; None where no row is read.

    The classes of own texts are those of ``data.labels``, which ``splits.with_labels`` fills in.
    """
    if config.data.task == "classification":
        return _own_texts(config.data)
    if config.data.is_text:
        forms = TextForms.of(config.data, render)
        return replace(
            TASKS["text"], to_pair=forms.to_pair, form=forms.expected, written=forms.written
        )
    return TASKS[config.data.task] if config.data.name is None else GLUE[config.data.name]


def checked_pair(task: Task, row: Any, where: str, most_characters: int = MOST_CHARACTERS) -> Pair:
    """Turn one row into a pair.

    Args:
        task: of the run.
        row: as it was read.
        where: it stands, for messages.
        most_characters: longest text (``data.max_row_characters``).

    Raises:
        DataError: naming the place and the form that is expected.
    """
    pair = read_row(task.to_pair, row, where, task.form)
    if (length := len(pair.prompt) + len(pair.completion)) > most_characters:
        raise DataError(f"{where}: {too_long(length, most_characters)}")
    try:
        (pair.prompt + pair.completion).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: it holds half a surrogate pair, which is no text") from None
    return pair
