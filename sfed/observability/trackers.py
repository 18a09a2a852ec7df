"""TensorBoard, W&B, MLflow and a Prometheus file, beside ``metrics.jsonl``, which stays the record.

Needs no torch by itself.

A tracker gets the numbers of each round, on process 0 only. One that is asked for and not
installed is a mistake; one that fails later, as networks do, is named once and left out.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import secrets
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

from sfed.observability import prometheus
from sfed.observability.metrics import MetricsFile, free_name
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask, masked
from sfed.utils.text import one_line

# Each of them adds a curve for every number of a client.
MOST_CLIENTS = 16
_SECONDS_TO_UPLOAD = 60.0
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "tensorboard": ("tensorboard",),
    "wandb": ("wandb",),
    "mlflow": ("mlflow",),
}
_OF_A_DATABASE = ("sqlalchemy", "alembic")  # MLflow alone has these of its whole package only
_LONGEST_PARAMETER, _PARAMETERS_AT_A_TIME, _METRICS_AT_A_TIME = 500, 100, 1000  # of MLflow
_MLFLOW_URI = "MLFLOW_TRACKING_URI"


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
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of the clients that have one."""


def mistakes(names: Sequence[str]) -> list[str]:
    """Name each tracker that is not installed, or cannot write, and the remedy."""
    found = []
    for name in names:
        packages, uri = _PACKAGES[name], os.environ.get(_MLFLOW_URI, "")
        if name == "mlflow" and not uri.startswith(("http://", "https://")):
            packages += _OF_A_DATABASE
        missing = [one for one in packages if importlib.util.find_spec(one) is None]
        if missing:
            are = "packages {} are" if len(missing) > 1 else "package {} is"
            found.append(
                f"output.trackers = {name}: the {are.format(' and '.join(missing))} not installed; "
                f"pip install 'sfed[{name}]', or leave it out"
            )
        elif name == "mlflow" and _is_folder(uri):
            found.append(
                f"output.trackers = mlflow: {_MLFLOW_URI} = {mask(uri)!r} is a folder, to which "
                "MLflow no longer writes; set it to sqlite:///PATH or to the address of a server, "
                "or unset it: the default is mlflow.db in output.dir"
            )
    return found


def _is_folder(uri: str) -> bool:
    """Whether MLflow would take an address for its closed file store."""
    is_path = bool(uri) and "://" not in uri and not uri.startswith("databricks")
    return is_path or uri.startswith("file:")


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

    def write_end(self, event: Mapping[str, Any]) -> None:
        """Append the event of the end of a start, which no round holds.

        Raises:
            OSError: where the disk refuses.
        """
        event, self._of_start = {**event, **self._of_start}, {}
        self._file.write_end(event)

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
    output = run.config.get("output")
    if isinstance(output, Mapping) and (path := output.get("prometheus_file")):
        started["output.prometheus_file"] = PrometheusFile(Path(path), run)
    file = MetricsFile(run.folder / "metrics.jsonl", run.finished_rounds)
    for note in filter(None, (file.note, file.gap)):
        warn(note)
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
        "mlflow": MLflow,
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
            id=_wandb_id(run.folder / "wandb-id", is_new=run.finished_rounds is None),
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


def _wandb_id(path: Path, *, is_new: bool) -> str:
    """The id of this folder's W&B run."""
    found = _former_id(path, is_new=is_new) or secrets.token_hex(8)
    path.write_text(found + "\n", encoding="utf-8")
    return found


def _former_id(path: Path, *, is_new: bool) -> str | None:
    """The id that an earlier start has left; that of another run goes aside."""
    if not path.is_file():
        return None
    if is_new:
        path.rename(free_name(path.with_name(f"{path.name}.old")))
        return None
    return path.read_text(encoding="utf-8").strip()


class MLflow:
    """An MLflow run named after the run folder; MLFLOW_TRACKING_URI and so on are respected.

    By default it is in ``mlflow.db``, a SQLite file beside the run folder, so that runs of one
    ``output.dir`` are compared. Only numbers and the configuration go there. A resumed run
    continues the same MLflow run, by the id in its folder.
    """

    def __init__(self, run: TrackedRun) -> None:
        # It would report its use to its makers, and wait minutes for a server that is gone.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        import mlflow
        from mlflow.entities import Metric, Param

        logging.getLogger("mlflow").setLevel(logging.WARNING)  # of the tables that it makes
        database = run.folder.absolute().parent / "mlflow.db"
        uri = os.environ.get(_MLFLOW_URI) or f"sqlite:///{database}"
        self._client, self._metric = mlflow.MlflowClient(tracking_uri=uri), Metric
        self._rounds = _planned_rounds(run.config)
        self._last = run.finished_rounds or 0
        path = run.folder / "mlflow-id"
        former = _former_id(path, is_new=run.finished_rounds is None)
        self._id = former or self._create(run, Param)
        path.write_text(self._id + "\n", encoding="utf-8")
        if former:
            self._client.update_run(former, status="RUNNING")

    def _create(self, run: TrackedRun, param: Any) -> str:
        """Begin a run with the configuration as its parameters."""
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or "sfed"
        experiment = self._client.get_experiment_by_name(name)
        number = experiment.experiment_id if experiment else self._client.create_experiment(name)
        found: str = self._client.create_run(number, run_name=run.folder.name).info.run_id
        given = [param(key, value[:_LONGEST_PARAMETER]) for key, value in _flat(run.config)]
        for i in range(0, len(given), _PARAMETERS_AT_A_TIME):
            self._client.log_batch(found, params=given[i : i + _PARAMETERS_AT_A_TIME])
        return found

    def log(self, scalars: Mapping[str, float], finished_rounds: int) -> None:
        """Write the numbers of a round; rounds that are done again come a second time."""
        now = int(1000 * time.time())  # noqa: TID251  (a date for people, no duration)
        numbers = [
            self._metric(re.sub(r"[^/\w.\- :]", "_", name), value, now, finished_rounds)
            for name, value in scalars.items()
        ]
        for i in range(0, len(numbers), _METRICS_AT_A_TIME):
            self._client.log_batch(self._id, metrics=numbers[i : i + _METRICS_AT_A_TIME])
        self._last = finished_rounds

    def finish(self) -> None:
        """Say how the run ended: all rounds are done, or somebody asked to stop."""
        is_done = self._rounds is None or self._last >= self._rounds
        self._client.set_terminated(self._id, "FINISHED" if is_done else "KILLED")


def _planned_rounds(config: Mapping[str, Any]) -> int | None:
    federated = config.get("federated")
    found = federated.get("num_rounds") if isinstance(federated, Mapping) else None
    return found if isinstance(found, int) else None


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted names and values as text."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value)


class PrometheusFile:
    """The numbers of the last round as a text file; ``output.prometheus_file``."""

    def __init__(self, path: Path, run: TrackedRun) -> None:
        self._path, self._run = path, run

    def log(self, scalars: Mapping[str, float], finished_rounds: int) -> None:
        """Write the file anew."""
        prometheus.write(self._path, self._samples(scalars, finished_rounds))

    def _samples(
        self, scalars: Mapping[str, float], finished_rounds: int
    ) -> Iterator[prometheus.Sample]:
        run = {"run": self._run.folder.name}
        yield prometheus.FINISHED, run, float(finished_rounds)
        planned = _planned_rounds(self._run.config)
        if planned is not None:
            yield prometheus.PLANNED, run, float(planned)
        for name, value in scalars.items():
            section, _, rest = name.partition("/")
            if section != "clients":
                yield name, run, value
                continue
            number, _, what = rest.partition("/")
            client = str(int(number))
            of_client = {**run, "client": client, "name": self._run.names.get(int(client), "")}
            yield f"client/{what}", of_client, value

    def finish(self) -> None:
        """The last round stays to be read."""
