"""Tests of log lines, progress in logs, and where the time of a run went."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import sys
import warnings
from datetime import datetime
from pathlib import Path

import pytest

from sfed import train
from sfed.config import load as config_load
from sfed.federated import build as federated_build
from sfed.federated import session
from sfed.observability import console, logs, metrics
from sfed.observability.console import Console
from sfed.observability.logs import LOG
from sfed.utils import command
from sfed.utils.errors import UserError
from tests.support import runs, tiny
from tests.support.processes import on_processes

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7"
PREFIX = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d \[process (\d+)\] (.*)")


@pytest.fixture(autouse=True)
def _as_before(monkeypatch):
    for variable in ("SFED_LOG_LEVEL", "SFED_LOG_FORMAT"):
        monkeypatch.setenv(variable, "")  # so that it is put back afterwards
    root = logging.getLogger()
    levels, handlers = (root.level, LOG.level), list(root.handlers)
    yield
    root.setLevel(levels[0])
    LOG.setLevel(levels[1])
    root.handlers[:] = handlers


def said(capsys) -> list[tuple[int, str]]:
    """(process, text) of every line; each has its time and no control character."""
    lines = capsys.readouterr().out.splitlines()
    found = [PREFIX.fullmatch(line) for line in lines]
    assert all(found), lines
    return [(int(match[1]), match[2]) for match in found if match]


def event(number: int, seconds: float = 2.0, **values: float) -> dict[str, object]:
    return {
        "event": "round",
        "round": number,
        metrics.TRAIN_LOSS: 0.5,
        metrics.ROUND_SECONDS: seconds,
        metrics.TOKENS_PER_SECOND: 1000.0,
        **values,
    }


def test_a_line_of_a_log_has_time_and_process_and_a_warning_says_so(capsys):
    logs.begin(3)
    LOG.info("all is well")
    LOG.debug("details")
    LOG.warning("look at this\nand at that")
    logging.getLogger("some.library").info("chatter")
    logging.getLogger("some.library").warning("beware")
    assert said(capsys) == [
        (3, "all is well"),
        (3, "warning: look at this"),
        (3, "and at that"),
        (3, "warning: some.library: beware"),
    ]


@pytest.mark.parametrize(
    ("level", "shown"),
    [
        ("debug", ["details", "fact", "some.library: chatter", "warning: alas", "error: no"]),
        ("info", ["fact", "warning: alas", "error: no"]),
        ("warning", ["warning: alas", "error: no"]),
        ("error", ["error: no"]),
    ],
)
def test_the_level_holds_for_us_and_for_libraries(level, shown, capsys):
    assert logs.take_options(["a.yaml", "--log-level", level, "k=v"]) == ["a.yaml", "k=v"]
    logs.begin(0)
    logs.begin(0)  # says nothing twice
    LOG.debug("details")
    LOG.info("fact")
    logging.getLogger("some.library").info("chatter")
    LOG.warning("alas")
    LOG.error("no")
    assert [text for _, text in said(capsys)] == shown


@pytest.mark.parametrize(
    "arguments", [["--log-level"], ["--log-level=loud"], ["--log-format", "xml"]]
)
def test_an_unknown_option_value_is_a_mistake_that_lists_what_is_known(arguments):
    with pytest.raises(UserError, match=r"one of (info, debug|text, json)"):
        logs.take_options(arguments)


def test_an_unknown_value_in_the_environment_is_a_mistake_too(monkeypatch):
    monkeypatch.setenv("SFED_LOG_LEVEL", "loud")
    with pytest.raises(UserError, match="SFED_LOG_LEVEL"):
        logs.begin(0)


def test_json_lines_are_objects_with_the_numbers(capsys):
    logs.take_options(["--log-format=json"])
    logs.begin(0)
    speaker = Console(is_main=True)
    speaker.begin_rounds(0, 2)
    speaker.begin_round(0)
    speaker.end_round(event(1))
    speaker.closing_table(None, {**event(1), "clients": []}, {})
    LOG.warning("key %s", TOKEN)
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["round"] == 1 and first["train/loss"] == 0.5 and first["process"] == 0
    assert datetime.fromisoformat(first["time"]).tzinfo
    assert second["level"] == "warning" and second["message"] == "key ***"


def test_json_lines_name_run_and_host_and_errors_are_objects_too(capsys):
    logs.take_options(["--log-format=json"])
    logs.begin(2, "demo")
    LOG.info("all is well")
    command.say_error(f"sfed: no room\n  {TOKEN}")
    printed = capsys.readouterr()
    line, error = json.loads(printed.out), json.loads(printed.err)
    source = {"process": 2, "host": socket.gethostname(), "run": "demo"}
    assert source.items() <= line.items()
    assert source.items() <= error.items()
    assert (error["level"], error["message"]) == ("error", "sfed: no room\n  ***")
    logs.take_options(["--log-format=text"])
    logs.begin(0)
    command.say_error("sfed: no room")
    assert capsys.readouterr().err == "sfed: no room\n"


def test_on_a_terminal_a_line_is_what_it_says(monkeypatch, capsys):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    for process in (0, 3):
        logs.begin(process)
        LOG.info("all is well")
        LOG.warning("look at this")
    logs.begin(0)
    LOG.info("a long line is broken between words, not in /a/name/of/a/file/of/some/length")
    assert capsys.readouterr().out.splitlines() == [
        "all is well",
        "warning: look at this",
        "[process 3] all is well",
        "[process 3] warning: look at",
        "  this",
        "a long line is broken between",
        "  words, not in",
        "  /a/name/of/a/file/of/some/length",
    ]


def test_no_line_holds_a_secret_not_even_a_traceback(capsys):
    logs.begin(0)
    try:
        json.loads("", cls=lambda **_: int(f"https://ann:{TOKEN}@host"))
    except ValueError:
        LOG.exception("it failed with %s", TOKEN)
    text = capsys.readouterr().out
    assert "Traceback" in text and "https://***@host" in text and TOKEN not in text


def test_a_log_gets_a_line_per_round_and_one_now_and_then_within(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    logs.begin(0)
    speaker = Console(is_main=True)
    speaker.begin_rounds(0, 2)
    for number in (0, 1):
        speaker.begin_round(number)
        for step in range(1, 11):
            now[0] += 7.0
            speaker.step(step, 10, lambda: 1.25, 70)
        speaker.end_round(event(number + 1, seconds=70.0))
    lines = [text for _, text in said(capsys)]
    assert lines == [
        "round 1/2  step 5/10  loss 1.250  10 tokens/s  ETA 1 min 45 s",
        "round 1/2  step 10/10  loss 1.250  10 tokens/s  ETA 1 min 10 s",
        "round 1/2  train 0.5000  70.0 s  1,000 tokens/s  ETA 1 min 10 s",
        "round 2/2  step 5/10  loss 1.250  10 tokens/s  ETA 35 s",
        "round 2/2  step 10/10  loss 1.250  10 tokens/s  ETA 0 s",
        "round 2/2  train 0.5000  70.0 s  1,000 tokens/s",
    ]


def test_a_round_that_is_resumed_is_timed_by_the_steps_since_then(monkeypatch, capsys):
    """Of 40 steps 30 were made before: 30 s have brought 3 of them, not 33."""
    now = [0.0]
    monkeypatch.setattr(console.time, "monotonic", lambda: now[0])
    logs.begin(0)
    speaker = Console(is_main=True)
    speaker.begin_rounds(0, 2)
    speaker.begin_round(0)
    for step in range(31, 35):
        now[0] += 10.0
        speaker.step(step, 40, lambda: 1.25, 70)
    assert [text.rpartition("  ")[2] for _, text in said(capsys)] == ["ETA 7 min 50 s"]


def test_only_debug_has_every_step_of_every_process(capsys):
    losses = []

    def read_loss() -> float:
        losses.append(1.0)
        return 1.0

    for level in ("info", "debug"):
        logs.take_options(["--log-level", level])
        logs.begin(1)
        silent = Console(is_main=False)
        silent.begin_rounds(0, 1)
        silent.begin_round(0)
        for step in (1, 2):
            silent.step(step, 2, read_loss, 8)
        silent.end_round(event(1))
    assert len(losses) == 2, "reading a loss waits for the device"
    assert [(p, text.partition("  loss")[0]) for p, text in said(capsys)] == [
        (1, "round 1/1  step 1/2"),
        (1, "round 1/1  step 2/2"),
    ]


def _warn_on_each(settings) -> None:
    """A run in which a library warns on each process."""
    path = Path(settings["output"]["dir"]) / f"said-{os.environ['RANK']}"
    sys.stdout = path.open("w", encoding="utf-8")
    build = federated_build.build

    def build_and_warn(*arguments):
        warnings.warn("the disk is nearly full", stacklevel=1)
        logging.getLogger("transformers").warning("an odd tokenizer")
        return build(*arguments)

    session.build = build_and_warn
    train.run(config_load.validate(settings))


@pytest.mark.dist
def test_a_warning_of_any_process_is_seen_and_a_run_says_where_its_time_went(tiny_folder, tmp_path):
    settings = tiny.settings(tiny_folder, output={"dir": str(tmp_path), "name": "run"})
    on_processes(2, _warn_on_each, settings)
    for process in (0, 1):
        lines = (tmp_path / f"said-{process}").read_text().splitlines()
        for what in ("warning: py.warnings: ", "warning: transformers: an odd tokenizer"):
            assert any(f"[process {process}] {what}" in line for line in lines), lines
        assert any("round 3/3" in line for line in lines) == (process == 0)
    assert "[process 0] time   " in (tmp_path / "said-0").read_text()
    events = list(metrics.read_events(tmp_path / "run" / "metrics.jsonl"))
    assert [metrics.LOADING_SECONDS in one for one in events] == [True, False, False, False]
    assert [one["event"] for one in events] == ["round"] * 4
    spent = metrics.time_spent(events)
    assert {"starting", "reading and tokenising", "loading the model", "local steps"} <= set(spent)
    assert {"evaluation before training", "evaluation", "averaging"} <= set(spent)
    rounds = runs.rounds(tmp_path / "run")
    assert spent["local steps"] == pytest.approx(sum(one[metrics.LOCAL_SECONDS] for one in rounds))
    for one in rounds[1:]:
        parts = (metrics.LOCAL_SECONDS, metrics.WAIT_SECONDS, metrics.AGGREGATE_SECONDS)
        assert sum(one[part] for part in parts) <= one[metrics.ROUND_SECONDS]


def test_the_time_spent_is_summed_over_starts_and_rounds():
    events = [
        {
            **event(0),
            metrics.IMPORTS_SECONDS: 2.0,
            metrics.LOADING_SECONDS: 1.0,
            metrics.EVALUATE_SECONDS: 4.0,
        },
        event(1, **{metrics.EVALUATE_SECONDS: 3.0, metrics.LOCAL_SECONDS: 10.0}),
        {**event(2), metrics.LOCAL_SECONDS: 11.0, metrics.IMPORTS_SECONDS: 2.5},
    ]
    assert metrics.time_spent(events) == {
        "imports": 4.5,
        "loading the model": 1.0,
        "evaluation before training": 4.0,
        "local steps": 21.0,
        "evaluation": 3.0,
    }


def test_what_comes_from_data_reaches_a_log_in_printable_form_only(capsys):
    logs.begin(0)
    LOG.info("client \x1b]0;x\x07 of \u202e%s\nnext", "\x9b")
    command.say_error("no \x1b[2J such key")
    found = capsys.readouterr()
    assert r"client \x1b]0;x\x07 of \u202e\x9b" in found.out and found.out.endswith("next\n")
    assert found.err == "no \\x1b[2J such key\n"


def test_a_table_shows_names_as_they_are_and_printable(capsys):
    logs.begin(0)
    entry = {"client": 0, "examples": 2, "eval_loss": 0.5}
    names = {0: "[/b] :smile: \x1b]0;\x07\n$x$"}
    Console(is_main=True).closing_table(None, event(1) | {"clients": [entry]}, names)
    assert r"[/b] :smile: \x1b]0;\x07\n$x$" in capsys.readouterr().out


def test_a_command_whose_results_are_for_programs_logs_to_stderr(capsys):
    for to_stderr in (True, False):
        logs.begin(0, to_stderr=to_stderr)
        logging.getLogger("other.library").warning("careful")
        shown = capsys.readouterr()
        quiet, loud = (shown.out, shown.err) if to_stderr else (shown.err, shown.out)
        assert quiet == "" and "warning: other.library: careful" in loud
