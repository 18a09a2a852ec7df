"""Train: ``torchrun --nproc_per_node 8 -m sfed.train [CONFIG.yaml] [key=value ...]``.

Without arguments it runs the embedded demo, which downloads nothing. Exit codes: 0 done (or stopped
by SIGTERM with everything on disk), 2 an error in the configuration, the data or the arguments,
1 anything else.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.federated import preflight
from sfed.observability import logs
from sfed.storage import origin
from sfed.storage.previous_run import has_report
from sfed.storage.run_record import open_run
from sfed.utils import command, garbage
from sfed.utils.errors import DivergedError, MissingProcessError, TrainingFailedError, UserError
from sfed.utils.launcher import launch
from sfed.utils.text import one_line

if TYPE_CHECKING:
    from sfed.distributed.shutdown import StopRequest
    from sfed.distributed.world import World
    from sfed.federated.session import SessionEnd

USAGE = """usage: python -m sfed.train [CONFIG.yaml] [key=value ...]
       torchrun --nproc_per_node 8 -m sfed.train [CONFIG.yaml] [key=value ...]
       deepspeed --num_gpus 8 --module sfed.train [CONFIG.yaml] [key=value ...]

Federated LoRA fine-tuning: each process is one client or several. Without arguments it runs the
embedded demo. A configuration is a YAML or JSON file; key=value goes over it, or over the defaults
below where there is no file; with data.task=demo, over the demo's configuration.

  --dry-run                              check everything that needs no training: data, tokens, what
                                         is supervised, memory, what is sent; then end"""


def main(arguments: Sequence[str]) -> None:
    """Parse, check what can be checked without torch, then run."""
    words, process = logs.take_options(arguments), launch().rank
    logs.begin(process)
    is_dry = "--dry-run" in words
    config = config_load.parse([word for word in words if word != "--dry-run"])
    if config is None:
        if process == 0:
            print(config_load.help_text(USAGE + logs.USAGE))
        return
    checked = preflight.check(config)
    config = origin.adopted(config)
    if is_dry:
        _show_dry_run(config)
        return
    logs.begin(process, config.run_name)
    done = preflight.look_back(config)
    starting = [checked, "importing torch, transformers, PEFT and DeepSpeed"]
    for line in filter(None, done or starting) if process == 0 else ():
        logs.LOG.info(line)
    if done:
        is_due = not has_report(Path(config.output.dir) / config.run_name)
    else:
        is_due = run(config).is_finished
    if is_due and process == 0:
        _report(config)


def _report(config: Config) -> None:
    """Say what came out, and write the report; a run that is finished stays so where this fails."""
    if not config.output.report:
        return
    folder = Path(config.output.dir) / config.run_name
    try:
        with garbage.permanent():
            from sfed.report import page
            from sfed.report.opening.outcome import outcome_of, sentences

            story = open_run(folder)
            outcome = outcome_of(story)
            path = page.write_report([story], folder)
    except Exception as error:  # noqa: BLE001  (it is named, and all else is on disk)
        kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
        reason = f"{kind}{one_line(error, 200)}"
        logs.LOG.warning(
            f"the report could not be written ({reason}); the run is complete, and sfed report "
            f"{folder} tries again"
        )
        return
    if outcome is not None:
        logs.LOG.info(f"result     {sentences(outcome)}")
    logs.LOG.info(f"report     {path}")


def _show_dry_run(config: Config) -> None:
    """Show what a run would do. Process 0 reads everything; the others have nothing to do."""
    here = launch()
    if here.rank == 0:
        from sfed.plan import dry_run

        dry_run.show(config, here.size)


def run(config: Config, *, one_of_many: bool = False) -> SessionEnd:
    """Run a configuration as the task of this process: its signals, log lines and exit code.

    Collective. Arguments, result and errors of a user as of ``session.run_session``.

    Raises:
        SystemExit: where training failed, or another process was asked to stop; with a text where
            another process is the cause.
    """
    started = time.monotonic()
    with garbage.permanent(), command.importing():
        from sfed.federated import session
        from sfed.observability.third_party import quieten

    import_seconds = time.monotonic() - started

    def take_over(world: World, stop: StopRequest) -> None:
        quieten(world.rank, world.device.type, config.run_name)
        stop.listen()

    try:
        end = session.run_session(
            config, one_of_many=one_of_many, import_seconds=import_seconds, on_start=take_over
        )
    except (TrainingFailedError, DivergedError) as failure:
        command.leave(str(failure), 1)
    except MissingProcessError as failure:
        sys.exit(f"sfed: {failure}")
    if not (end.is_finished or end.was_asked_here or one_of_many):
        # Whoever started this process did not ask it to stop: for them the run is not done.
        sys.exit(1)
    return end


if __name__ == "__main__":
    command.run_command(main)
    sys.exit(0)
