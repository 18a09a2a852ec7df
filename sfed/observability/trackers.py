"""TensorBoard and W&B, beside ``metrics.jsonl``, which stays the record. Needs no torch by itself.

A tracker gets the numbers of each round, on process 0 only. One that is asked for and not
installed is a mistake; one that fails later, as networks do, is named once and left out.
"""

from __future__ import annotations

import importlib.util
import json
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from sfed.observability.metrics import MetricsFile, free_name
from sfed.utils.errors import UserError
from sfed.utils.redaction import masked
from sfed.utils.text import one_line

# Each of them adds a curve for every number of a client.
MOST_CLIENTS = 16
_SECONDS_TO_UPLOAD = 60.0


class Tracker(Protocol):
    """A place where curves are looked at."""

    def log(self, scalars: Mapping[str, float], finished_rounds: int) -> None:
        """Take the numbers of a round."""

    def finish(self) -> None:
        """Write what is left; nothing is logged afterwards."""


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it starts."""

    folder: Path
    """The run folder."""
    config: Mapping[str, Any]
    """What is stored of the configuration."""
    finished_rounds: int | None = None
    """Rounds that a resumed run has finished; None begins new curves."""


def mistakes(names: Sequence[str]) -> list[str]:
    """Name each tracker that is not installed, and what installs it."""
    return [
        f"output.trackers = {name}: the package {name} is not installed; "
        f"pip install 'sfed[{name}]', or leave it out"
        for name in names
        if importlib.util.find_spec(name) is None
    ]


def scalars_of(event: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a round: those of the run, and those of the first clients."""
    found = {name: value for name, value in event.items() if "/" in name}
    for entry in event["clients"][:MOST_CLIENTS]:
        known = {name: value for name, value in entry.items() if name not in ("client", "examples")}
        found |= {f"clients/{entry['client']:04d}/{name}": value for name, value in known.items()}
    return {
        name: float(value)
        for name, value in found.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


class MetricLogger:
    """``metrics.jsonl`` and the trackers beside it; on process 0."""

    def __init__(
        self, file: MetricsFile, trackers: Mapping[str, Tracker], warn: Callable[[str], None]
    ) -> None:
        self._file, self._trackers, self._warn = file, dict(trackers), warn
        self._of_start: dict[str, Any] = {}

    def add_to_next(self, values: Mapping[str, Any]) -> None:
        """Add values of the start, not of a round, to the next event."""
        self._of_start = dict(values)

    def write_event(self, event: Mapping[str, Any]) -> None:
        """Append an event to the file, then give the numbers of a round to the trackers."""
        event, self._of_start = {**event, **self._of_start}, {}
        self._file.write_event(dict(event))
        if event["event"] == "round":
            scalars, finished = scalars_of(event), int(event["round"])
            self._each(lambda tracker: tracker.log(scalars, finished))

    def close(self) -> None:
        """Close the file and finish the trackers."""
        self._file.close()
        self._each(lambda tracker: tracker.finish())

    def _each(self, act: Callable[[Tracker], None]) -> None:
        well: dict[str, Tracker] = {}
        for name, tracker in self._trackers.items():
            with _spared(name, self._warn):
                act(tracker)
                well[name] = tracker
        self._trackers = well


@contextmanager
def _spared(name: str, warn: Callable[[str], None]) -> Iterator[None]:
    """Keep the run alive when a tracker fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001  (it is named, and the run matters more)
        reason = f"{type(error).__name__}: {one_line(error, 200)}"
        warn(f"{name} fails and is left out from here on ({reason}); metrics.jsonl has all")


def open_metric_logger(
    names: Sequence[str], run: TrackedRun, warn: Callable[[str], None]
) -> MetricLogger:
    """Open the metrics file and start the trackers; arguments and errors as of ``start_all``."""
    started = start_all(names, run, warn)
    file = MetricsFile(run.folder / "metrics.jsonl", run.finished_rounds)
    if file.note:
        warn(file.note)
    return MetricLogger(file, started, warn)


def start_all(
    names: Sequence[str], run: TrackedRun, warn: Callable[[str], None]
) -> dict[str, Tracker]:
    """Start the trackers that are asked for; one that cannot start is named and left out.

    Args:
        names: of trackers, as ``output.trackers`` has them.
        run: the run; secrets in its configuration are masked before a tracker gets it.
        warn: takes a line.

    Raises:
        UserError: where one lacks what only the user can give.
    """
    starts: dict[str, Callable[[TrackedRun], Tracker]] = {
        "tensorboard": TensorBoard,
        "wandb": WeightsAndBiases,
    }
    run = replace(run, config=masked(run.config))
    started: dict[str, Tracker] = {}
    for name in dict.fromkeys(names):
        with _spared(name, warn):
            started[name] = starts[name](run)
    return started


class TensorBoard:
    """Event files in ``tensorboard/`` of the run folder; a resumed run adds to them."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        logs = run.folder / "tensorboard"
        # What a lost attempt wrote beyond the finished rounds is there and is not shown.
        purge = 0 if run.finished_rounds is None else run.finished_rounds + 1
        writer: Any = SummaryWriter  # has no types
        self._writer = writer(str(logs), purge_step=purge)
        text = json.dumps(run.config, indent=2)
        self._writer.add_text("config", f"<pre>{text}</pre>", 0)

    def log(self, scalars: Mapping[str, float], finished_rounds: int) -> None:
        """Write and flush the numbers of a round."""
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, finished_rounds)
        self._writer.flush()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


class WeightsAndBiases:
    """A W&B run named after the run folder; WANDB_MODE, WANDB_PROJECT and so on are respected.

    Only numbers and the configuration go there: no code, no command line, no console output, no
    generated text. A resumed run continues the same W&B run, by the id in its folder.
    """

    def __init__(self, run: TrackedRun) -> None:
        import wandb

        mode = wandb.setup().settings.mode
        if mode in ("online", "run", "shared") and not wandb.login(prompt=False):
            raise UserError(
                "output.trackers = wandb: there is no key for it; set WANDB_API_KEY, or run `wandb "
                "login`, or set WANDB_MODE=offline"
            )
        settings = wandb.Settings(
            console="off",
            disable_code=True,
            disable_git=True,
            x_disable_meta=True,
            x_save_requirements=False,
            silent=True,
            finish_timeout=_SECONDS_TO_UPLOAD,  # what is left stays on disk for `wandb sync`
        )
        self._run = wandb.init(
            project=wandb.setup().settings.project or "sfed",
            name=run.folder.name,
            id=_run_id(run.folder / "wandb-id", is_new=run.finished_rounds is None),
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=settings,
        )
        # Rounds that are done again after a lost attempt come a second time, with the same numbers.
        self._run.define_metric("round")
        self._run.define_metric("*", step_metric="round")

    def log(self, scalars: Mapping[str, float], finished_rounds: int) -> None:
        """Hand over the numbers of a round; W&B sends them in the background."""
        self._run.log({**scalars, "round": finished_rounds})

    def finish(self) -> None:
        """Wait a while for the upload."""
        self._run.finish()


def _run_id(path: Path, *, is_new: bool) -> str:
    """The id of this folder's W&B run."""
    if is_new and path.is_file():
        path.rename(free_name(path.with_name(f"{path.name}.old")))
    if not path.is_file():
        path.write_text(secrets.token_hex(8) + "\n", encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()
