"""Names of the metrics and the JSON-lines file that holds them. Needs no torch."""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from sfed.cli import UserError
from sfed.masking import masked

TRAIN_LOSS = "train/loss"
EVAL_LOSS = "eval/loss"
EVAL_PERPLEXITY = "eval/perplexity"
GRAD_NORM = "adapter/grad_norm"
UPLOADED_BYTES = "comm/uploaded_bytes"
EVALUATION_BYTES = "comm/evaluation_bytes"
IMPORTS_SECONDS = "time/imports_seconds"
STARTING_SECONDS = "time/starting_seconds"
READING_SECONDS = "time/reading_seconds"
LOADING_SECONDS = "time/loading_seconds"
ROUND_SECONDS = "time/round_seconds"
LOCAL_SECONDS = "time/local_seconds"
WAIT_SECONDS = "time/wait_seconds"
AGGREGATE_SECONDS = "time/aggregate_seconds"
EVALUATE_SECONDS = "time/evaluate_seconds"
CHECKPOINT_SECONDS = "time/checkpoint_seconds"
CHECKPOINT_WRITE_SECONDS = "time/checkpoint_write_seconds"
FILL = "tokens/fill"  # tokens of the data over all that were computed, padding included
TOKENS_PER_SECOND = "time/tokens_per_second"
PEAK_BYTES = "memory/peak_bytes"


# Phases of a run and their names: those of a start, then those of a round. Process 0 measures them.
_PHASES = {
    IMPORTS_SECONDS: "imports",
    STARTING_SECONDS: "starting",
    READING_SECONDS: "reading and tokenising",
    LOADING_SECONDS: "loading the model",
    LOCAL_SECONDS: "local steps",
    WAIT_SECONDS: "waiting for other processes",
    AGGREGATE_SECONDS: "averaging",
    EVALUATE_SECONDS: "evaluation",
    CHECKPOINT_SECONDS: "checkpoints",
}
_BEFORE_TRAINING = "evaluation before training"


def time_spent(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each phase of a run, over all its starts, in the order of a run."""
    spent = dict.fromkeys([*list(_PHASES.values())[:4], _BEFORE_TRAINING, *_PHASES.values()], 0.0)
    for event in events:
        for key, name in _PHASES.items():
            is_before = key == EVALUATE_SECONDS and event.get("round") == 0
            seconds = event.get(key)
            if isinstance(seconds, int | float):
                spent[_BEFORE_TRAINING if is_before else name] += seconds
    return {name: seconds for name, seconds in spent.items() if seconds}


def perplexity(loss: float | None) -> float | None:
    """Return exp(loss in nats per token); None for None or where it leaves the range of floats."""
    return math.exp(loss) if loss is not None and loss < 700 else None


def mean(values: list[float], weights: list[float] | None = None) -> float | None:
    """Return the weighted mean (equal weights by default), None of nothing."""
    weights = [1.0] * len(values) if weights is None else weights
    total = math.fsum(weights)
    if not values or total == 0:
        return None
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / total


class MetricsFile:
    """``metrics.jsonl``: one JSON object per event, flushed at once, so that a reader may follow.

    Numbers that JSON does not know (NaN, Inf) are written as null, secrets as asterisks.
    """

    def __init__(self, path: Path, finished_rounds: int | None) -> None:
        """Open for appending, without what a lost attempt wrote beyond ``finished_rounds``.

        None begins an empty file.
        """
        kept = [
            event
            for event in (() if finished_rounds is None else read_events(path))
            if event.get("round", 0) <= (finished_rounds or 0)
        ]
        temporary = path.with_suffix(".tmp")
        temporary.write_text("".join(_line(event) for event in kept), encoding="utf-8")
        os.replace(temporary, path)
        self._path = path
        self._file = path.open("ab", buffering=0)

    def write(self, event: str, **values: Any) -> None:
        """Append one event."""
        self.write_event({"event": event, **values})

    def write_event(self, event: dict[str, Any]) -> None:
        """Append one event that holds its own ``event`` key.

        Raises:
            UserError: where the disk refuses.
        """
        line, refusal = _line(event).encode(), os.strerror(errno.ENOSPC)
        try:
            written = self._file.write(line)
        except OSError as error:
            written, refusal = 0, str(error.strerror)
        if written < len(line):
            raise UserError(
                f"{self._path} cannot be written ({refusal}); make room or set output.dir, then "
                "start again: the run goes on from the last whole checkpoint"
            )

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Read the events of a metrics file; lines that are damaged or half written are left out."""
    if not path.is_file():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            try:
                event = json.loads(line) if line.endswith("\n") else None
            except json.JSONDecodeError:
                event = None
            if isinstance(event, dict):
                yield event


def _line(event: dict[str, Any]) -> str:
    return json.dumps(masked(_finite(event)), allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return value
