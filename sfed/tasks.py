"""The tasks as data: where the rows come from and how a row becomes a prompt and a completion.

A row of any task becomes a ``Pair``; only the completion is supervised. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed.cli import UserError

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Pair:
    """A prompt, which is only read, and its completion, which is learned."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Task:
    """One kind of example."""

    to_pair: Callable[[Row], Pair]
    """Raises KeyError or TypeError where the row is not of this form."""
    form: str
    """The form of a row, for messages."""
    hub: str | None = None
    hub_config: str | None = None
    eval_split: str | None = None


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


def _any_form(row: Row) -> Pair:
    if "instruction" in row:
        return _instruction(row)
    if "text" in row:
        return Pair("", _text(row, "text"))
    return Pair(_text(row, "prompt"), _text(row, "completion"))


TASKS: dict[str, Task] = {
    "demo": Task(_question, "question, answer"),
    "gsm8k": Task(_question, "question, answer", "openai/gsm8k", "main", "test"),
    "alpaca": Task(_instruction, "instruction, input (may be empty), output", "tatsu-lab/alpaca"),
    "jsonl": Task(_any_form, "prompt, completion; or instruction, input, output; or text"),
}


def checked_pair(task: Task, row: Any, where: str) -> Pair:
    """Turn one row into a pair.

    Raises:
        UserError: naming the place and the form that is expected.
    """
    if not isinstance(row, Mapping):
        raise UserError(f"{where}: it holds {type(row).__name__}; expected {task.form}")
    try:
        pair = task.to_pair(row)
    except KeyError as missing:
        raise UserError(f"{where}: no key {missing}; expected {task.form}") from None
    except TypeError as error:
        raise UserError(f"{where}: {error}; expected {task.form}") from None
    try:
        (pair.prompt + pair.completion).encode()
    except UnicodeEncodeError:
        raise UserError(f"{where}: it holds half a surrogate pair, which is no text") from None
    return pair


def read_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """Read a .json list or a .jsonl file as (place, row); blank lines are passed over.

    Raises:
        UserError: naming file and line where a line is not JSON or not text.
    """
    try:
        yield from _json_rows(path) if path.suffix == ".json" else _jsonl_rows(path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None


def _json_rows(path: Path) -> Iterator[tuple[str, Any]]:
    try:
        rows = json.loads(path.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(rows, list):
        raise UserError(
            f"{path}: a .json file holds a list of rows; name it .jsonl if every line is a row"
        )
    yield from ((f"{path}, row {number}", row) for number, row in enumerate(rows, start=1))


def _jsonl_rows(path: Path) -> Iterator[tuple[str, Any]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                try:
                    yield f"{path}, line {number}", json.loads(line)
                except (json.JSONDecodeError, RecursionError) as error:
                    raise UserError(f"{path}, line {number}: not JSON ({error})") from None
