"""The example of docs/python-api.md, as a plain script and under torchrun."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.support import runs, tiny
from tests.support.launchers import ROOT, python
from tests.support.processes import free_port

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


def test_the_example_trains_in_one_process_and_under_torchrun(script: Path):
    folder = script.parent
    alone = python("train.py", "my.json", "output.name=alone", cwd=folder)
    port = f"--master_port={free_port()}"
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", port)
    both = python(*torchrun, "train.py", "my.json", "output.name=both", cwd=folder)
    for done in (alone, both):
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.splitlines()[0] == "rounds 2 of 2"
        clients = re.findall(r"^client (\d) \d+ examples (.+)$", done.stdout, re.MULTILINE)
        assert [number for number, _ in clients] == ["0", "1", "2", "3"]
        assert all((Path(adapter) / "adapter_config.json").is_file() for _, adapter in clients)
    one, two = (runs.adapters(folder / "runs" / name) for name in ("alone", "both"))
    assert runs.relative_difference(one, two) <= 1e-6
    assert (folder / "runs" / "both" / "report.html").is_file()


def test_the_example_says_what_is_wrong_and_every_process_ends(script: Path):
    (script.parent / "bad.jsonl").write_text("[]\n", encoding="utf-8")
    torchrun = ("-m", "torch.distributed.run", "--nproc_per_node=2", f"--master_port={free_port()}")
    words = (*torchrun, "train.py", "my.json", "data.train_files=bad.jsonl")
    ended = python(*words, cwd=script.parent)
    assert ended.returncode == 1
    assert "DataError: " in ended.stderr and "bad.jsonl" in ended.stderr
