"""Files of a model that are damaged: one plain error, whatever a library raises."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import datasets
import pytest

from sfed.data.tokenize import tokenise
from sfed.models.hf_config import MetaModel
from sfed.models.tokenizer import load_tokenizer
from sfed.utils.errors import DataError, UserError
from tests.support import tiny

ODD = (b"", b"[", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'"\\ud800"', b"{}")


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_damaged_file_of_a_model_is_a_plain_error(tiny_folder: Path, tmp_path: Path, name: str):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder / "model", model)
    whole = (model / name).read_bytes()
    for content in (*ODD, whole[: len(whole) // 2], b" " + whole.replace(b":", b",", 1)):
        (model / name).write_bytes(content)
        config = tiny.config(tmp_path)
        try:
            load_tokenizer(config, str(model))
        except UserError as error:
            text = str(error)
        else:
            continue
        assert str(model) in text and len(text) < 1000


@pytest.mark.parametrize("odd", [None, "x", -1, [], {}, 1e308])
def test_an_odd_value_in_config_json_is_a_plain_error(tiny_folder: Path, tmp_path: Path, odd):
    model = tmp_path / "model"
    shutil.copytree(tiny_folder / "model", model)
    whole = json.loads((model / "config.json").read_text())
    for key in (
        "model_type",
        "hidden_size",
        "num_attention_heads",
        "pad_token_id",
        "rope_parameters",
    ):
        (model / "config.json").write_text(json.dumps({**whole, key: odd}))
        try:
            meta = MetaModel.read(tiny.config(tmp_path), str(model))
        except UserError as error:
            text = str(error)
        else:
            assert meta.config is not None
            continue
        assert str(model) in text


def test_a_cache_that_cannot_be_written_is_named(tiny_folder: Path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", Path("/dev/null/x"))
    config = tiny.config(tiny_folder, data={"max_tokens": 63})
    tokenizer, _ = load_tokenizer(config, config.model.name)
    with pytest.raises(DataError, match=r"/dev/null/x.*HF_HOME"):
        tokenise(config, tokenizer, "train", config.files("train"))
