"""The measurements of each round, and the event of each round in ``metrics.jsonl``."""

from __future__ import annotations

import resource
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from sfed.clients.round_stats import RoundStats
from sfed.clients.schedule import learning_rate
from sfed.federated.context import Run
from sfed.federated.evaluate import Evaluation, Measured, score_names
from sfed.observability import metrics
from sfed.observability.console import Console
from sfed.observability.trackers import MetricLogger
from sfed.storage.checkpoint_writer import Writer


@dataclass
class RoundMeasurements:
    """What was measured of a round on this process, beside losses: seconds, bytes, similarity."""

    uploaded_bytes: int = 0
    similarity: dict[str, float | None] = field(default_factory=dict)
    """Mean cosine between two clients before the mean, of "a" and of "b"."""
    similarity_bytes: int = 0
    earlier_tokens: float = 0.0
    """Of the round, read by a start that was stopped within it; no second of it is known."""
    local_seconds: float = 0.0
    wait_seconds: float = 0.0
    """For the slowest process, after the own clients were done."""
    processes: list[tuple[float, float]] = field(default_factory=list)
    """Of each process in the local steps: seconds busy, and seconds idle."""
    aggregate_seconds: float = 0.0
    evaluate_seconds: float = 0.0
    checkpoint_seconds: float = 0.0
    """How long the checkpoint of the round before held this process up."""
    checkpoint_write_seconds: float | None = None
    """How long it took, behind this round, to be whole; None where there was none or it is not."""
    round_seconds: float = 0.0
    """Sum of the phases: local, wait, aggregate, evaluate."""

    @property
    def seconds(self) -> dict[str, float | None]:
        """The durations by their names in an event."""
        return {
            metrics.ROUND_SECONDS: self.round_seconds,
            metrics.LOCAL_SECONDS: self.local_seconds,
            metrics.WAIT_SECONDS: self.wait_seconds,
            metrics.AGGREGATE_SECONDS: self.aggregate_seconds,
            metrics.EVALUATE_SECONDS: self.evaluate_seconds,
            metrics.CHECKPOINT_SECONDS: self.checkpoint_seconds,
            metrics.CHECKPOINT_WRITE_SECONDS: self.checkpoint_write_seconds,
        }


class RoundLog:
    """Clocks the phases of a round and reports it: a line on process 0, and its event."""

    def __init__(self, run: Run, console: Console, journal: MetricLogger | None) -> None:
        """Clock nothing yet.

        Args:
            run: the run.
            console: speaks on process 0.
            journal: takes the events; on process 0.
        """
        self._run, self._console, self._journal = run, console, journal
        self.measured = RoundMeasurements()
        """Measurements of the current round."""
        self.step, self.warning = console.step, console.warn
        self._cpu_seconds = 0.0

    def begin(self, round_index: int) -> None:
        """A round begins."""
        self.measured = RoundMeasurements()
        self._console.begin_round(round_index)

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Add the seconds of what happens within to a phase and to the round."""
        started = time.monotonic()
        yield
        for name in (f"{phase}_seconds", "round_seconds"):
            seconds = getattr(self.measured, name) + time.monotonic() - started
            setattr(self.measured, name, seconds)

    def take_seconds_of(self, checkpoints: Writer) -> None:
        """Note how long checkpoints took since the round before."""
        blocked, written = checkpoints.take_seconds()
        self.measured.checkpoint_seconds = blocked
        self.measured.checkpoint_write_seconds = written

    def end(
        self, finished_rounds: int, stats: RoundStats | None, evaluation: Evaluation | None
    ) -> None:
        """A round is finished: write its event, and say it; arguments as of ``round_event``."""
        event = round_event(self._run, finished_rounds, stats, evaluation, self.measured)
        used = time.process_time()
        event[metrics.CPU_SECONDS], self._cpu_seconds = used - self._cpu_seconds, used
        if self._journal is not None:
            self._journal.write_event(event)
        self._console.end_round(event)

    def end_of_start(self, checkpoint_seconds: float, export_seconds: float | None) -> None:
        """The rounds of this start are done: keep what no round's event holds.

        Args:
            checkpoint_seconds: how long the last checkpoint held this process up.
            export_seconds: of writing the adapters; None where they were not written.
        """
        if self._journal is None:
            return
        event = {
            "event": "end",
            metrics.CHECKPOINT_SECONDS: checkpoint_seconds,
            metrics.EXPORT_SECONDS: export_seconds,
            metrics.CPU_SECONDS: time.process_time() - self._cpu_seconds,
            metrics.PEAK_BYTES: peak_bytes(self._run.world.device),
        }
        with suppress(OSError):  # a full disk: the run itself is whole
            self._journal.write_end(event)


def round_event(
    run: Run,
    finished_rounds: int,
    stats: RoundStats | None,
    evaluation: Evaluation | None,
    measured: RoundMeasurements,
) -> dict[str, Any]:
    """Build the event of a round; ``finished_rounds`` 0 is the state before any training.

    Values that were not measured in this round are None. Losses are means over supervised
    tokens, or over examples for classification.
    """
    event: dict[str, Any] = {"event": "round", "round": finished_rounds}
    if run.privacy is not None:
        event |= run.privacy.spent(run.clients)
        stats = None  # losses, norms and counts of a cohort are not noised, and say who is in it
    event.update(_training(run, stats))
    event.update(_schedule(run, finished_rounds))
    event.update(_held_out(run, evaluation))
    event[metrics.EVALUATED] = None if evaluation is None else len(run.evaluated)
    if evaluation is not None and run.sample is not None:
        event[metrics.SAMPLE] = run.sample
    if evaluation is not None and run.task.classes and finished_rounds == _last_round(run):
        event[metrics.CONFUSION] = {
            kind: measured.confusion(len(run.task.classes))
            for kind, measured in evaluation.kinds.items()
        }
    event |= {
        key: measured.similarity.get(factor.lower()) for factor, key in metrics.SIMILARITIES.items()
    }
    event[metrics.UPLOADED_BYTES] = measured.uploaded_bytes
    event[metrics.EVALUATION_BYTES] = measured.similarity_bytes + (
        evaluation.communicated_bytes if evaluation else 0
    )
    event |= measured.seconds
    tokens = 0.0 if stats is None else float(stats.tokens.sum())
    speed = None
    if stats is not None and measured.local_seconds:
        speed = (tokens - measured.earlier_tokens) / measured.local_seconds
    event[metrics.TOKENS_PER_SECOND] = speed
    slots = 0.0 if stats is None else float(stats.slots.sum())
    event[metrics.FILL] = tokens / slots if slots else None
    event[metrics.PEAK_BYTES] = peak_bytes(run.world.device)
    processes = _processes(run, stats, measured)
    event[metrics.PROCESSES] = processes
    event[metrics.IDLE_SHARE] = metrics.mean([one["idle_share"] for one in processes])
    event["clients"] = [
        _client(run, client, stats, evaluation) for client in range(run.num_clients)
    ]
    return event


def _last_round(run: Run) -> int:
    return run.config.federated.num_rounds


def _processes(
    run: Run, stats: RoundStats | None, measured: RoundMeasurements
) -> list[dict[str, Any]]:
    """What each process did in the local steps.

    Nothing before training, nor of a round that a start with other processes has trained.
    """
    if stats is None or len(measured.processes) != run.world.size:
        return []
    return [
        {
            "process": process,
            "clients": len(own),
            "tokens": int(stats.tokens[list(own)].sum()),
            "busy_seconds": busy,
            "idle_seconds": idle,
            "idle_share": idle / max(busy + idle, 1e-9),
        }
        for process, (own, (busy, idle)) in enumerate(
            zip(run.placement, measured.processes, strict=True)
        )
    ]


def _training(run: Run, stats: RoundStats | None) -> dict[str, Any]:
    if stats is None:
        return {metrics.TRAIN_LOSS: None, metrics.GRAD_NORM: None, metrics.FIRST_GRAD_NORM: None}
    healthy = RoundStats(stats.table[(stats.is_bad == 0) & (stats.steps > 0)])
    steps, supervised = healthy.steps.sum(), healthy.supervised.sum()
    num = len(healthy.steps)
    return {
        metrics.TRAIN_LOSS: float(healthy.loss_sum.sum() / supervised) if supervised else None,
        metrics.GRAD_NORM: float(healthy.norm_sum.sum() / steps) if steps else None,
        metrics.FIRST_GRAD_NORM: float(healthy.first_norm.sum() / num) if num else None,
    }


def _schedule(run: Run, finished_rounds: int) -> dict[str, Any]:
    """The learning rate with which the round began, and over how many rounds it is computed."""
    section, begun = run.config.train, finished_rounds - 1
    if begun < 0:
        return {metrics.LEARNING_RATE: None, metrics.SCHEDULE_ROUNDS: None}
    total = run.course.num_rounds(begun)
    return {
        metrics.LEARNING_RATE: learning_rate(section, section.lr, total, begun),
        metrics.SCHEDULE_ROUNDS: None if section.schedule == "constant" else total,
    }


def _held_out(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    """Losses and scores of each adapter kind over everything, and their means over clients."""
    event: dict[str, Any] = {metrics.EVAL_LOSS: None, metrics.EVAL_PERPLEXITY: None}
    names = score_names(run)
    event.update({f"eval/{name}": None for name in names})
    for number, (kind, measured) in enumerate(evaluation.kinds.items() if evaluation else ()):
        values = _over_clients(run, measured.loss)
        if number == 0:
            event[metrics.OUTPUT_RMS] = measured.output_rms()
            event[metrics.EVAL_LOSS] = values[""]
            if run.task.loss_unit == "token":
                event[metrics.EVAL_PERPLEXITY] = metrics.perplexity(values[""])
        event.update(_named(kind, "loss", values))
        for name in names:
            values = _over_clients(run, partial(measured.score, name))
            event.update(_named(kind, name, values))
            if number == 0:
                event[f"eval/{name}"] = values[""]
    return event


def _named(kind: str, what: str, values: Mapping[str, float | None]) -> dict[str, float | None]:
    return {metrics.held_out_key(kind, what, mean): value for mean, value in values.items()}


def _over_clients(
    run: Run, measure: Callable[[int | None], float | None]
) -> dict[str, float | None]:
    """A number over everything that is held out, and its means over the clients that have it."""
    pairs = [
        (value, float(run.data.train_counts[client]))
        for client in range(run.num_clients)
        if (value := measure(client)) is not None
    ]
    values, examples = [value for value, _ in pairs], [count for _, count in pairs]
    return {
        "": measure(None),
        metrics.UNWEIGHTED: metrics.mean(values),
        metrics.BY_EXAMPLES: metrics.mean(values, examples),
    }


def _client(
    run: Run, client: int, stats: RoundStats | None, evaluation: Evaluation | None
) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "client": client,
        "train_loss": None,
        "eval_loss": None,
        "examples": run.data.train_counts[client],
    }
    if name := run.data.names[client]:
        entry["name"] = name
    if stats is not None and stats.steps[client] > 0:
        entry["steps"] = int(stats.steps[client])
        entry["excluded"] = bool(stats.is_bad[client])
        if stats.supervised[client] and not stats.is_bad[client]:
            entry["train_loss"] = float(stats.loss_sum[client] / stats.supervised[client])
            entry["grad_norm"] = float(stats.norm_sum[client] / stats.steps[client])
    if evaluation is not None:
        for number, (kind, measured) in enumerate(evaluation.kinds.items()):
            entry.update(_client_held_out(run, client, kind, measured))
            if number == 0:  # the main kind
                entry["eval_loss"] = measured.loss(client)
                if samples := measured.samples.get(client):
                    entry["samples"] = [asdict(sample) for sample in samples]
    return entry


def _client_held_out(run: Run, client: int, kind: str, measured: Measured) -> dict[str, Any]:
    entry: dict[str, Any] = {f"{kind}_loss": measured.loss(client)}
    for name in score_names(run):
        entry[f"{kind}_{name}"] = measured.score(name, client)
    return entry


def peak_bytes(device: torch.device) -> int:
    """Most memory so far: of the device on CUDA, of this process on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
