"""What a person sees of an examination, and its JSON."""

from __future__ import annotations

import json

import pytest

from sfed.doctor.report import Report, failed, ok, skipped, warning
from tests.support.launchers import HEAVY, modules_after


def a_report(*, speaks: bool = True) -> Report:
    report = Report(speaks=speaks, command=["--only", "devices"])
    for name, result in {
        "devices": ok("two GPUs", memory=3),
        "ring": warning("one link is slow", "look at the cable"),
        "numbers": failed("far off\nby 3", "leave it out"),
        "zero3": skipped("processes share a GPU"),
    }.items():
        report.begin(name)
        report.end(result)
    return report


def test_each_check_is_a_line_and_the_summary_says_what_to_do(capsys: pytest.CaptureFixture[str]):
    a_report().summarise()
    said = capsys.readouterr().out
    assert said.splitlines()[0].split()[:2] == ["devices", "ok"]
    assert "1 ok, 1 warning, 1 failed, 1 skipped in 0 s" in said
    wrong, maybe = said.index("What is wrong:"), said.index("What may go wrong:")
    assert wrong < said.index("What to do: leave it out") < maybe
    assert maybe < said.index("What to do: look at the cable")
    assert "Nothing that was checked" not in said


def test_other_processes_print_nothing(capsys: pytest.CaptureFixture[str]):
    a_report(speaks=False).summarise()
    assert capsys.readouterr().out == ""


def test_a_check_under_way_fails_where_the_examination_breaks_off(
    capsys: pytest.CaptureFixture[str],
):
    report = a_report()
    report.begin("faults")
    report.break_off("process 1 is gone")
    result, _ = report.results["faults"]
    assert (result.status, result.seen) == ("failed", "process 1 is gone")
    report.break_off("and another")
    assert "the end" in report.results
    capsys.readouterr()


def test_the_json_holds_everything(capsys: pytest.CaptureFixture[str]):
    report = a_report()
    report.facts["machine"] = {"cores": 2}
    found = json.loads(json.dumps(report.as_json()))
    assert found.keys() == {"sfed", "command", "seconds", "summary", "machine", "checks"}
    assert found["summary"] == {"ok": 1, "warning": 1, "failed": 1, "skipped": 1}
    assert found["checks"][0] == {
        "name": "devices",
        "status": "ok",
        "seen": "two GPUs",
        "remedy": "",
        "figures": {"memory": 3},
        "seconds": found["checks"][0]["seconds"],
    }
    capsys.readouterr()


def test_wrong_arguments_are_answered_without_torch():
    loaded = modules_after(
        "from sfed.doctor.__main__ import main\n"
        "try:\n    main(['--json', 'no/such/folder.json'])\nexcept ValueError:\n    pass"
    )
    assert "sfed.doctor.__main__" in loaded and not HEAVY & loaded
