"""Names of the metrics and the JSON-lines file that holds them. Needs no torch."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sfed.utils import json_text
from sfed.utils.errors import UserError
from sfed.utils.files import replacing
from sfed.utils.redaction import masked

TRAIN_LOSS = "train/loss"
LEARNING_RATE = "train/learning_rate"
"""Of A, with which the round begins."""
SCHEDULE_ROUNDS = "train/schedule_rounds"
"""Number of rounds with which it is computed; None where it does not depend on it."""
EVAL_LOSS = "eval/loss"
EVAL_PERPLEXITY = "eval/perplexity"
GRAD_NORM = "adapter/grad_norm"
FIRST_GRAD_NORM = "adapter/first_grad_norm"
OUTPUT_RMS = "adapter/output_rms"
SIMILARITIES = {"A": "adapter/a_similarity", "B": "adapter/b_similarity"}
"""By factor: how alike the clients' factors are."""
EVALUATED = "eval/clients"
"""How many clients were evaluated."""
SAMPLE = "evaluated_clients"
"""Which, where only a sample of the clients was evaluated; every value under eval/ is of them."""
CONFUSION = "confusion"
"""By kind of adapter: held-out examples by class (rows) and predicted class (columns)."""
UPLOADED_BYTES = "comm/uploaded_bytes"
EVALUATION_BYTES = "comm/evaluation_bytes"
IMPORTS_SECONDS = "time/imports_seconds"
STARTING_SECONDS = "time/starting_seconds"
READING_SECONDS = "time/reading_seconds"
LOADING_SECONDS = "time/loading_seconds"
ROUND_SECONDS = "time/round_seconds"
LOCAL_SECONDS = "time/local_seconds"
WAIT_SECONDS = "time/wait_seconds"
PROCESSES = "time/processes"
"""What each process did in the local steps: an object each."""
IDLE_SHARE = "time/idle_share"
"""Of the seconds of local steps, mean over processes."""
AGGREGATE_SECONDS = "time/aggregate_seconds"
EVALUATE_SECONDS = "time/evaluate_seconds"
CHECKPOINT_SECONDS = "time/checkpoint_seconds"
CHECKPOINT_WRITE_SECONDS = "time/checkpoint_write_seconds"
EXPORT_SECONDS = "time/export_seconds"
"""Of writing the adapters, in the event of the end of a start."""
FILL = "tokens/fill"  # tokens of the data over all that were computed, padding included
CPU_SECONDS = "time/cpu_seconds"
"""Of process 0 with all its threads, since the event before."""
TOKENS_PER_SECOND = "time/tokens_per_second"
PEAK_BYTES = "memory/peak_bytes"
EPSILON, DELTA = "privacy/epsilon", "privacy/delta"
RELEASES = "privacy/releases"
"""Noisy sums so far, those of repeated rounds included where their sum was another."""
CLIP = "privacy/clip"
"""Bound on a client's change in the round that comes next."""
STARTS_FILE = "starts.jsonl"
"""Beside ``metrics.jsonl``: an event for each start that came to its end."""
# How a mean over clients weighs them; ends of names under eval/.
UNWEIGHTED, BY_EXAMPLES = "_unweighted", "_by_examples"

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
    EXPORT_SECONDS: "writing the adapters",
}
_BEFORE_TRAINING = "evaluation before training"
_MOST_NAMED = 8


def held_out_key(adapter: str, what: str, mean: str = "") -> str:
    """The name of a held-out loss or score, such as ``eval/personal_loss_unweighted``.

    Args:
        adapter: personal or global.
        what: loss, or the name of a score.
        mean: UNWEIGHTED or BY_EXAMPLES for a mean over clients; empty for the value over all
            held-out data together.
    """
    return f"eval/{adapter}_{what}{mean}"


def time_spent(events: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds of each phase of a run, over all its starts, in the order of a run.

    Args:
        events: of rounds, and of the ends of starts.
    """
    spent = dict.fromkeys([*list(_PHASES.values())[:4], _BEFORE_TRAINING, *_PHASES.values()], 0.0)
    for event in events:
        for key, name in _PHASES.items():
            is_before = key == EVALUATE_SECONDS and event.get("round") == 0
            seconds = event.get(key)
            if isinstance(seconds, int | float):
                spent[_BEFORE_TRAINING if is_before else name] += seconds
    return {name: seconds for name, seconds in spent.items() if seconds}


def idle_shares(events: Iterable[Mapping[str, Any]]) -> list[float]:
    """Share of the seconds of local steps in which each process was idle, over a run's rounds.

    Of the rounds on as many processes as in the last one; nothing where no event says it.
    """
    rounds = [seconds for event in events if (seconds := _seconds_of_processes(event))]
    rounds = [seconds for seconds in rounds if len(seconds) == len(rounds[-1])]
    totals = [map(math.fsum, zip(*own, strict=True)) for own in zip(*rounds, strict=True)]
    return [idle / max(busy + idle, 1e-9) for busy, idle in totals]


def _seconds_of_processes(event: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Seconds busy and idle of each process; nothing where an event says them in another form."""
    try:
        processes = event[PROCESSES]
        return [(float(one["busy_seconds"]), float(one["idle_seconds"])) for one in processes]
    except (TypeError, KeyError, ValueError):
        return []


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
        """Open for appending, without the events of rounds that are done again.

        Lines that are no events are left out too; then the file as it was is kept under another
        name, which ``note`` gives.

        Args:
            path: of the file.
            finished_rounds: events of later rounds are dropped; None begins an empty file.

        Raises:
            OSError: where the file cannot be read or written.
        """
        found = read_metrics(path)
        self.note: str | None = None
        """What was found wrong with the file; None where nothing was."""
        if found.odd_lines:
            kept = free_name(path.with_name(f"{path.name}.damaged"))
            shutil.copyfile(path, kept)
            self.note = f"{found.note}; the file as it was is kept as {kept.name}"
        self.gap = _gap(found, finished_rounds)
        """Which rounds of the run so far it does not hold; None where it holds all."""
        lines = [
            line
            for event, line in zip(found.events, found.lines, strict=True)
            if finished_rounds is not None and event.get("round", 0) <= finished_rounds
        ]
        with replacing(path) as temporary:
            temporary.write_bytes(b"".join(lines))
        self._path = path
        self._file = path.open("ab", buffering=0)

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
                "start again: the run resumes from the newest complete checkpoint"
            )

    def write_end(self, event: Mapping[str, Any]) -> None:
        """Append the event of the end of a start to ``STARTS_FILE`` beside this file.

        In ``metrics.jsonl`` the last line is that of the last round, which others read there.

        Raises:
            OSError: where the disk refuses.
        """
        with self._path.with_name(STARTS_FILE).open("ab") as file:
            file.write(_line(dict(event)).encode())

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@dataclass(frozen=True)
class Metrics:
    """What a metrics file holds."""

    path: Path
    events: list[dict[str, Any]]
    lines: list[bytes]
    """The line of each event."""
    odd_lines: list[int]
    """Numbers of the lines that are no events, from 1; without a last line that was half written,
    as a process leaves it that is killed while it writes."""

    @property
    def note(self) -> str | None:
        """Say which lines are passed over; None where all are events."""
        count = len(self.odd_lines)
        if not count:
            return None
        named = ", ".join(f"line {number}" for number in self.odd_lines[:_MOST_NAMED])
        more = f" and {count - _MOST_NAMED} more" if count > _MOST_NAMED else ""
        what = "1 line is no event and is" if count == 1 else f"{count} lines are no events and are"
        return f"{self.path}: {what} passed over ({named}{more})"


def read_metrics(path: Path) -> Metrics:
    """Read a metrics file; lines that are no events are passed over and counted.

    Raises:
        OSError: where the file is there and cannot be read.
    """
    found = Metrics(path, [], [], [])
    try:
        file = json_text.open_file(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return found
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            event = _event_of(line)
            if event is None:
                found.odd_lines.append(number)
            else:
                found.events.append(event)
                found.lines.append(line)
    return found


def read_events(path: Path) -> Iterator[dict[str, Any]]:
    """Read the events of a metrics file; what is no event is passed over.

    Raises:
        OSError: where the file is there and cannot be read.
    """
    yield from read_metrics(path).events


def _gap(found: Metrics, finished_rounds: int | None) -> str | None:
    """Say which of the reported rounds of a run are not in its file; None where all are."""
    expected = range(-1 if finished_rounds is None else finished_rounds + 1)
    written = {event["round"] for event in found.events if event["event"] == "round"}
    missing = [number for number in expected if number not in written]
    if not missing:
        return None
    named = ", ".join(map(str, missing[:_MOST_NAMED]))
    more = f" and {len(missing) - _MOST_NAMED} more" if len(missing) > _MOST_NAMED else ""
    rounds = "round" if len(missing) == 1 else "rounds"
    return (
        f"{found.path}: the figures of {rounds} {named}{more} are missing, and no checkpoint holds "
        "them, so the closing table and reports are without them; lines of a copy of the file can "
        "be added while the run does not train"
    )


def free_name(path: Path) -> Path:
    """The first of path-1, path-2, ... that does not exist."""
    number = 1
    while os.path.lexists(name := path.with_name(f"{path.name}-{number}")):
        number += 1
    return name


def _event_of(line: bytes) -> dict[str, Any] | None:
    """The event in a line; None where it is none.

    An event is an object with a name under ``event``; that of a round has the number of the round.
    """
    try:
        event = json_text.parse(line.decode(), bound_numbers=True)
    except ValueError:  # not UTF-8, not JSON, nested too deeply
        return None
    if not isinstance(event, dict) or not isinstance(event.get("event"), str):
        return None
    finished = event.get("round", None if event["event"] == "round" else 0)
    return event if type(finished) is int and finished >= 0 else None


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


def deviation(values: Sequence[float]) -> float:
    """The sample standard deviation (over n - 1), 0 of a single value."""
    return statistics.stdev(values) if len(values) > 1 else 0.0
