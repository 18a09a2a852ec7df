"""Who hangs is named, with the place; nobody waits longer than the deadline."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from sfed.distributed import diagnosis, sync
from sfed.distributed import world as distributed
from sfed.distributed.diagnosis import Report
from sfed.distributed.watchdog import Heartbeat
from sfed.distributed.world import World
from sfed.utils.errors import UserError
from tests.support import disturbed, runs, tiny
from tests.support.deadlines import GRACE_SECONDS, HANG_SECONDS, RUN_SECONDS, scaled, wait_until
from tests.support.disturbed import Moment
from tests.support.processes import ends_of, on_processes
from tests.support.selection import full

DEADLINE = scaled(10.0)
"""Each of these tests waits as long, and no more of them than are needed."""


def reports(**changes: dict) -> dict[int, Report]:
    found = {
        peer: Report(place="round 3, step 7 of 9", seconds=60.0, collectives=40, pid=100 + peer)
        for peer in range(3)
    }
    for peer, values in changes.items():
        for name, value in values.items():
            setattr(found[int(peer[1:])], name, value)
    return found


@pytest.mark.parametrize(
    ("found", "named"),
    [
        (reports(p1={"reason": "MemoryError: no"}, p2={"is_silent": True}), [1]),
        (reports(p2={"is_silent": True, "place": "x"}, p0={"is_waiting": True}), [2]),
        (reports(p0={"is_waiting": True}, p2={"is_waiting": True}), [1]),
        (reports(p1={"collectives": 39}), [1]),
        (reports(), [0, 1, 2]),
    ],
    ids=["an error", "a silent process", "others wait", "fewer collectives", "nobody knows"],
)
def test_the_cause_is_named_and_nobody_else(found: dict[int, Report], named: list[int]):
    text = diagnosis.judge("why", found, 3, None)
    assert [peer for peer in range(3) if f"process {peer} " in text] == named
    assert text.startswith("why\n") and "last checkpoint" in text


def test_a_store_that_is_gone_is_said():
    text = diagnosis.judge("why", {1: Report(place="here", is_waiting=True)}, 3, None)
    assert "process 0, 2: out of reach, and so is the store" in text


def test_the_heartbeat_is_renewed_by_the_loop_alone(tmp_path: Path):
    path = tmp_path / "heartbeat"
    beat = Heartbeat(str(path))
    os.utime(path, (1.0, 1.0))
    beat.renew()
    assert path.stat().st_mtime == 1.0, "at most once a second"
    beat._last -= 2.0
    beat.renew()
    assert path.stat().st_mtime > 1.0
    Heartbeat(None).renew()


def test_a_heartbeat_that_cannot_be_written_is_a_mistake(tmp_path: Path):
    with pytest.raises(UserError, match=r"SFED_HEARTBEAT_FILE = '.*absent/x' cannot be written"):
        Heartbeat(str(tmp_path / "absent" / "x"))


def meet_a_mistake(world: World) -> None:
    with sync.raise_everywhere(world, "a check"):
        if world.rank == 1:
            raise UserError("a wrong key")


def go_on_after_a_mistake() -> str:
    """Process 1 meets a mistake, all are told; process 0 is busy for long afterwards."""
    world = distributed.start(RUN_SECONDS)
    try:
        with pytest.raises(UserError, match="a wrong key"):
            meet_a_mistake(world)
        world.watch.mistake_was_met()
        world.watch.at("busy", is_bounded=False)
        if world.rank == 0:
            time.sleep(40.0)  # longer than a process has for leaving after a mistake
        sync.leave_store_last(world)
        return "went on"
    finally:
        distributed.stop(world)


@pytest.mark.full
@pytest.mark.dist
def test_a_job_goes_on_after_a_mistake_that_all_have_met():
    assert on_processes(2, go_on_after_a_mistake) == ["went on", "went on"]


# --- whole runs -----------------------------------------------------------------------------------


def hang(settings: dict, how: str) -> None:
    """Train; process 1 hangs after the first step of round 2."""

    def act(run: Any, _stop: Any) -> None:
        if how == "stopped":
            said = "round 2, step 1 of 3"
            wait_until(lambda: said in run.world.side_store.get("at/1").decode())
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "failed":
            raise MemoryError("no room")
        time.sleep(2 * HANG_SECONDS)

    disturbed.at(Moment(1, 2, 1), act)
    runs.train_settings(settings)


ASLEEP = "has been at round 2, step 1 of 3 for"
SILENT = "gives no sign of life; last seen at round 2, step 1 of 3"
EXACT = {"deepspeed": {"zero_optimization": {"stage3_param_persistence_threshold": 0}}}


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "backbone", "words"),
    [
        full("asleep", {"sharding": "none"}, ASLEEP),
        ("asleep", {"sharding": "zero3", **EXACT}, ASLEEP),
        ("stopped", {"sharding": "none"}, SILENT),
        full("stopped", {"sharding": "zero3", **EXACT}, SILENT),
        ("failed", {"sharding": "none"}, "ended at round 2, step 1 of 3: MemoryError: no room"),
    ],
    ids=["asleep", "asleep in zero3", "stopped", "stopped in zero3", "failed"],
)
def test_a_process_that_hangs_or_fails_is_named_with_its_place(
    tiny_folder: Path, tmp_path: Path, how: str, backbone: dict, words: str
):
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        backbone=backbone,
        federated={"num_clients": 2, "num_rounds": 3, "deadline_seconds": DEADLINE},
        evaluation={"adapters": ["personal"], "every_rounds": 3},
    )
    grace = scaled(1.0) if how == "stopped" else GRACE_SECONDS  # it never ends by itself
    survivor, culprit = ends_of(2, hang, settings, how, grace_seconds=grace)
    assert survivor.code == 1 and culprit.code in (1, -signal.SIGKILL)
    (line,) = [line for line in survivor.said.splitlines() if line.startswith("  process ")]
    assert line.startswith("  process 1 (pid ") and words in line
    assert "resumes from the last checkpoint" in survivor.said
    if how == "asleep":
        assert "in sleep" not in line and "tests/unit/distributed/test_watchdog.py" in line, (
            "where it hangs"
        )
        assert words in culprit.said, "a process that can, says so itself"
    if how != "failed":
        record = json.loads((tmp_path / "run" / "debug" / "process-0000.json").read_text())
        assert record["report"]["stack"]
        kinds = {one["profiling_name"] for one in record["flight_recorder"]["entries"]}
        assert any(kind.startswith("gloo:") for kind in kinds)


def die(settings: dict, where: str) -> None:
    """Train; process 1 is killed in round 2, while process 0 waits for it or is in a step."""
    disturbed.at(Moment(1, 2, 1), lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    if where == "in a step":
        disturbed.at(Moment(0, 2, 1), lambda *_: time.sleep(2 * HANG_SECONDS))
    runs.train_settings(settings)


@pytest.mark.dist
@pytest.mark.parametrize("where", ["at the end of the round", "in a step"])
def test_the_death_of_another_process_ends_this_one_long_before_the_deadline(
    tiny_folder: Path, tmp_path: Path, where: str
) -> None:
    """No launcher tells it, and the deadline is longer than the test waits."""
    settings = tiny.settings(
        tiny_folder,
        output={"dir": str(tmp_path), "name": "run"},
        federated={"num_clients": 2, "num_rounds": 3, "deadline_seconds": 10 * HANG_SECONDS},
    )
    survivor, _ = ends_of(2, die, settings, where, grace_seconds=HANG_SECONDS)
    assert survivor.code == 1
    (line,) = [line for line in survivor.said.splitlines() if line.startswith("  process ")]
    assert line.startswith("  process 1 (pid ") and "it is gone without a word" in line


def start_beside_a_death(deadline_seconds: float) -> None:
    """Process 1 is killed when both have met and have no process group yet."""

    def end(*_: object) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return 1

    if os.environ["RANK"] == "1":
        distributed._processes_on = end
    distributed.start(deadline_seconds)


@pytest.mark.dist
def test_a_death_before_there_is_a_process_group_ends_the_other_long_before_the_deadline() -> None:
    deadline = 10 * HANG_SECONDS
    survivor, _ = ends_of(2, start_beside_a_death, deadline, grace_seconds=HANG_SECONDS)
    assert survivor.code == 1
    assert "process 1 (pid " in survivor.said and "it is gone without a word" in survivor.said
    assert "Traceback" not in survivor.said
