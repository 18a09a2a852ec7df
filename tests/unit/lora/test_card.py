"""Tests of model cards: what comes from data cannot change their form."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

from sfed.lora.card import ClassifierUse, ModelCard, TextUse, fenced, is_hub_id

TEXT = TextUse("org/model", "float32", [("Q: {q}\nA:", "")], None, ["</s>"])
CLASSES = ClassifierUse("org/model", ["a|b", "c\nd"], "bfloat16", 64, '"A text."', 7)


def card_of(card: ModelCard, folder: Path) -> tuple[dict[str, object], str]:
    """The front matter, and the rest."""
    card.write(folder, "st-mary")
    _, front, rest = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), rest


@pytest.mark.parametrize("use", [TEXT, CLASSES])
@pytest.mark.parametrize("is_merged", [False, True])
def test_the_hub_reads_the_front_matter_and_python_the_code(
    tmp_path: Path, use: TextUse | ClassifierUse, is_merged: bool
):
    front, rest = card_of(ModelCard(use, [("rounds", "3")], is_merged), tmp_path)
    assert front["base_model"] == "org/model" and "license" not in front
    assert front["library_name"] == ("transformers" if is_merged else "peft")
    assert front["pipeline_tag"] == use.pipeline and "federated-learning" in front["tags"]
    [code] = re.findall(r"^```python\n(.*?)^```$", rest, re.MULTILINE | re.DOTALL)
    ast.parse(code)
    assert ("peft" in code) is not is_merged
    assert "# st-mary" in rest and "| rounds | 3 |" in rest


def test_names_from_data_stay_within_their_cell(tmp_path: Path):
    _, rest = card_of(ModelCard(TEXT, [("adapter of", "a | b\n## c\x1b[2J")]), tmp_path)
    assert "| adapter of | a \\| b\\n## c\\x1b[2J |\n" in rest
    _, rest = card_of(ModelCard(CLASSES), tmp_path)
    assert "`c\\nd`" in rest


def test_a_prompt_that_holds_fences_is_fenced_all_the_same(tmp_path: Path):
    prompt = "```python\n{code}\n```\n# Not a heading\n"
    use = TextUse("org/model", "float32", [(prompt, "with code")])
    _, rest = card_of(ModelCard(use), tmp_path)
    assert f"With code:\n\n````text\n{prompt}````\n" in rest
    assert fenced("a", "text") == "```text\na\n```\n"


def test_a_folder_of_this_machine_is_no_model_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    front, _ = card_of(ModelCard(TextUse(str(tmp_path), "float32")), tmp_path)
    assert "base_model" not in front
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "model").mkdir(parents=True)
    assert not is_hub_id("org/model") and is_hub_id("org/other") and is_hub_id("gpt2")
    assert not is_hub_id("./gpt2") and not is_hub_id("a/b/c")
