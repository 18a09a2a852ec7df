"""Tests of the tokenizer of a model: its end mark, and by what it is known."""

import json
import shutil

import pytest
from transformers import AutoTokenizer

from sfed import train
from sfed.config import load as config_load
from sfed.data.tokenizer import identity_of
from sfed.models.tokenizer import load_tokenizer
from tests.support import runs, tiny


def model_without_eos(tiny_folder, folder, *, config=None, generation=None):
    """A copy of the model whose tokenizer names no eos, and whose two files name these."""
    shutil.copytree(tiny_folder / "model", folder)
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    path.write_text(
        json.dumps({k: v for k, v in settings.items() if k[:4] not in ("eos_", "pad_")})
    )
    special = folder / "special_tokens_map.json"
    special.unlink(missing_ok=True)
    for name, value in (("config.json", config), ("generation_config.json", generation)):
        path = folder / name
        settings = json.loads(path.read_text())
        settings.pop("eos_token_id", None)
        if name == "config.json":
            settings["pad_token_id"] = None
        path.write_text(json.dumps(settings | ({} if value is None else {"eos_token_id": value})))
    return folder


def loaded(folder, **data):
    config = config_load.validate(
        {"model": {"name": str(folder)}, "data": {"task": "jsonl", "train_files": "x", **data}}
    )
    return load_tokenizer(config, str(folder))


@pytest.mark.parametrize(
    ("config", "generation", "mark", "source"),
    [
        (1, None, "</s>", "config.json"),
        (None, 1, "</s>", "generation_config.json"),
        (5, 1, "</s>", "generation_config.json"),
        (1, 99_999, "</s>", "config.json"),
        (1, -1, "</s>", "config.json"),
        (None, [99_999, 1, 5], "</s>", "generation_config.json"),
        (None, None, None, ""),
        (99_999, None, None, ""),
        (-1, [], None, ""),
    ],
)
def test_a_tokenizer_without_an_eos_gets_the_models(
    tiny_folder, tmp_path, config, generation, mark, source
):
    folder = model_without_eos(
        tiny_folder, tmp_path / "model", config=config, generation=generation
    )
    tokenizer, found = loaded(folder)
    assert (tokenizer.eos_token, found) == (mark, source)
    assert tokenizer("a</s>").input_ids == AutoTokenizer.from_pretrained(folder)("a</s>").input_ids


def test_a_tokenizer_keeps_an_eos_of_its_own(tiny_folder, tmp_path):
    folder = shutil.copytree(tiny_folder / "model", tmp_path / "model")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 5}))
    tokenizer, source = loaded(folder)
    assert (tokenizer.eos_token_id, source) == (1, "")


@pytest.mark.parametrize("eos", [1, None])
def test_a_run_says_where_its_end_mark_is_from(tiny_folder, tmp_path, capsys, eos):
    model_without_eos(tiny_folder, tmp_path / "model", generation=eos)
    rows = [{"prompt": f"{i}", "completion": "one two"} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    own = tiny.settings(
        tmp_path,
        federated={"num_clients": 2, "num_rounds": 1},
        train={"local_steps": 1},
        evaluation={"generate": True, "max_new_tokens": 2},
        output={"dir": str(tmp_path / "runs"), "name": "run"},
    )
    train.run(config_load.validate(own))
    said = capsys.readouterr().out
    if eos is None:
        assert "warning: no end mark (eos)" in said and "eos_token" in said
    else:
        assert "the tokenizer names no eos: rows end with '</s>', as generation_config" in said
        assert "warning" not in said
    samples = runs.rounds(tmp_path / "runs" / "run")[-1]["clients"][0]["samples"]
    assert {sample["expected"] for sample in samples} == {"one two"}


def test_calls_do_not_change_by_what_a_tokenizer_is_known(tiny_folder):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    before = identity_of(tokenizer)
    tokenizer("a long text", truncation=True, max_length=3)
    tokenizer(["a", "longer"], padding=True)
    assert identity_of(tokenizer) == before
    tokenizer.add_tokens(["long text"])
    assert identity_of(tokenizer) != before
