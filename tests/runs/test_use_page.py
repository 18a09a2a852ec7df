"""Every sfed command of docs/use.md, in order, on the demo."""

from __future__ import annotations

import importlib
import io
import json
import re
import shlex
import sys
from itertools import islice
from pathlib import Path

import pytest

from sfed.cli import COMMANDS
from sfed.config import load as config_load
from sfed.config.schema import DEMO
from sfed.data import demo
from sfed.export import hub
from sfed.federated import session
from tests.support.launchers import ROOT

pytestmark = pytest.mark.slow
PAGE = ROOT / "docs" / "use.md"


def commands() -> list[list[str]]:
    """The words of each command, without what a shell reads into it."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line.startswith("sfed ")]


def test_the_commands_of_the_page_work_on_the_demo(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    little = {
        **DEMO,
        "data": {**DEMO["data"], "max_train_examples": 400, "max_eval_examples": 16},
        "train": {**DEMO["train"], "local_steps": 1, "batch_size": 2},
        "evaluation": {"every_rounds": 5},
    }
    session.run_session(config_load.validate(little))
    rows = [row for kind in demo.KINDS for row in islice(demo.stream(kind, seed=3), 1)]
    (tmp_path / "new.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pushed: list[Path] = []
    monkeypatch.setattr(hub, "push", lambda folder, name: pushed.append(folder) or name)
    found = commands()
    assert {words[0] for words in found} == {"chat", "eval", "export"}
    for command, *words in found:
        monkeypatch.setattr(sys, "stdin", io.StringIO("How many?\n"))
        capsys.readouterr()
        own = [w for w in words if w not in ("<", "questions.txt")]
        own += ["--max-new-tokens", "4"] if command == "chat" else []
        importlib.import_module(COMMANDS[command][0]).main(own)
        assert capsys.readouterr().out.strip(), words
    for named in ("export/round-000005/sums", "export/round-000004/travel"):
        assert (tmp_path / "runs" / "demo" / named / "README.md").is_file()
    assert (tmp_path / "runs/demo/export/merged-000005/sums/config.json").is_file()
    assert (tmp_path / "handover" / "global").is_dir()
    assert pushed == [Path("handover/sums")]
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert [one["name"] for one in scores["adapters"]] == ["base model", "sums", "global"]
