"""Adapters of any round as folders, and models that they are merged into."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)

from sfed.lora import adapters
from sfed.memory.live_bytes import LiveBytes
from sfed.utils.errors import CheckpointError, UserError
from tests.support import runs, tiny, used

pytestmark = pytest.mark.slow


def test_the_last_round_is_exported_as_the_run_itself_wrote_it(used_run: Path, tmp_path: Path):
    out = used.exported(used_run, tmp_path / "out")
    own = used_run / "adapters"
    assert sorted(one.name for one in out.iterdir()) == sorted(one.name for one in own.iterdir())
    for path in own.glob("*/*"):
        if path.name not in ("README.md", "adapter_model.safetensors"):
            assert (out / path.relative_to(own)).read_bytes() == path.read_bytes()
    for name in used.NAMES:
        files = [parent / name / "adapter_model.safetensors" for parent in (out, own)]
        assert files[0].read_bytes() == files[1].read_bytes()
    one, other = (load_file(p / "global" / "adapter_model.safetensors") for p in (out, own))
    for key, tensor in one.items():  # summed over processes there, over files here
        torch.testing.assert_close(tensor, other[key], rtol=1e-6, atol=1e-9)


def test_an_earlier_round_is_exported_as_a_run_of_so_many_rounds_wrote_it(
    used_run: Path, tmp_path: Path
):
    """The learning rate is constant, so a shorter run is the first part of a longer one."""
    settings = json.loads((used_run / "config.json").read_text())
    settings = {k: v for k, v in settings.items() if k not in ("resolved", "versions")}
    settings["federated"]["num_rounds"] = 1
    settings["output"]["dir"] = str(tmp_path / "short")
    own = used.train(settings) / "adapters"
    out = used.exported(used_run, tmp_path / "out", "--round", "1", "--client", "west", "1")
    assert sorted(one.name for one in out.iterdir()) == ["sud", "west"]
    for name in ("sud", "west"):
        file = Path(name) / "adapter_model.safetensors"
        assert (out / file).read_bytes() == (own / file).read_bytes()
        assert (out / file).read_bytes() != (used_run / "adapters" / file).read_bytes()


def test_the_card_says_what_was_measured_of_the_round(used_run: Path, tmp_path: Path):
    out = used.exported(used_run, tmp_path / "out", "--round", "2", "--client", "süd")
    card = (out / "sud" / "README.md").read_text(encoding="utf-8")
    entry = runs.rounds(used_run)[2]["clients"][1]
    assert f"| {entry['personal_loss']:.4f} nats/token |" in card
    assert "| adapter of | client 1, süd |" in card
    assert "| training examples of the client | 24 |" in card
    assert "| rounds | 2 of 3 |" in card
    assert "license:" in card and re.search(r"^library_name: peft$", card, re.MULTILINE)


@pytest.mark.parametrize("name", ["sud", "global"])
def test_the_code_of_a_card_answers_as_the_adapter(
    used_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    out = used.exported(used_run, tmp_path / "out", "--global", "--client", "sud")
    found = used.as_the_card_says(out / name, monkeypatch)
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(found["base"]), out / name
    )
    ids = torch.arange(2, 30)[None]
    assert torch.equal(found["model"](ids).logits, stock(ids).logits)


def test_a_round_that_is_not_kept_is_refused_with_those_that_are(used_run: Path, tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"--round 7: .* there are 1, 2, 3 "):
        used.exported(used_run, tmp_path, "--round", "7")


def test_a_damaged_checkpoint_is_refused_with_the_others(
    used_folder: Path, used_run: Path, tmp_path
):
    shutil.copytree(used_run, tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "round-000002" / "common.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match=r"other bytes than were written; --round 1, 3 may"):
        used.exported(tmp_path / "run", tmp_path / "out", "--round", "2")


def test_what_cannot_be_exported_is_refused_before_anything_is_written(used_run: Path, tmp_path):
    out = tmp_path / "out"
    for words, message in [
        (["--client", "nobody"], r"--client nobody: .* 'north', 'sud', 'west'"),
        (["--merge"], r"--merge: 4 adapters are chosen"),
        (["--push-to-hub", "org/name"], r"--push-to-hub: 4 adapters are chosen"),
        (["--push-to-hub", "name"], r"--push-to-hub 'name': name the repository as ORG/NAME"),
    ]:
        with pytest.raises(UserError, match=message):
            used.exported(used_run, out, *words)
        assert not out.exists()
    (out / "west").mkdir(parents=True)
    with pytest.raises(UserError, match=r"west exists, and nothing is overwritten"):
        used.exported(used_run, out, "--client", "west")


@torch.no_grad()
def test_a_merged_model_in_stock_transformers_is_the_base_model_with_its_adapter(
    used_run: Path, used_folder: Path, tmp_path: Path
):
    out = used.exported(used_run, tmp_path / "out", "--merge", "--client", "west")
    merged = AutoModelForCausalLM.from_pretrained(out / "west")
    base = AutoModelForCausalLM.from_pretrained(used_folder / "model")
    ids = torch.arange(2, 60)[None]
    plain = base(ids).logits
    adapted = PeftModel.from_pretrained(base, used_run / "adapters" / "west")(ids).logits
    assert float((adapted - plain).abs().max()) > 0.05
    torch.testing.assert_close(merged(ids).logits, adapted, rtol=1e-4, atol=1e-4)
    tokens = AutoTokenizer.from_pretrained(out / "west")("a b")["input_ids"]
    assert tokens == AutoTokenizer.from_pretrained(used_folder / "model")("a b")["input_ids"]
    assert not (out / "west" / "adapter").exists()
    assert not list((out / "west").glob("adapter_*"))


@torch.no_grad()
def test_a_merged_classifier_has_the_head_and_the_pooler_of_its_adapter(
    used_classifier: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out = used.exported(used_classifier, tmp_path / "out", "--merge", "--global")
    merged = AutoModelForSequenceClassification.from_pretrained(out / "global")
    assert list(merged.config.id2label.values()) == used.LABELS
    adapter = used.exported(used_classifier, tmp_path / "adapter", "--global") / "global"
    stock = used.as_the_card_says(adapter, monkeypatch)
    tokens = stock["tokenizer"]("abab", return_tensors="pt")
    expected = stock["model"](**tokens).logits
    torch.testing.assert_close(merged(**tokens).logits, expected, rtol=1e-4, atol=1e-4)
    assert used.as_the_card_says(out / "global", monkeypatch)["labels"] == used.LABELS


def test_a_merged_model_is_never_held_twice(
    used_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Beside the weights, what is made while merging is smaller than the model."""
    seen: dict[str, int] = {}
    merge = adapters.merged

    def counted(model: Any, folder: Path) -> Any:
        whole = sum(p.numel() * p.element_size() for p in model.parameters())
        with LiveBytes() as counter:
            done = merge(model, folder)
        seen.update(whole=whole, peak=counter.peak)
        return done

    monkeypatch.setattr(adapters, "merged", counted)
    used.exported(used_run, tmp_path / "out", "--merge", "--client", "west")
    assert 0 < seen["peak"] < seen["whole"] / 2


def test_a_method_without_a_global_adapter_has_none_to_export(tiny_folder: Path, tmp_path: Path):
    federated = {"method": "local", "num_clients": 2, "num_rounds": 1}
    output = {"dir": str(tmp_path), "name": "run"}
    run = used.train(tiny.settings(tiny_folder, federated=federated, output=output))
    with pytest.raises(UserError, match=r"--global: with federated.method=local A differs"):
        used.exported(run, tmp_path / "out", "--global")
    out = used.exported(run, tmp_path / "out")
    assert sorted(one.name for one in out.iterdir()) == ["client-0000", "client-0001"]


def test_a_run_of_an_older_version_is_refused_with_what_to_do(used_run: Path, tmp_path: Path):
    shutil.copytree(used_run, tmp_path / "run")
    path = tmp_path / "run" / "partition.json"
    parts = json.loads(path.read_text(encoding="utf-8"))
    for part in parts["clients"]:
        del part["columns"]
    path.write_text(json.dumps(parts), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"does not say which columns were read; continue"):
        used.exported(tmp_path / "run", tmp_path / "out")


def test_another_base_model_in_the_place_of_the_runs_is_refused(used_run: Path, tmp_path: Path):
    shutil.copytree(used_run, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["model"]["name"] = str(tiny.save_model(tmp_path / "other", hidden=64))
    path.write_text(json.dumps(settings), encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"holds adapters of \d+ numbers and those of"):
        used.exported(tmp_path / "run", tmp_path / "out")
