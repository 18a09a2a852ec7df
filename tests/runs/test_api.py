"""The example of docs/python-api.md, as a plain script and under torchrun."""

from __future__ import annotations

import json
import os
import re
import runpy
import sys
from pathlib import Path

import pytest

from tests.support import launchers, runs, tiny
from tests.support.launchers import ROOT
from tests.support.processes import ends_of

pytestmark = [pytest.mark.dist, pytest.mark.slow]


@pytest.fixture
def script(tiny_folder: Path, tmp_path: Path) -> Path:
    page = (ROOT / "docs" / "python-api.md").read_text(encoding="utf-8")
    example, *_ = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    (tmp_path / "train.py").write_text(example, encoding="utf-8")
    sgd = {"optimizer": "sgd", "lr": 0.1}  # AdamW enlarges differences of rounding
    settings = tiny.settings(
        tiny_folder, federated={"num_clients": 4, "num_rounds": 2, "clients_per_pass": 1}, train=sgd
    )
    settings["output"] = {"dir": "runs", "name": "run"}
    (tmp_path / "my.json").write_text(json.dumps(settings), encoding="utf-8")
    return tmp_path / "train.py"


def run_script(script: Path, *words: str) -> None:
    """What ``python train.py WORDS`` does in the folder of the script, in this process."""
    os.chdir(script.parent)
    sys.argv = [script.name, *words]
    runpy.run_path(script.name, run_name="__main__")


def test_the_example_trains_in_one_process_and_under_torchrun(script: Path):
    folder = script.parent
    (alone,) = ends_of(1, run_script, script, "my.json", "output.name=alone")
    both = launchers.torchrun(2, "train.py", "my.json", "output.name=both", cwd=folder)
    assert (alone.code, both.returncode) == (0, 0), alone.said + both.stdout + both.stderr
    for said in (alone.said, both.stdout):
        assert "rounds 2 of 2" in said.splitlines()
        clients = re.findall(r"^client (\d) \d+ examples (.+)$", said, re.MULTILINE)
        assert [number for number, _ in clients] == ["0", "1", "2", "3"]
        assert all((Path(adapter) / "adapter_config.json").is_file() for _, adapter in clients)
    one, two = (runs.adapters(folder / "runs" / name) for name in ("alone", "both"))
    assert runs.relative_difference(one, two) <= 1e-6
    assert (folder / "runs" / "both" / "report.html").is_file()


def test_the_example_says_what_is_wrong_and_every_process_ends(script: Path):
    (script.parent / "bad.jsonl").write_text("[]\n", encoding="utf-8")
    for end in ends_of(2, run_script, script, "my.json", "data.train_files=bad.jsonl"):
        assert end.code == 1
        assert "DataError: " in end.said and "bad.jsonl" in end.said
