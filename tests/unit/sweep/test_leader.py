"""Sweeps: reading a grid, naming its runs, and running them whatever becomes of one of them."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sfed.config import load as config_load
from sfed.federated import preflight
from sfed.sweep import __main__ as sweep
from sfed.sweep import grid, results, workers
from sfed.sweep.cell_names import name_cells
from sfed.sweep.grid import Grid
from sfed.sweep.workers import LostProcessError, Workers
from sfed.utils.errors import UserError
from tests.support import launchers, runs, tiny
from tests.support.deadlines import wait_until


def write(folder: Path, **keys: Any) -> Path:
    """Write a grid file, of the demo where it names no task; JSON is YAML."""
    common = keys.get("set", {})
    if isinstance(common, dict):
        keys["set"] = {"data": {"task": "demo"}, **common}
    path = folder / "methods.yaml"
    path.write_text(json.dumps(keys))
    return path


def read(path: Path, *overrides: str, num_processes: int = 1) -> Grid:
    return grid.read(path, overrides, num_processes, preflight.check)


def names(found: Grid) -> list[str]:
    return [cell.name for cell in found.cells]


def test_the_product_of_all_lists_with_readable_names(tmp_path: Path) -> None:
    axes = {
        "federated.method": ["sfed", "fedsa"],
        "lora.rank": [4, 16],
        "federated.num_clients": [2],
        "seed": [0, 1],
    }
    found = read(write(tmp_path, grid=axes))
    assert names(found)[:3] == ["sfed-r4-N2-seed0", "sfed-r4-N2-seed1", "sfed-r16-N2-seed0"]
    assert len(found.cells) == len(set(names(found))) == 8
    last = found.cells[-1]
    assert (last.config.federated.method, last.config.lora.rank, last.config.seed) == (
        "fedsa",
        16,
        1,
    )
    assert last.folder == Path("runs/methods/fedsa-r16-N2-seed1")
    assert found.keys == tuple(axes)


def test_variants_are_multiplied_with_the_grid(tmp_path: Path) -> None:
    variants = [{"train.lr": 3e-3, "federated.method": "fedsa"}, {"federated.method": "sfed"}]
    found = read(write(tmp_path, name="other", variants=variants, grid={"seed": [0, 1]}))
    assert names(found) == [
        "fedsa-lr0.003-seed0",
        "fedsa-lr0.003-seed1",
        "sfed-seed0",
        "sfed-seed1",
    ]
    assert [cell.value("train.lr") for cell in found.cells] == [3e-3, 3e-3, 3e-4, 3e-4]
    assert found.keys == ("federated.method", "train.lr", "seed")
    assert found.folder == Path("runs/other")


def test_base_then_set_then_overrides_then_the_grid(tmp_path: Path) -> None:
    base = {"train": {"lr": 1.0, "batch_size": 2, "local_steps": 7}, "output": {"name": "mine"}}
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(base))
    path = write(
        tmp_path,
        base="base.yaml",
        set={"train": {"lr": 0.1, "batch_size": 3}, "seed": 5},
        grid={"lora.rank": [1, 2]},
    )
    for cell in read(path, "train.lr=0.5", "output.dir=else").cells:
        assert cell.config.train.local_steps == 7
        assert cell.config.train.batch_size == 3
        assert cell.config.train.lr == 0.5
        assert cell.config.seed == 5
        assert cell.folder == Path("else/methods") / cell.name


def test_other_values_have_names_too(tmp_path: Path) -> None:
    found = read(
        write(
            tmp_path,
            grid={
                "lora.scaling": ["rslora", [0.5, -0.5]],
                "train.max_grad_norm": [None, 0.5],
                "train.batch_size": [8],
                "evaluation.batch_size": [8],
                "backbone.gradient_checkpointing": [True],
            },
        )
    )
    tail = "train.batch_size8-evaluation.batch_size8-gradient_checkpointing-true"
    assert names(found) == [
        f"scaling-rslora-max_grad_norm-null-{tail}",
        f"scaling-rslora-max_grad_norm0.5-{tail}",
        f"scaling-0.5_-0.5-max_grad_norm-null-{tail}",
        f"scaling-0.5_-0.5-max_grad_norm0.5-{tail}",
    ]


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=4,
)
KEYS = ["federated.method", "lora.rank", "train.batch_size", "evaluation.batch_size", "seed"]


@given(
    st.lists(
        st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1),
        min_size=1,
        unique_by=lambda choice: json.dumps(choice, sort_keys=True),
    )
)
def test_names_are_unique_and_safe_as_folders(choices: list[dict[str, Any]]) -> None:
    made = name_cells(choices, KEYS)
    assert len({name.lower() for name in made}) == len(choices)
    for name in made:
        section = {"dir": "runs", "name": name}
        assert config_load.validate({"output": section}).run_name == name
        assert len(name) < 140


def test_a_grid_that_grows_keeps_the_names_it_has(tmp_path: Path) -> None:
    few = names(read(write(tmp_path, grid={"lora.rank": [4], "train.lr": [0.1]})))
    more = names(read(write(tmp_path, grid={"lora.rank": [4, 8], "train.lr": [0.1, 0.01]})))
    assert set(few) < set(more)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"girds": {"seed": [0]}}, ["girds: unknown key", "did you mean grid?", "nothing varies"]),
        ({"train": {"lr": 1.0}}, ["train: unknown key", "stand under set"]),
        ({"grid": {}}, ["nothing varies"]),
        ({"grid": {"seed": []}}, ["seed has an empty list"]),
        ({"grid": {"seed": 3}}, ["seed = 3 is no list; write [3]"]),
        ({"grid": {"lora": {"rank": [4]}}}, ["write dotted keys", "lora.rank: [...]"]),
        ({"grid": {"lora.rnk": [4]}}, ["lora.rnk: unknown key", "did you mean lora.rank"]),
        ({"grid": {"rank": [4]}}, ["rank: unknown key", "did you mean lora.rank"]),
        ({"grid": {"lora": [{"rank": 4}]}}, ["lora is a section"]),
        ({"grid": {"output.name": ["a"]}}, ["output.name cannot vary"]),
        ({"grid": [1]}, ["grid = [1]: a mapping"]),
        ({"variants": {"seed": 1}}, ["a list of mappings"]),
        ({"variants": [3]}, ["number 1 is 3, not a mapping"]),
        ({"variants": [{"seed": 1}], "grid": {"seed": [1]}}, ["stands in grid and in variants"]),
        ({"name": "a/b", "grid": {"seed": [0]}}, ["name = 'a/b'", "a folder"]),
        ({"set": [], "base": 3, "grid": {"seed": [0]}}, ["set = []", "base = 3"]),
        ({"base": "gone.yaml", "grid": {"seed": [0]}}, ["gone.yaml", "does not exist"]),
        ({"set": {"output": {"name": "x"}}, "grid": {"seed": [0]}}, ["output.name = 'x'"]),
        ({"set": {"output": {"resume": "x"}}, "grid": {"seed": [0]}}, ["output.resume = 'x'"]),
        ({"grid": {"seed": list(range(101)), "lora.rank": list(range(1, 101))}}, ["10,100 cells"]),
        ({"grid": {"seed": [0, 0]}}, ["2 cells are the same run"]),
        ({"variants": [{"lora.rank": 8}, {"lora.alpha": None}]}, ["2 cells are the same run"]),
        ({"grid": {"federated.num_clients": [None, 2]}}, ["2 cells are the same run", "N2"]),
        (
            {"grid": {"lora.rank": [4, -1, "x"], "seed": [0, 1]}},
            [
                "2 errors",
                "lora.rank = -1",
                "r-1-seed0, r-1-seed1",
                'lora.rank = "x"',
                "r-x-seed0",
            ],
        ),
        (
            {"set": {"train": {"lr": -1}}, "grid": {"seed": [0, 1]}},
            ["an error", "train.lr = -1", "(in all 2 cells)"],
        ),
        (
            {"grid": {"federated.method": ["sfed", "fedsa"], "lora.scaling": ["sfed"]}},
            ["lora.init=shared with a gamma that grows", "(cell fedsa-scaling-sfed)"],
        ),
    ],
)
def test_mistakes_of_the_file(tmp_path: Path, keys: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(UserError) as mistake:
        read(write(tmp_path, **keys), num_processes=2)
    for word in words:
        assert word in str(mistake.value)


@pytest.mark.parametrize(
    ("text", "overrides", "words"),
    [
        ("grid: {seed: [0, 1]}", [], ["2 errors", "model.name: no default; set model.name, or"]),
        ("grid: {seed: [0, 1]}", ["model.name=x"], ["an error", "data.task: no default"]),
        (
            "{set: {data: {task: gsm8k}}, grid: {seed: [0, 1]}}",
            [],
            ["model.name", "in all 2 cells"],
        ),
        ("grid: {data.task: [demo, gsm8k]}", [], ["model.name: no default", "(cell task-gsm8k)"]),
    ],
)
def test_a_grid_has_no_model_and_no_task_by_itself(
    tmp_path: Path, text: str, overrides: list[str], words: list[str]
) -> None:
    (path := tmp_path / "grid.yaml").write_text(text)
    with pytest.raises(UserError) as mistake:
        read(path, *overrides)
    for word in words:
        assert word in str(mistake.value)


def test_a_grid_stands_on_its_own_and_not_on_the_demos_configuration(tmp_path: Path) -> None:
    (path := tmp_path / "grid.yaml").write_text("grid: {seed: [0, 1]}")
    for cell in read(path, "data.task=demo").cells:
        assert cell.config.model.name == "demo"
        assert cell.config.train.lr == 3e-4
        assert cell.config.federated.num_clients is None


def test_what_varies_is_not_overridden(tmp_path: Path) -> None:
    path = write(tmp_path, grid={"lora.rank": [4]})
    for override in ("lora.rank=8", "lora={rank: 8}"):
        with pytest.raises(UserError, match=r"lora\.rank varies in"):
            read(path, override)


def test_no_file_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match="no grid file given"):
        sweep.main(["lora.rank=4"])
    sweep.main(["--help"])
    assert "python -m sfed.sweep GRID.yaml" in capsys.readouterr().out


def test_what_the_fork_server_imports_leaves_cuda_alone() -> None:
    """A process that has asked for a CUDA device cannot give it to those it forks."""
    program = (
        "import torch\n"
        "def refuse(*_): raise SystemExit('CUDA was asked for')\n"
        "torch.cuda.is_available = torch.cuda.device_count = torch.cuda.init = refuse\n"
        "torch.cuda._lazy_init = refuse\n"
        "import sfed.sweep.preload\n"
    )
    done = launchers.python("-c", program)
    assert done.returncode == 0, done.stderr


def test_those_that_take_part_stand_as_their_nodes_do(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, local_size in ((3, "8"), (9, "2")):
        for key, value in (("RANK", rank), ("LOCAL_RANK", rank % 8), ("WORLD_SIZE", 16)):
            monkeypatch.setenv(key, str(value))
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
        place = Workers()._environment("cell-1", taking_part=10)
        assert place["RANK"] == str(rank)
        assert place["LOCAL_RANK"] == str(rank % 8)
        assert place["WORLD_SIZE"] == "10"
        assert place["LOCAL_WORLD_SIZE"] == local_size


def test_a_process_without_a_sign_of_life_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    some = Workers()
    some.count("beats/1")
    some._must_live(1)
    some.count("beats/1")
    monkeypatch.setattr(workers, "_SECONDS_OF_SILENCE", 0.0)
    some._must_live(1)
    with pytest.raises(LostProcessError, match="process 1 of the sweep gave no sign"):
        some.hear("what it never says", speaker=1)


def tiny_grid(tiny_folder: Path, folder: Path, **keys: Any) -> Path:
    """A grid of quick runs below ``folder``/runs."""
    common = tiny.settings(tiny_folder)
    common["output"] = {"dir": str(folder / "runs")}
    for section, values in keys.pop("set", {}).items():
        common[section] = {**common[section], **values}
    return write(folder, set=common, **keys)


def in_this_process(*words: str) -> int:
    """Run a sweep of one process; returns its exit code."""
    with pytest.raises(SystemExit) as end:
        sweep.main(list(words))
    assert isinstance(end.value.code, int)
    return end.value.code


def table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "sweep.csv").open() as file:
        return {row["cell"]: row for row in csv.DictReader(file)}


def times(folder: Path) -> dict[Path, int]:
    """When each file below a folder was last written."""
    files = (path for path in folder.rglob("*") if path.name != "sweep.csv" and path.is_file())
    return {path: path.stat().st_mtime_ns for path in files}


TWO_BY_TWO = {"federated.method": ["sfed", "fedsa"], "seed": [0, 1]}


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete sweep of 2 x 2 runs: only copy it."""
    folder = tmp_path_factory.mktemp("finished")
    assert in_this_process(str(tiny_grid(tiny_folder, folder, grid=TWO_BY_TWO))) == 0
    return folder / "runs" / "methods"


@pytest.fixture
def copied(finished: Path, tiny_folder: Path, tmp_path: Path) -> Path:
    """The complete sweep, and its grid file beside it in ``tmp_path``."""
    tiny_grid(tiny_folder, tmp_path, grid=TWO_BY_TWO)
    return shutil.copytree(finished, tmp_path / "runs" / "methods")


@pytest.mark.dist
@pytest.mark.slow
class TestOneProcess:
    def test_the_table_says_what_the_runs_say(self, finished: Path) -> None:
        rows = table(finished)
        assert list(rows) == ["sfed-seed0", "sfed-seed1", "fedsa-seed0", "fedsa-seed1"]
        for name, row in rows.items():
            events = runs.rounds(finished / name)
            config = json.loads((finished / name / "config.json").read_text())
            assert row["status"] == "complete"
            assert row["federated.method"] == config["federated"]["method"]
            assert int(row["seed"]) == config["seed"]
            assert float(row["gamma"]) == config["resolved"]["gamma"]
            assert int(row["rounds"]) == 3
            assert float(row["personal_loss"]) == events[-1]["eval/personal_loss_unweighted"]
            assert float(row["global_loss"]) == events[-1]["eval/global_loss_unweighted"]
            assert float(row["perplexity"]) == events[-1]["eval/perplexity"]
            assert float(row["grad_norm"]) == events[-1]["adapter/grad_norm"]
            assert float(row["first_grad_norm"]) == events[1]["adapter/first_grad_norm"]
            sent = sum(event["comm/uploaded_bytes"] for event in events)
            assert int(row["uploaded_bytes"]) == sent > 0
            seconds = sum(event["time/round_seconds"] for event in events)
            assert float(row["seconds"]) == pytest.approx(seconds)
        assert rows["sfed-seed0"]["personal_loss"] != rows["sfed-seed1"]["personal_loss"]

    def test_a_second_start_changes_no_folder(
        self, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before, rows = times(copied), table(copied)
        assert in_this_process(str(tmp_path / "methods.yaml")) == 0
        assert times(copied) == before
        assert table(copied) == rows
        said = capfd.readouterr().out
        assert said.count("complete already") == 4
        assert "± " in said
        assert f"python -m sfed.report {copied}" in said

    def test_other_settings_are_not_written_over(
        self, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        before = times(copied)
        grid_file = str(tmp_path / "methods.yaml")
        for override in ("train.lr=0.5", "evaluation.max_examples=2", "federated.num_rounds=2"):
            assert in_this_process(grid_file, override) == 1
            said = " ".join(capfd.readouterr().out.split())
            assert "was made with other settings: " + override.partition("=")[0] in said
            assert "0 of 4 complete, 4 failed" in said
        assert times(copied) == before
        assert {row["status"] for row in table(copied).values()} == {"failed"}
        assert {row["personal_loss"] for row in table(copied).values()} == {""}
        # What a run's numbers do not depend on may change.
        assert in_this_process(grid_file, "federated.clients_per_pass=1") == 0
        assert times(copied) == before

    def test_an_incomplete_run_is_resumed_and_a_longer_one_goes_on(
        self, finished: Path, copied: Path, tmp_path: Path, tiny_folder: Path
    ) -> None:
        begun, before = copied / "sfed-seed1", times(copied)
        shutil.rmtree(begun / "adapters")
        shutil.rmtree(begun / "checkpoints" / "round-000003")
        assert in_this_process(str(tmp_path / "methods.yaml")) == 0
        assert runs.identical(runs.adapters(begun), runs.adapters(finished / "sfed-seed1"))
        after = times(copied)
        assert all(after[path] == before[path] for path in after if begun not in path.parents)

        one = {**TWO_BY_TWO, "federated.method": ["sfed"], "seed": [1]}
        path = tiny_grid(tiny_folder, tmp_path, grid=one)
        assert in_this_process(str(path), "federated.num_rounds=4") == 0
        (tmp_path / "new").mkdir()
        path = tiny_grid(tiny_folder, tmp_path / "new", grid=one)
        assert in_this_process(str(path), "federated.num_rounds=4") == 0
        straight = tmp_path / "new" / "runs" / "methods" / "sfed-seed1"
        assert runs.identical(runs.adapters(begun), runs.adapters(straight))

    def test_adapters_of_a_shorter_run_are_kept_aside_and_stay_where_a_run_is_refused(
        self, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        refused, resumed = copied / "sfed-seed0", copied / "sfed-seed1"
        for file in refused.glob("checkpoints/*/common.safetensors"):
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        before = {path: path.read_bytes() for path in copied.rglob("*") if path.is_file()}
        assert in_this_process(str(tmp_path / "methods.yaml"), "federated.num_rounds=4") == 1
        said = " ".join(capfd.readouterr().out.split())
        assert "sfed-seed0 failed, exit code 2: no checkpoint of this run can be read" in said
        assert "3 of 4 complete, 1 failed" in said
        for path, content in before.items():
            if refused in path.parents and path.name != "lock":
                assert path.read_bytes() == content, path
            if resumed / "adapters" in path.parents:
                aside = resumed / "set-aside-1" / path.relative_to(resumed)
                assert aside.read_bytes() == content
        assert len(runs.adapters(resumed)) == 5

    def test_a_folder_that_cannot_be_read_is_one_failed_run(
        self, copied: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        path = copied / "sfed-seed0" / "metrics.jsonl"
        path.unlink()
        path.mkdir()
        with (copied / "sfed-seed1" / "metrics.jsonl").open("ab") as file:
            file.write(b"\xff\n")
        assert in_this_process(str(tmp_path / "methods.yaml")) == 1
        said = " ".join(capfd.readouterr().out.split())
        assert "cannot be read (Is a directory" in said
        assert "3 of 4 complete, 1 failed" in said

    def test_never_begins_what_is_not_complete_anew(self, copied: Path, tmp_path: Path) -> None:
        shutil.rmtree(copied / "fedsa-seed0" / "adapters" / "client-0003")
        before = times(copied / "sfed-seed0")
        assert in_this_process(str(tmp_path / "methods.yaml"), "output.resume=never") == 0
        assert (copied / "fedsa-seed0.old-1" / "checkpoints").is_dir()
        assert len(runs.adapters(copied / "fedsa-seed0")) == 5
        assert times(copied / "sfed-seed0") == before

    def test_scores_get_columns(self, copied: Path, tmp_path: Path) -> None:
        run = copied / "sfed-seed0"
        config = json.loads((run / "config.json").read_text())
        config["resolved"]["scores"] = ["accuracy"]
        (run / "config.json").write_text(json.dumps(config))
        events = runs.rounds(run)
        events[-1] |= {
            "eval/personal_accuracy_unweighted": 0.75,
            "eval/global_accuracy_unweighted": 0.5,
        }
        events[-1]["adapter/output_rms"] = 0.25
        lines = [json.dumps(event) + "\n" for event in events]
        (run / "metrics.jsonl").write_text("".join(lines))
        found = read(tmp_path / "methods.yaml")
        rows = [
            results.row(found, cell, "complete", results.stand(cell, 1)) for cell in found.cells
        ]
        results.write_csv(found, rows)
        row, other = table(copied)["sfed-seed0"], table(copied)["fedsa-seed0"]
        assert (row["personal_accuracy"], row["global_accuracy"]) == ("0.75", "0.5")
        assert (row["output_rms"], other["personal_accuracy"]) == ("0.25", "")

    def test_computed_numbers_are_written_without_what_rounding_left(
        self, copied: Path, tmp_path: Path
    ) -> None:
        """alpha * N^0.5 * r^-0.5 = 2 comes out as 2.0000000000000004; losses are as measured."""
        for name, gamma in (("sfed-seed0", 2.0000000000000004), ("sfed-seed1", [0.1 + 0.2, 1e-5])):
            run = copied / name
            config = json.loads((run / "config.json").read_text())
            config["resolved"]["gamma"] = gamma
            (run / "config.json").write_text(json.dumps(config))
        events = runs.rounds(copied / "sfed-seed0")
        for event in events:
            event["time/round_seconds"] = 0.1
        lines = [json.dumps(event) + "\n" for event in events]
        (copied / "sfed-seed0" / "metrics.jsonl").write_text("".join(lines))
        found = read(tmp_path / "methods.yaml")
        rows = [
            results.row(found, cell, "complete", results.stand(cell, 1)) for cell in found.cells
        ]
        results.write_csv(found, rows)
        written = table(copied)
        assert [written[f"sfed-seed{i}"]["gamma"] for i in (0, 1)] == ["2.0", "[0.3, 1e-05]"]
        assert written["sfed-seed0"]["seconds"] == f"{0.1 * len(events):.1f}"
        assert written["sfed-seed0"]["perplexity"] == str(events[-1]["eval/perplexity"])

    def test_epsilon_gets_columns_with_what_it_follows_from(
        self, copied: Path, tmp_path: Path
    ) -> None:
        for name, noise in (("sfed-seed0", 0.5), ("sfed-seed1", 0.0)):
            run = copied / name
            config = json.loads((run / "config.json").read_text())
            private = {"clip": 0.1, "noise_multiplier": noise, "delta": 1e-5}
            config["resolved"]["privacy"] = private
            (run / "config.json").write_text(json.dumps(config))
            events = runs.rounds(run)
            for event in events:  # without noise it is infinite, which JSON has no number for
                event["privacy/epsilon"] = 2.0 * event["round"] if noise else None
            lines = [json.dumps(event) + "\n" for event in events]
            (run / "metrics.jsonl").write_text("".join(lines))
        found = read(tmp_path / "methods.yaml")
        rows = [
            results.row(found, cell, "complete", results.stand(cell, 1)) for cell in found.cells
        ]
        results.write_csv(found, rows)
        names = ("epsilon", "delta", "clip", "noise_multiplier")
        written = {name: tuple(row[key] for key in names) for name, row in table(copied).items()}
        last = runs.rounds(copied / "sfed-seed0")[-1]["privacy/epsilon"]
        assert written["sfed-seed0"] == (str(last), "1e-05", "0.1", "0.5")
        assert written["sfed-seed1"] == ("inf", "1e-05", "0.1", "0.0")
        assert written["fedsa-seed0"] == ("", "", "", "")
        plain = [{key: value for key, value in row.items() if key not in names} for row in rows]
        results.write_csv(found, plain)
        assert not set(names) & set(table(copied)["sfed-seed0"]), "no such run, no such columns"

    @pytest.mark.full
    def test_a_failed_run_is_named_and_the_others_run(
        self, tiny_folder: Path, tmp_path: Path
    ) -> None:
        variants = [
            {"lora.rank": 1},
            {"lora.rank": 2},
            {"lora.rank": 3, "lora.target_modules": ["nothing"]},
            {"lora.rank": 4},
        ]
        path = tiny_grid(tiny_folder, tmp_path, variants=variants)
        done = launchers.python(
            *FAULTY, str(path), env=launchers.environment(SFED_FAULT="r1:0=kill,r2:0=raise")
        )
        assert done.returncode == 1, done.stdout + done.stderr
        assert "cell 1/4  r1\n" in done.stdout
        assert "failed  r1  process 0 was ended by SIGKILL, as the system does" in done.stdout
        assert "failed  r2  exit code 1: RuntimeError: a fault in the middle" in done.stdout
        assert "exit code 2: lora.target_modules = ['nothing']" in done.stdout
        assert "1 of 4 complete, 3 failed" in done.stdout
        status = [row["status"] for row in table(tmp_path / "runs" / "methods").values()]
        assert status == ["failed", "failed", "failed", "complete"]


FAULTY = ("-m", "tests.support.faulty_sweep")
# SGD does not blow up round-off as AdamW does with gradients near zero.
SGD = {"train": {"optimizer": "sgd", "lr": 0.1}}
Sweep = tuple[str, Path]
"""What a sweep has said, and its folder."""


@pytest.fixture(scope="module")
def under_torchrun(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """A sweep of two processes, of which three runs complete and three meet with something."""
    folder = tmp_path_factory.mktemp("torchrun")
    variants: list[dict[str, Any]] = [{"federated.num_clients": n} for n in (1, 4, 2)]
    variants += [{"federated.num_clients": 4, "lora.rank": r} for r in (1, 2)]
    variants.append({"federated.num_clients": 4, "lora.target_modules": ["nothing"]})
    path = tiny_grid(tiny_folder, folder, variants=variants, set=SGD)
    faults = launchers.environment(SFED_FAULT="N4-r1:1=kill,N4-r1:0=hang,N4-r2:1=raise")
    done = launchers.torchrun(2, *FAULTY, str(path), env=faults)
    assert done.returncode != 0, done.stdout + done.stderr
    return done.stdout, folder / "runs" / "methods"


@pytest.mark.dist
@pytest.mark.slow
class TestTwoProcesses:
    def test_under_torchrun_with_a_run_of_one_client(
        self, under_torchrun: Sweep, tiny_folder: Path, tmp_path: Path
    ) -> None:
        said, folder = under_torchrun
        assert "4 clients on 2 processes" in said
        assert "1 clients on 1 process" in said
        assert "2 clients on 2 processes" in said
        assert "1 of the 2 processes take part, the others wait" in said
        alone = tiny_grid(tiny_folder, tmp_path, grid={"federated.num_clients": [4]}, set=SGD)
        assert in_this_process(str(alone)) == 0
        one = runs.adapters(tmp_path / "runs" / "methods" / "N4")
        assert runs.relative_difference(one, runs.adapters(folder / "N4")) < 1e-4

    def test_a_death_on_one_process_does_not_hang_the_other(self, under_torchrun: Sweep) -> None:
        said, _ = under_torchrun
        assert "failed  N4-r1  process 1 was ended by SIGKILL" in said
        assert "failed  N4-r2  exit code 1: RuntimeError: a fault in the middle" in said
        assert "exit code 2: lora.target_modules = ['nothing']" in said
        assert "3 of 6 complete, 3 failed" in said
        assert said.count("cell 1/6") == 1, "process 0 alone speaks"

    def test_sigterm_stops_all_and_the_same_command_goes_on(
        self, finished: Path, tiny_folder: Path, tmp_path: Path
    ) -> None:
        path = tiny_grid(tiny_folder, tmp_path, grid=TWO_BY_TWO)
        folder = tmp_path / "runs" / "methods"
        processes = launchers.start(2, *FAULTY, str(path), SFED_FAULT="sfed-seed1:1=stop")
        codes, outputs = launchers.ended(processes)
        assert codes == [0, 0], outputs
        assert "1 of 4 complete, 3 not run" in outputs[0]
        assert "stopped as asked; the same command resumes the sweep" in outputs[0]
        assert any((folder / "sfed-seed1" / "checkpoints").iterdir())
        assert not (folder / "fedsa-seed0").exists()
        before = times(folder / "sfed-seed0")
        assert in_this_process(str(path)) == 0
        assert times(folder / "sfed-seed0") == before
        assert {row["status"] for row in table(folder).values()} == {"complete"}

    def test_a_lost_process_ends_the_sweep(self, tiny_folder: Path, tmp_path: Path) -> None:
        path = tiny_grid(tiny_folder, tmp_path, grid=TWO_BY_TWO)
        processes = launchers.start(2, *FAULTY, str(path), SFED_FAULT="sfed-seed0:1=hang")
        wait_until((tmp_path / "runs/methods/sfed-seed0/metrics.jsonl").exists)
        processes[0].kill()  # it serves the store
        codes, outputs = launchers.ended(processes)
        assert codes[1] == 1, outputs
        assert "process 1 of the sweep stops" in outputs[1]
