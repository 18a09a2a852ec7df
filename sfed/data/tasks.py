"""The tasks as data: where the rows come from and how a row becomes something to learn.

A row of a text task becomes a ``Pair`` whose completion is supervised; a row of a classification
task becomes a ``Pair`` of one or two texts with a target. Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sfed.config.schema import Config
from sfed.data.scores import final_number
from sfed.utils.errors import DataError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A prompt, which is only read, and its completion, which is learned; or two texts."""

    prompt: str
    completion: str
    target: float | None = None
    """The class or value to predict, or the number that a worked answer ends in."""


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

    @property
    def is_classification(self) -> bool:
        """Whether a head on the model is trained to predict the target."""
        return self.classes is not None

    @property
    def num_outputs(self) -> int:
        """Outputs of the classification head; 1 for a value."""
        return len(self.classes or ()) or 1

    @property
    def loss_unit(self) -> str:
        """What a loss is a mean over: a supervised token, or an example."""
        return "example" if self.is_classification else "token"


def _text(row: Row, key: str) -> str:
    value = row[key]
    if not isinstance(value, str):
        raise TypeError(f"{key!r} holds {type(value).__name__}, not text")
    return value


def _question(row: Row) -> Pair:
    question, answer = _text(row, "question").strip(), _text(row, "answer").strip()
    return Pair(f"Question: {question}\nAnswer:", f" {answer}")


def _instruction(row: Row) -> Pair:
    """The form in which Alpaca (tatsu-lab) was trained."""
    context = row.get("input") or ""
    if not isinstance(context, str):
        raise TypeError(f"'input' holds {type(context).__name__}, not text")
    instruction, output = _text(row, "instruction"), _text(row, "output")
    opening = "Below is an instruction that describes a task"
    if context:
        opening += ", paired with an input that provides further context"
    prompt = (
        f"{opening}. Write a response that appropriately completes the request.\n\n"
        f"### Instruction:\n{instruction}\n\n"
    )
    if context:
        prompt += f"### Input:\n{context}\n\n"
    return Pair(f"{prompt}### Response:\n", output)


# What a row of ``data.task=text`` may be; a column that holds null counts as not there.
_ALPACA, _WHOLE_TEXT, _PAIR = ("instruction", "output"), ("text",), ("prompt", "completion")
_FORMS: tuple[tuple[str, ...], ...] = (_ALPACA, _WHOLE_TEXT, _PAIR)


def _any_form(row: Row) -> Pair:
    there = [form for form in _FORMS if any(row.get(key) is not None for key in form)]
    if len(there) > 1:
        found = [key for form in there for key in form if row.get(key) is not None]
        raise ValueError(
            f"it can be read in {len(there)} ways, since it holds {_listed(found)}; leave the "
            "columns of one form, or set the others to null"
            + (" (data.task=alpaca reads instruction, input, output alone)" * (_ALPACA in there))
        )
    # Where all are null, the first that is named tells what is wrong with it.
    named = there or [form for form in _FORMS if any(key in row for key in form)]
    if named[:1] == [_ALPACA]:
        return _instruction(row)
    if named[:1] == [_WHOLE_TEXT]:
        return Pair("", _text(row, "text"))
    return Pair(_text(row, "prompt"), _text(row, "completion"))


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names[:-1])) + f" and {names[-1]!r}"


def _worked_answer(row: Row) -> Pair:
    pair = _question(row)
    number = final_number(pair.completion)
    return Pair(pair.prompt, pair.completion, None if number is None else float(number))


def _sentences(keys: tuple[str, ...], num_classes: int) -> Callable[[Row], Pair]:
    """Read one or two texts and their class, or their value where there are no classes."""

    def to_pair(row: Row) -> Pair:
        texts = [_text(row, key) for key in keys]
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
    "demo": Task(_question, "question, answer"),
    "gsm8k": Task(
        _worked_answer,
        "question, answer",
        "openai/gsm8k",
        "main",
        ("test",),
        scores=("exact_match",),
    ),
    "alpaca": Task(_instruction, "instruction, input (may be empty), output", "tatsu-lab/alpaca"),
    "text": Task(_any_form, "prompt, completion; or instruction, input, output; or text"),
}
TASKS["jsonl"] = TASKS["text"]  # its former name


def task_of(config: Config) -> Task:
    """The configured task."""
    return TASKS[config.data.task] if config.data.name is None else GLUE[config.data.name]


def checked_pair(task: Task, row: Any, where: str) -> Pair:
    """Turn one row into a pair.

    Raises:
        DataError: naming the place and the form that is expected.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: it holds {type(row).__name__}; expected {task.form}")
    try:
        pair = task.to_pair(row)
    except KeyError as missing:
        raise DataError(f"{where}: no key {missing}; expected {task.form}") from None
    except (TypeError, ValueError) as error:
        raise DataError(f"{where}: {error}; expected {task.form}") from None
    try:
        (pair.prompt + pair.completion).encode()
    except UnicodeEncodeError:
        raise DataError(f"{where}: it holds half a surrogate pair, which is no text") from None
    return pair
