"""The runner goes on after failures, ends what hangs, and names what is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from sfed.doctor.measurements import MEASUREMENTS
from tests.gpu import cases, steps
from tests.gpu.runner import Runner
from tests.gpu.steps import ANSWER, Step
from tests.support.deadlines import HANG_SECONDS


def python(
    name: str, code: str, *words: str, deadline: float = HANG_SECONDS, needs: str = "json"
) -> Step:
    return Step(name, (sys.executable, "-c", code, *words), deadline, (needs,))


STEPS = [
    python("prints", "print('noise'); print('{\"figure\": 1}')"),
    python("fails", "raise SystemExit('no such thing')"),
    python("hangs", "import time; time.sleep(1e6)", deadline=0.5),
    python("lacks", "", needs="no_such_package"),
    python("writes", "import sys; open(sys.argv[1], 'w').write('{\"figure\": 2}')", ANSWER),
]


def test_every_step_leaves_its_result(tmp_path: Path):
    lines: list[str] = []
    runner = Runner(tmp_path / "report.json", HANG_SECONDS, lines.append)
    runner.run(STEPS)
    report = json.loads((tmp_path / "report.json").read_text())
    found = {step["name"]: step for step in report["steps"]}
    assert [step["status"] for step in found.values()] == [
        "ok",
        "failed",
        "timeout",
        "skipped",
        "ok",
    ]
    assert [found[name]["figures"] for name in ("prints", "writes")] == [
        {"figure": 1},
        {"figure": 2},
    ]
    assert "no such thing" in found["fails"]["output"]
    assert found["lacks"]["reason"] == "not installed: no_such_package"
    assert len(lines) == len(STEPS)


def test_no_step_begins_when_the_time_is_up(tmp_path: Path):
    runner = Runner(tmp_path / "report.json", 0.0, lambda _line: None)
    runner.run(STEPS[:1])
    (only,) = runner.report["steps"]
    assert (only["status"], only["reason"]) == ("skipped", "no time is left (--minutes)")


def test_every_case_and_every_measurement_is_a_step():
    assert set(steps.CASES) == set(cases.CASES)
    measured = {
        step.command[3]
        for full in (False, True)
        for step in [steps.hardware(), *steps.all_steps(full=full)]
        if "tests.gpu.measure" in step.command
    }
    assert measured == {"hardware", *MEASUREMENTS}
