"""A run on conversations: its losses are those of stock transformers, and it says what it read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.support import chats, runs, tiny
from tests.support.processes import ends_of

N, MAX_TOKENS = 2, 60


def talk_of(number: int) -> list[dict[str, str]]:
    words = [("user", f"{number}+1?"), ("assistant", str(number + 1))] * (1 + number % 3)
    more = [("user", "thanks")] * (number % 2)
    return [{"role": role, "content": content} for role, content in [*words, *more]]


def save(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any], str]:
    """A run on conversations, its settings, and what it printed."""
    folder = tmp_path_factory.mktemp("text")
    chats.save_chat_model(folder / "model", chats.CHATML_MARKED)
    talks = [{"id": i, "messages": talk_of(i), "day": None} for i in range(40)]
    settings = tiny.settings(
        folder,
        data={
            "task": "text",
            "train_files": save(folder / "rows.jsonl", talks),
            "eval_files": save(folder / "held-out.jsonl", talks[:12]),
            "max_tokens": MAX_TOKENS,
        },
        federated={"num_clients": N, "num_rounds": 1},
        evaluation={"generate": True, "max_new_tokens": 4},
    )
    (end,) = ends_of(1, runs.train_or_leave, settings)
    return folder / "runs" / "run", settings, end.said


def test_the_loss_before_training_is_that_of_the_assistants_tokens(
    trained: tuple[Path, dict[str, Any], str],
) -> None:
    run, settings, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(settings["model"]["name"])
    model = AutoModelForCausalLM.from_pretrained(settings["model"]["name"])
    total, count = 0.0, 0
    for number in range(12):
        stock = tokenizer.apply_chat_template(
            talk_of(number), return_dict=True, return_assistant_tokens_mask=True
        )
        ids, mask = (
            stock["input_ids"][:MAX_TOKENS],
            torch.tensor(stock["assistant_masks"][:MAX_TOKENS]).bool(),
        )
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        losses = functional.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        total, count = total + float(losses[mask[1:]].sum()), count + int(mask[1:].sum())
    assert runs.rounds(run)[0]["eval/loss"] == pytest.approx(total / count, rel=1e-5)


def test_it_says_what_it_used_and_what_it_truncated(
    trained: tuple[Path, dict[str, Any], str],
) -> None:
    run, _, output = trained
    assert "columns: messages; ignored: day, id" in output
    assert f"data.max_tokens = {MAX_TOKENS} truncates" in output
    partition = json.loads((run / "partition.json").read_text(encoding="utf-8"))
    assert sum(client["truncated"][0] for client in partition["clients"]) > 0


def test_its_samples_are_prompts_up_to_the_last_answer(
    trained: tuple[Path, dict[str, Any], str],
) -> None:
    run, *_ = trained
    samples = [one for entry in runs.rounds(run)[-1]["clients"] for one in entry["samples"]]
    assert samples and all(one["prompt"].rstrip().endswith("assistant") for one in samples)
    assert all(one["expected"].isdigit() for one in samples)


def test_an_adapter_folder_says_how_to_prompt(trained: tuple[Path, dict[str, Any], str]) -> None:
    run, *_ = trained
    for folder in (run / "adapters").iterdir():
        facts = json.loads((folder / "prompt_template.json").read_text(encoding="utf-8"))
        assert facts["examples"] == [] and facts["eos_token"] == "</s>"
        template = (folder / facts["chat_template"]).read_text(encoding="utf-8")
        assert template == chats.CHATML_MARKED
