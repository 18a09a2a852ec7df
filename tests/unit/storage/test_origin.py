"""Keys that follow what a run starts from, and those that are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfed.config.load import validate
from sfed.config.schema import Config
from sfed.federated import preflight
from sfed.storage import origin
from sfed.storage.checkpoint_folder import CheckpointRef
from sfed.utils.errors import CheckpointError, ConfigError
from tests.support.peft_files import FACTORS, save


def config(path: Path | None, **sections) -> Config:
    lora = {"start_from": None if path is None else str(path), **sections.pop("lora", {})}
    data = {"task": "text", "train_files": "rows.jsonl"}
    return validate({"data": data, "lora": lora, **sections})


def test_without_a_folder_a_configuration_stays_what_it_is():
    given = config(None)
    assert origin.adopted(given) is given
    assert origin.gamma_of(given) is None


def test_keys_that_are_not_set_follow_the_adapter(tmp_path: Path):
    found = origin.adopted(config(save(tmp_path / "a")))
    assert (found.lora.rank, found.lora.target_modules) == (2, ("q_proj",))
    assert origin.adopted(found) == found, "once is enough"
    assert origin.gamma_of(found) == 4.0


def test_a_key_may_be_set_to_what_the_adapter_has(tmp_path: Path):
    folder = save(tmp_path / "a")
    own = {"rank": 2, "target_modules": ["layer.q_proj"]}
    assert origin.adopted(config(folder, lora=own)).lora.target_modules == ("layer.q_proj",)


@pytest.mark.parametrize(
    ("own", "rest"),
    [
        ({"rank": 8}, "lora.rank = 8: it is 2 in"),
        ({"target_modules": ["v_proj"]}, "lora.target_modules = ['v_proj']: the adapters of"),
        ({"target_modules": ["q_proj", "v_proj"]}, "lora.target_modules = ['q_proj', 'v_proj']"),
    ],
)
def test_another_value_is_refused_with_both(tmp_path: Path, own: dict, rest: str):
    with pytest.raises(ConfigError) as mistake:
        origin.adopted(config(save(tmp_path / "a"), lora=own))
    assert rest in str(mistake.value) and str(tmp_path / "a") in str(mistake.value)


@pytest.mark.parametrize(
    ("over", "rest"),
    [
        ({"lora_alpha": 9}, "two and one differ in gamma, 4.5 and 4"),
        (
            {"r": 4, "shapes": {"q_proj.lora_A.weight": (4, 5), "q_proj.lora_B.weight": (7, 4)}},
            "two and one differ in r, 4 and 2",
        ),
        (
            {"shapes": {name.replace("q", "v"): shape for name, shape in FACTORS.items()}},
            "two and one differ in layers",
        ),
    ],
)
def test_adapters_that_differ_are_no_start_of_one_run(tmp_path: Path, over: dict, rest: str):
    save(tmp_path / "some" / "one")
    save(tmp_path / "some" / "two", over.pop("shapes", None), **over)
    with pytest.raises(ConfigError, match=rest):
        origin.adopted(config(tmp_path / "some", partition={"kind": "by_key", "key": "kind"}))


def test_an_adapter_whose_layers_differ_in_rank_is_no_start(tmp_path: Path):
    shapes = {**FACTORS, "v_proj.lora_A.weight": (1, 5), "v_proj.lora_B.weight": (7, 1)}
    own = {"rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 4}}
    with pytest.raises(ConfigError) as mistake:
        origin.adopted(config(save(tmp_path / "a", shapes, **own)))
    said = f"lora.start_from = {str(tmp_path / 'a')!r}: the layers of a have LoRA ranks from 1 to 2"
    assert said in str(mistake.value) and "merge_and_unload" in str(mistake.value)


def test_a_head_needs_a_task_with_one_and_such_a_task_a_head(tmp_path: Path):
    folder = save(tmp_path / "a", {**FACTORS, "score.weight": (2, 7)})
    with pytest.raises(ConfigError, match=r"the adapter holds layer\.score\.weight"):
        origin.adopted(config(folder))
    folder = save(tmp_path / "b")
    with pytest.raises(ConfigError, match="the adapter holds no classification head"):
        origin.adopted(config(folder, data={"task": "classification", "train_files": "x.jsonl"}))


def test_classes_in_another_order_are_refused(tmp_path: Path):
    folder = save(
        tmp_path / "a", {**FACTORS, "score.weight": (2, 7)}, files={"labels.json": '["b", "a"]'}
    )
    task = {"task": "classification", "train_files": "x.jsonl"}
    found = origin.source(config(folder, data=task))
    found.check_labels(["b", "a"])
    with pytest.raises(ConfigError, match=r"\['b', 'a'\] and those of the data \['a', 'b'\]"):
        found.check_labels(["a", "b"])


def test_a_start_that_resumes_follows_its_checkpoint(tmp_path: Path):
    gone = tmp_path / "gone"
    given = config(gone, output={"dir": str(tmp_path), "name": "run"})
    with pytest.raises(ConfigError, match="the folder does not exist"):
        origin.adopted(given)
    path = tmp_path / "run" / "checkpoints" / "round-000001" / "run.json"
    path.parent.mkdir(parents=True)
    settings = {"lora.rank": 5, "lora.target_modules": ["v_proj"]}
    path.write_text(json.dumps({"config": settings, "gamma": 0.75}))
    assert origin.adopted(given).lora.rank == 5
    assert origin.gamma_of(given) == 0.75
    path.write_text("{")  # the start itself says what is wrong with it
    assert origin.adopted(given) == given


def test_what_a_checkpoint_records_is_read_back_or_refused():
    whole = origin.Origin("lora.start_from", "x", "d", 2.0, True, True, ("A", "B"), "base")
    path = Path("checkpoints")
    assert origin.of_record(CheckpointRef(path, {"origin": whole.as_record()})) == whole
    assert origin.of_record(CheckpointRef(path, {})) is None
    for record in ({"path": "x"}, {**whole.as_record(), "more": 1}, [], 3):
        with pytest.raises(CheckpointError, match="does not say what its run started from"):
            origin.of_record(CheckpointRef(path, {"origin": record}))


def test_it_is_refused_before_torch_with_all_else(tmp_path: Path):
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n' * 9)
    data = {"task": "text", "train_files": str(tmp_path / "rows.jsonl")}
    data["chat_template"] = "nowhere"
    own = config(tmp_path / "none", data=data, output={"dir": str(tmp_path)})
    with pytest.raises(ConfigError) as mistake:
        preflight.check(own)
    assert "the folder does not exist" in str(mistake.value)
    assert "data.chat_template: 'nowhere'" in str(mistake.value)
