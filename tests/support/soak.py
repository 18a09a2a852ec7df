"""A run that is killed over and over: ``python -m tests.support.soak --kills 100 --minutes 20``.

Two processes train a tiny model. At random moments, at the start, in a step, in the mean, while a
checkpoint is written, one of them or both get kill -9 or SIGTERM; as a launcher would, the soak
then ends the other one and starts both again. The adapters at the end have to be those of the run
that nobody disturbed, bit for bit.

With ``--one-process`` one of the two gets kill -9 within a round, and the other has to leave by
itself; every second time it is told to stop, as launchers do. How long that takes is measured.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import random
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import runs, tiny
from tests.support.deadlines import HANG_SECONDS, scaled
from tests.support.processes import PRELOAD, enter_and_log, free_port

_NUM_PROCESSES = 2
_SHARE_OF_TIMED_KILLS = 0.3
"""Kills that come by the clock, as a rule before training begins; others wait for a round."""
_SECONDS_OF_START = 3.0


@dataclass(frozen=True)
class Plan:
    """What is done to the run."""

    kills: int
    end: float
    """Monotonic time after which nothing is disturbed any more."""
    chance: random.Random
    one_process: bool
    """Whether only one process is killed, within a round, and the other leaves by itself."""


@dataclass
class Tally:
    """What happened."""

    kills: int = 0
    terms: int = 0
    starts: int = 0
    rounds: int = 0
    seconds: float = 0.0
    is_equal: bool = False
    seconds_until_gone: dict[str, list[float]] = field(default_factory=dict)
    """From a kill to the end of all processes, told to stop and not."""


class TakesTooLongError(RuntimeError):
    """An attempt came to no end."""


def soak(folder: Path, plan: Plan, num_rounds: int) -> Tally:
    """Train undisturbed, and disturbed by kills; compare the adapters."""
    tiny.save_model(folder / "model")
    tiny.save_rows(folder / "rows.jsonl", 80, kinds=4)
    calm = runs.run(_NUM_PROCESSES, _settings(folder, "calm", num_rounds))
    tally, begin = Tally(), time.monotonic()
    disturbed = _settings(folder, "disturbed", num_rounds)
    run_folder = folder / "disturbed"
    while not (run_folder / "adapters" / "client-0003").is_dir():
        tally.starts += 1
        left = plan.kills - tally.kills - tally.terms if time.monotonic() < plan.end else 0
        _attempt(disturbed, plan, left, tally)
    _attempt(disturbed, plan, 0, tally)  # it may have died while writing the adapters
    tally.seconds = time.monotonic() - begin
    tally.rounds = len(runs.rounds(run_folder)) - 1
    assert [event["round"] for event in runs.rounds(run_folder)] == list(range(num_rounds + 1))
    tally.is_equal = runs.identical(runs.adapters(calm), runs.adapters(run_folder))
    return tally


def _settings(folder: Path, name: str, num_rounds: int) -> dict[str, Any]:
    return tiny.settings(
        folder,
        output={"dir": str(folder), "name": name},
        federated={"num_clients": 4, "num_rounds": num_rounds},
        evaluation={"adapters": ["personal"], "every_rounds": 50},
    )


def _attempt(settings: dict[str, Any], plan: Plan, left: int, tally: Tally) -> None:
    """Start the processes, and end them at some moment where ``left`` kills are left."""
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.TemporaryDirectory() as logs:
        shared = (_NUM_PROCESSES, free_port(), runs.train_settings, (settings,), logs, {})
        processes = [
            context.Process(target=enter_and_log, args=(process, *shared))
            for process in range(_NUM_PROCESSES)
        ]
        for process in processes:
            process.start()
        if left:
            _wait_for_moment(settings, left, plan, processes)
        if left and plan.one_process:
            _strike_one(processes, plan.chance, Path(logs), tally)
        elif left:
            _strike(processes, plan.chance, tally)
        _wait_for_end(processes, Path(logs))
        codes = [process.exitcode for process in processes]
        if not left and codes != [0, 0]:
            said = [(Path(logs) / f"log-{i}").read_text() for i in range(_NUM_PROCESSES)]
            raise RuntimeError(f"an attempt that nobody disturbed ended with {codes}: {said}")


def _wait_for_moment(settings: dict[str, Any], left: int, plan: Plan, processes: list[Any]) -> None:
    """Wait for some time from the start, or for a round and some time within it."""
    output, num_rounds = settings["output"], settings["federated"]["num_rounds"]
    run_folder, chance = Path(output["dir"]) / output["name"], plan.chance
    begin, done = time.monotonic(), _finished(run_folder)
    # A fast machine must not be done before: the last quarter of the run is left alone.
    latest = num_rounds - num_rounds // 4
    if not plan.one_process and chance.random() < _SHARE_OF_TIMED_KILLS:
        target, rest = latest, chance.uniform(0.0, _SECONDS_OF_START)
    else:
        # So that all kills find a place in the run.
        target = min(
            latest, done + 1 + int(chance.uniform(0.0, 1.5) * (latest - done) / (left + 1))
        )
        rest = HANG_SECONDS
    while _finished(run_folder) < target and all(process.is_alive() for process in processes):
        waited = time.monotonic() - begin
        if waited > rest < HANG_SECONDS:
            return
        if waited > HANG_SECONDS:
            raise TakesTooLongError("no progress")
        time.sleep(0.002)
    # Somewhere within a round of a few hundredths of a second.
    time.sleep(chance.uniform(0.0, 0.05))


def _finished(run_folder: Path) -> int:
    path = run_folder / "metrics.jsonl"
    return path.read_bytes().count(b'"round": ') - 1 if path.is_file() else -1


def _strike(processes: list[Any], chance: random.Random, tally: Tally) -> None:
    victims = chance.choice([processes[:1], processes[1:], processes])
    number = chance.choice([signal.SIGKILL, signal.SIGKILL, signal.SIGTERM])
    living = [victim for victim in victims if victim.is_alive()]
    for victim in living:
        os.kill(victim.pid, number)
    tally.kills += bool(living) and number == signal.SIGKILL
    tally.terms += bool(living) and number == signal.SIGTERM


def _strike_one(processes: list[Any], chance: random.Random, logs: Path, tally: Tally) -> None:
    """Kill one process, and measure how soon the other is gone."""
    is_told = tally.kills % 2 == 1
    victim, other = chance.sample(processes, 2)
    os.kill(victim.pid, signal.SIGKILL)
    begin = time.monotonic()
    if is_told:
        victim.join()
        other.terminate()
    other.join(HANG_SECONDS)
    if other.is_alive():
        said = [path.read_text() for path in sorted(logs.glob("log-*"))]
        other.kill()
        raise TakesTooLongError(f"the other process came to no end: {said}")
    tally.kills += 1
    how = "told to stop" if is_told else "not told to stop"
    tally.seconds_until_gone.setdefault(how, []).append(time.monotonic() - begin)


def _wait_for_end(processes: list[Any], logs: Path) -> None:
    """As a launcher does: once one has ended badly, SIGTERM for the others, then SIGKILL."""
    begin, noticed = time.monotonic(), None
    while any(process.is_alive() for process in processes):
        now = time.monotonic()
        if noticed is None and any(process.exitcode for process in processes):
            noticed = now
            for process in processes:
                process.terminate()
        if noticed is not None and now - noticed > scaled(3.0):
            for process in processes:
                process.kill()
        if now - begin > HANG_SECONDS:
            said = [path.read_text() for path in sorted(logs.glob("log-*"))]
            for process in processes:
                process.kill()
            raise TakesTooLongError(f"an attempt came to no end: {said}")
        time.sleep(0.02)


def main() -> int:
    """Run the soak and say how it went; 1 where the adapters differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=600)
    parser.add_argument("--minutes", type=float, default=20.0, help="undisturbed after that")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--one-process", action="store_true", help="the other leaves by itself")
    chosen = parser.parse_args()
    end = time.monotonic() + 60.0 * chosen.minutes
    plan = Plan(chosen.kills, end, random.Random(chosen.seed), chosen.one_process)
    with tempfile.TemporaryDirectory() as folder:
        tally = soak(Path(folder), plan, chosen.rounds)
    sys.stdout.write(
        f"{tally.kills} kill -9, {tally.terms} SIGTERM, {tally.starts} starts, {tally.rounds} "
        f"rounds, {tally.seconds:.0f} s; adapters equal bit for bit: {tally.is_equal}\n"
    )
    for how, seconds in tally.seconds_until_gone.items():
        sys.stdout.write(
            f"{len(seconds)} times the other process, {how}, was gone after a median of "
            f"{statistics.median(seconds):.1f} s, at most {max(seconds):.1f} s\n"
        )
    return 0 if tally.is_equal else 1


if __name__ == "__main__":
    sys.exit(main())
