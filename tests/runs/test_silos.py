"""Clients that are files: whole runs of a folder of files of several kinds, by name."""

from __future__ import annotations

import csv
import gzip
import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as parquet
import pytest
from peft import PeftModel
from transformers import LlamaForCausalLM

from sfed import open_run
from sfed.config import load as config_load
from sfed.federated import preflight
from sfed.report import __main__ as report
from sfed.utils.errors import DataError
from tests.support import runs, tiny

NAMES = ["gr\u00fcn klinik", "hill", "lake"]
FOLDERS = ["grun-klinik", "hill", "lake"]


def rows_of(folder: Path) -> list[list[dict[str, str]]]:
    found = []
    for i in range(len(NAMES)):
        path = tiny.save_rows(folder / "rows.jsonl", 8 + 2 * i, seed=i)
        found.append([json.loads(line) for line in path.read_text().splitlines()])
    return found


def write_silos(folder: Path, rows: list[list[dict[str, str]]]) -> Path:
    """The rows of three clients as three kinds of files, and an empty file between them."""
    silos = folder / "silos"
    silos.mkdir()
    lines = "".join(json.dumps(row) + "\r\n" for row in rows[0])
    (silos / f"{NAMES[0]}.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.encode())
    with gzip.open(silos / "hill.csv.gz", "wt", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[1][0]))
        writer.writeheader()
        writer.writerows(rows[1])
    (silos / "hopital.jsonl").touch()
    parquet.write_table(pa.Table.from_pylist(rows[2]), silos / "lake.parquet")
    return silos


def settings_of(tiny_folder: Path, out: Path, name: str, **data: Any) -> dict[str, Any]:
    return tiny.settings(
        tiny_folder,
        data={"task": "text", **data},
        partition={"kind": "by_file"},
        federated={"num_clients": None, "num_rounds": 2},
        output={"dir": str(out / "runs"), "name": name},
    )


@pytest.fixture(scope="module")
def silos(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of two processes on a folder of files, with one held-out file for all clients."""
    folder = tmp_path_factory.mktemp("silos")
    rows = rows_of(folder)
    held = tiny.save_rows(folder / "held.jsonl", 5, seed=9)
    data = {"eval_files": str(held), "on_small_client": "skip"}
    own = settings_of(
        tiny_folder, folder, "named", train_files=str(write_silos(folder, rows)), **data
    )
    return {"folder": runs.run(2, own), "settings": own, "rows": rows, "held": held}


@pytest.mark.dist
def test_each_file_is_a_client_with_its_name_everywhere(silos, tiny_folder):
    folder = silos["folder"]
    run = open_run(folder)
    assert sorted(run.adapters) == sorted([*FOLDERS, "global"])
    assert [(one.name, one.adapter.name) for one in run.clients.values()] == [
        *zip(NAMES, FOLDERS, strict=True)
    ]
    assert [entry["name"] for entry in runs.rounds(folder)[-1]["clients"]] == NAMES
    parts = json.loads((folder / "partition.json").read_text())["clients"]
    assert [(part["name"], part["adapter"]) for part in parts] == [
        *zip(NAMES, FOLDERS, strict=True)
    ]
    assert json.loads((folder / "adapters" / FOLDERS[0] / "client.json").read_text()) == {
        "client": 0,
        "name": NAMES[0],
    }
    assert run.config["resolved"]["left_out_clients"] == ["hopital"]
    report.main([str(folder)])
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert all(name in page for name in (*NAMES, "hopital"))
    for name in FOLDERS:
        base = LlamaForCausalLM.from_pretrained(tiny_folder / "model")
        assert PeftModel.from_pretrained(base, folder / "adapters" / name).peft_config
    lines = preflight.look_back(config_load.validate(silos["settings"]))
    assert lines is not None and "nothing to do" in lines[0]


@pytest.mark.dist
def test_one_held_out_file_is_evaluated_whole_by_each_client(silos):
    parts = json.loads((silos["folder"] / "partition.json").read_text())["clients"]
    assert [part["eval"] for part in parts] == [list(range(5))] * 3
    before = runs.rounds(silos["folder"])[0]["clients"]
    assert len({entry["personal_loss"] for entry in before}) == 1  # B = 0: one model, one set


def test_a_client_that_is_left_out_may_have_an_empty_held_out_file(tmp_path):
    row = json.dumps({"prompt": "a", "completion": "b"}) + "\n"
    for split, count in (("train", 3), ("held", 1)):
        (tmp_path / split).mkdir()
        for name in ("hill", "lake", "moor"):
            rows = 0 if name == "moor" else count
            (tmp_path / split / f"{name}.jsonl").write_text(row * rows)
    files = {"train_files": str(tmp_path / "train"), "eval_files": str(tmp_path / "held")}
    own = settings_of(tmp_path, tmp_path, "run", on_small_client="skip", **files)
    assert preflight.check(config_load.validate(own), 1)
    (tmp_path / "held" / "lake.jsonl").write_text("")
    with pytest.raises(DataError, match="1 of 6 files") as raised:
        preflight.check(config_load.validate(own), 1)
    assert "held/lake.jsonl: it holds no rows; nothing can" in str(raised.value)
    own["data"]["on_small_client"] = "refuse"
    with pytest.raises(DataError, match="3 of 6 files"):
        preflight.check(config_load.validate(own), 1)


@pytest.mark.dist
def test_kind_and_name_of_a_file_change_no_number(silos, tiny_folder, tmp_path):
    for client, rows in enumerate(silos["rows"]):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{client}.jsonl").write_text(text)
    data = {"train_files": str(tmp_path / "{client}.jsonl"), "eval_files": str(silos["held"])}
    own = settings_of(tiny_folder, tmp_path, "numbered", **data)
    own["federated"]["num_clients"] = 3
    numbered = runs.adapters(runs.run(2, own))
    assert list(numbered) == ["client-0000", "client-0001", "client-0002", "global"]
    named = runs.adapters(silos["folder"])
    assert runs.identical(named, numbered)


def test_values_name_adapters_and_those_of_an_older_version_are_replaced(tiny_folder, tmp_path):
    own = tiny.settings(
        tiny_folder,
        data={"train_files": str(tiny.save_rows(tmp_path / "rows.jsonl", 24, kinds=4))},
        partition={"kind": "by_key", "key": "kind"},
        federated={"num_clients": 3, "num_rounds": 1},
        output={"dir": str(tmp_path), "name": "run"},
    )
    folder = runs.run(1, own)
    # Client 0 holds two values and has no name.
    assert sorted(open_run(folder).adapters) == ["client-0000", "global", "kind-2", "kind-3"]
    adapters = folder / "adapters"
    for name, former in (("kind-2", "client-0001"), ("kind-3", "client-0002")):
        (adapters / name).rename(adapters / former)
        (adapters / former / "client.json").unlink()
    partition = folder / "partition.json"
    parts = json.loads(partition.read_text())["clients"]
    kept = [{k: v for k, v in part.items() if k not in ("name", "adapter")} for part in parts]
    partition.write_text(json.dumps({"clients": kept}))
    assert open_run(folder).clients[2].adapter == adapters.resolve() / "client-0002"
    assert preflight.look_back(config_load.validate(own)) is not None
    own["federated"]["num_rounds"] = 2
    assert preflight.look_back(config_load.validate(own)) is None
    assert runs.run(1, own) == folder
    assert sorted(open_run(folder).adapters) == ["client-0000", "global", "kind-2", "kind-3"]
    assert preflight.look_back(config_load.validate(own)) is not None
    shutil.rmtree(adapters / "kind-2")
    assert preflight.look_back(config_load.validate(own)) is None
