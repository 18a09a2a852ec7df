"""The section ``output``: the files that a run writes. Needs no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from sfed.config.fields import Count, Location, Section, as_list


class OutputSection(Section):
    """Files that a run writes."""

    dir: Location = Field(default="runs", min_length=1)
    """Folder in which run folders are created."""
    name: str | None = Field(default=None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)
    """Name of the run folder: at most 200 letters, digits, dots, dashes and underscores, first a
    letter or a digit. null = TASK-METHOD, such as gsm8k-sfed."""
    checkpoint_every_rounds: Count = 1
    """Interval of checkpoints in rounds. There is always one at the end of the run."""
    checkpoint_every_seconds: float | None = Field(default=None, gt=0, le=1e7)
    """Minimum time in seconds from the beginning of a checkpoint to the next, above 0 and at most
    1e7, by the clock of process 0: rounds of checkpoint_every_rounds that end sooner get none. null
    = no minimum."""
    keep_checkpoints: Count = 2
    """Number of newest checkpoints that are kept; older ones are deleted. With 2 or more, every
    client has two files, so one damaged file costs one checkpoint."""
    resume: Location = "auto"
    """auto = resume from the newest complete checkpoint; never = move the run folder aside and
    start from the beginning; or the folder of a checkpoint to resume from."""
    report: bool = True
    """Write report.html and figures/ into the run folder when `sfed train` has finished the run."""
    trackers: Annotated[
        tuple[Literal["tensorboard", "wandb", "mlflow"], ...], BeforeValidator(as_list)
    ] = ()
    """Trackers that get the metrics beside metrics.jsonl: some of tensorboard, wandb and mlflow.
    Each is an optional dependency of sfed."""
    prometheus_file: Location | None = Field(default=None, pattern=r"\.prom$")
    """Text file with the metrics of the last round for node exporter's textfile collector, which
    reads files that end in .prom. null = none."""
