"""Written answers: those of stock ``generate`` with the exported adapter, and their scores."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from sfed.config import load as config_load
from sfed.federated import generate, session
from sfed.utils.errors import UserError
from tests.support import runs, tiny
from tests.support.processes import on_processes
from tests.support.reference import parts_of

N = 3
NAMES = [f"client-{client:04d}" for client in range(N)]
FAST = {"optimizer": "adamw", "lr": 0.03, "local_steps": 6, "batch_size": 4}

Answers = dict[tuple[str, int, int], str]
"""(kind of adapter, client, place among its held-out examples in order of length) -> text."""


def questions(count: int, *, seed: int = 0) -> list[dict[str, str]]:
    """Rows of GSM8K's form, with unequal lengths; those of seed 0 only have short answers."""
    return [
        {
            "question": f"{'abcde'[(i + seed) % 5] * (1 + i % 4)} and {i}",
            "answer": f"{'xyz'[(i + seed) % 3] * (1 + i % 3)}\n#### {i % 10}" if seed else "x",
        }
        for i in range(count)
    ]


def save(path: Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def settings(folder: Path, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run on GSM8K's form whose clients have 3, 8 and 5 held-out rows, in files of their own."""
    files = out / "files"
    files.mkdir(parents=True, exist_ok=True)
    for client, count in enumerate((3, 8, 5)):
        save(files / f"train-{client}.jsonl", questions(12, seed=client))
        save(files / f"held-{client}.jsonl", questions(count, seed=client + 1))
    base: dict[str, dict[str, Any]] = {
        "data": {
            "task": "gsm8k",
            "train_files": str(files / "train-{client}.jsonl"),
            "eval_files": str(files / "held-{client}.jsonl"),
            "max_tokens": 64,
        },
        "partition": {"kind": "by_file"},
        "federated": {"num_clients": N, "num_rounds": 2},
        "train": FAST,
        "evaluation": {
            "generate": True,
            "max_new_tokens": 10,
            "batch_size": 4,
            "every_rounds": 2,
        },
        "output": {"dir": str(out), "name": "run"},
    }
    merged = {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
    return tiny.settings(folder, **merged)


@contextmanager
def watched() -> Iterator[tuple[Answers, list[tuple[int, ...]]]]:
    """The latest answers of a run, and the shape of what each call of ``generate`` returned."""
    answers: Answers = {}
    shapes: list[tuple[int, ...]] = []
    kind = ""
    write_answers, answer, one_batch = generate.write_answers, generate._answer, generate._generate

    def writes(run: Any, shared_row: Any, outcomes: Any, stop: Any) -> Any:
        nonlocal kind
        kind = "personal" if shared_row is None else "global"
        return write_answers(run, shared_row, outcomes, stop)

    def answering(run: Any, group: Any, places: Any) -> Any:
        texts = answer(run, group, places)
        for client, which, own in zip(group, places, texts, strict=True):
            answers.update({(kind, client, p): text for p, text in zip(which, own, strict=True)})
        return texts

    def generating(run: Any, prompts: Any) -> Any:
        original = run.backbone.model.generate

        def counted(**arguments: Any) -> Any:
            written = original(**arguments)
            shapes.append(tuple(written.shape))
            return written

        run.backbone.model.generate = counted
        try:
            return one_batch(run, prompts)
        finally:
            del run.backbone.model.generate

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "write_answers", writes)
        patch.setattr(generate, "_answer", answering)
        patch.setattr(generate, "_generate", generating)
        yield answers, shapes


def watched_run(own: dict[str, Any]) -> tuple[Answers, list[tuple[int, ...]]]:
    with watched() as (answers, shapes):
        session.run_session(config_load.validate(own))
    return answers, shapes


def held_out(tokenizer: Any, path: str) -> list[list[int]]:
    """The prompts of a held-out file in the order in which a client's rows are evaluated."""
    rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
    texts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    lengths = [
        len(tokenizer(f"{t} {r['answer']}").input_ids) for t, r in zip(texts, rows, strict=True)
    ]
    order = sorted(range(len(rows)), key=lambda i: -lengths[i])
    return [tokenizer(texts[i]).input_ids for i in order]


@pytest.mark.parametrize(("clients_per_pass", "rank"), [(1, 4), (3, 4), (3, [2, 4, 8])])
def test_a_batch_of_clients_gives_each_the_answers_of_its_own_adapter_alone(
    tiny_folder, tmp_path, clients_per_pass, rank
):
    federated = {"clients_per_pass": clients_per_pass}
    own = settings(tiny_folder, tmp_path, federated=federated, lora={"rank": rank})
    answers, _ = watched_run(own)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    seen = 0
    for kind in ("personal", "global"):
        for client, name in enumerate(NAMES):
            base = AutoModelForCausalLM.from_pretrained(tiny_folder / "model")
            adapter = tmp_path / "run" / "adapters" / (name if kind == "personal" else kind)
            model = PeftModel.from_pretrained(base, adapter).eval()
            pattern = own["data"]["eval_files"].replace("{client}", str(client))
            for place, prompt in enumerate(held_out(tokenizer, pattern)):
                ids = torch.tensor([prompt])
                written = model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    do_sample=False,
                    max_new_tokens=10,
                    eos_token_id=tokenizer.eos_token_id,
                    pad_token_id=tokenizer.pad_token_id,
                )[0, len(prompt) :]
                expected = tokenizer.decode(written, skip_special_tokens=True)
                assert answers[kind, client, place] == expected, (kind, client, place)
                seen += 1
    assert seen == len(answers) == 2 * (3 + 8 + 5)
    assert len({text for (kind, *_), text in answers.items() if kind == "personal"}) > 3
    assert len(set(map(len, answers.values()))) > 1, "none ended before the others"


@pytest.mark.dist
@pytest.mark.slow
def test_zero3_gives_the_same_answers_with_unequal_numbers_of_examples(tiny_folder, tmp_path):
    """Process 0 holds clients with 3 and 8 rows, process 1 one with 5: equally many calls."""
    plain = settings(
        tiny_folder,
        tmp_path / "plain",
        federated={"clients_per_pass": 1},
        evaluation={"max_new_tokens": 5},
    )
    expected, _ = watched_run(plain)
    sharded = settings(
        tiny_folder,
        tmp_path / "sharded",
        federated={"clients_per_pass": 1},
        backbone={"sharding": "zero3"},
        evaluation={"max_new_tokens": 5},
    )
    found = on_processes(2, watched_run, sharded)
    merged: Answers = {}
    for answers, _ in found:
        merged.update(answers)
    assert merged == expected
    calls = [len(shapes) for _, shapes in found]
    assert calls[0] == calls[1] > 0
    assert {client for _, client, _ in found[1][0]} == {2}
    ours = runs.rounds(tmp_path / "sharded" / "run")[-1]
    theirs = runs.rounds(tmp_path / "plain" / "run")[-1]
    for key in theirs:
        if "exact_match" in key:
            assert ours[key] == theirs[key]
    for one, other in zip(ours["clients"], theirs["clients"], strict=True):
        assert one["samples"] == other["samples"]


# --- scores --------------------------------------------------------------------------------------


def scripted(monkeypatch: pytest.MonkeyPatch, texts: dict[str, str]) -> list[str]:
    """Let the model write, after each question, what ``texts`` holds; returns what was asked."""
    asked: list[str] = []

    def write(run: Any, prompts: list[list[int]]) -> list[str]:
        found = []
        for prompt in prompts:
            text = run.tokenizer.decode(prompt, skip_special_tokens=True)
            question = text.removeprefix("Question: ").removesuffix("\nAnswer:")
            asked.append(question)
            found.append(texts.get(question, ""))
        return found

    monkeypatch.setattr(generate, "_generate", write)
    return asked


def test_exact_match_is_the_share_of_answers_with_the_right_number(
    tiny_folder, tmp_path, monkeypatch
):
    rows = [
        ("right", "#### 5", " so\n#### 5"),
        ("right in another form", "#### 1,200", " #### $1200.00\nQuestion: more\n#### 7"),
        ("wrong number", "#### 5", " #### 6"),
        ("no mark", "#### 5", " it is 5"),
        ("only later right", "#### 5", " #### 6\n#### 5"),
        ("nothing", "#### 5", ""),
        ("no number to hit", "I cannot say", " #### 5"),
        ("no number to hit either", "#### none", " #### none"),
        ("negative", "#### -3", " = #### \u22123"),
    ]
    counted = [0, 0, 1, 1, 0, 1, 2, 2, 2]  # which client holds it
    right = {"right", "right in another form", "negative"}
    without = {"no number to hit", "no number to hit either"}
    own = settings(tiny_folder, tmp_path, evaluation={"batch_size": 2})
    for client in range(N):
        held = [
            {"question": question, "answer": answer}
            for (question, answer, _), holder in zip(rows, counted, strict=True)
            if holder == client
        ]
        save(tmp_path / "files" / f"held-{client}.jsonl", held)
    asked = scripted(monkeypatch, {question: text for question, _, text in rows})
    session.run_session(config_load.validate(own))
    assert {question for question, *_ in rows} <= set(asked)
    last = runs.rounds(tmp_path / "run")[-1]
    shares = []
    for client in range(N):
        mine = [r[0] for r, holder in zip(rows, counted, strict=True) if holder == client]
        valid = [question for question in mine if question not in without]
        shares.append(sum(question in right for question in valid) / len(valid))
        for kind in ("personal", "global"):
            assert last["clients"][client][f"{kind}_exact_match"] == pytest.approx(shares[client])
    assert shares == pytest.approx([2 / 3, 0.0, 1.0])
    for kind in ("personal", "global"):
        assert last[f"eval/{kind}_exact_match"] == pytest.approx(3 / 7)
        assert last[f"eval/{kind}_exact_match_unweighted"] == pytest.approx(sum(shares) / 3)
    assert last["eval/exact_match"] == pytest.approx(3 / 7)
    assert last["eval/perplexity"] > 1, "the loss is still that of the tokens"


def test_the_answers_of_each_kind_of_adapter_are_scored_apart(tiny_folder, tmp_path, monkeypatch):
    own = settings(tiny_folder, tmp_path)
    calls: list[str] = []
    original = generate.write_answers

    def write_answers(run: Any, shared_row: Any, outcomes: Any, stop: Any) -> Any:
        calls.append("personal" if shared_row is None else "global")
        return original(run, shared_row, outcomes, stop)

    monkeypatch.setattr(generate, "write_answers", write_answers)

    def write(run: Any, prompts: list[list[int]]) -> list[str]:
        return [f" #### {i % 10 if calls[-1] == 'personal' else 99}" for i, _ in enumerate(prompts)]

    monkeypatch.setattr(generate, "_generate", write)
    session.run_session(config_load.validate(own))
    last = runs.rounds(tmp_path / "run")[-1]
    assert last["eval/global_exact_match"] == 0.0
    assert last["eval/personal_exact_match"] == last["eval/exact_match"] > 0.0


# --- samples -------------------------------------------------------------------------------------


def test_samples_hold_prompt_expected_and_answer(tiny_folder, tmp_path):
    own = settings(tiny_folder, tmp_path)
    answers, _ = watched_run(own)
    for client, entry in enumerate(runs.rounds(tmp_path / "run")[-1]["clients"]):
        path = own["data"]["eval_files"].replace("{client}", str(client))
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        expected = {f"Question: {r['question']}\nAnswer:": r["answer"] for r in rows}
        assert len(entry["samples"]) == 2
        for place, sample in enumerate(entry["samples"]):
            assert sample.keys() == {"prompt", "expected", "answer"}
            assert sample["expected"] == expected[sample["prompt"]]
            assert sample["answer"] == answers["personal", client, place].strip()


@pytest.mark.parametrize("kinds", [["personal", "global"], ["global", "personal"], ["global"]])
@pytest.mark.parametrize("task", ["alpaca", "jsonl"])
def test_tasks_without_scores_write_two_samples_of_each_client(tiny_folder, tmp_path, task, kinds):
    forms = {
        "alpaca": lambda i: {"instruction": "s", "input": "", "output": "abc"[: 1 + i % 3]},
        "jsonl": lambda i: {"prompt": f"{i}:", "completion": " " + "abc"[: 1 + i % 3]},
    }
    tiny.save_model(tmp_path / "model", context=256)
    own = settings(
        tiny_folder,
        tmp_path,
        model={"name": str(tmp_path / "model")},
        data={
            "task": task,
            "train_files": save(tmp_path / "rows.jsonl", [forms[task](i) for i in range(40)]),
            "eval_files": None,
            "eval_fraction": 0.3,
            "max_tokens": 256,
        },
        partition={"kind": "iid"},
        evaluation={"max_new_tokens": 3, "adapters": kinds},
    )
    answers, _ = watched_run(own)
    for event in runs.rounds(tmp_path / "run"):
        assert not any("exact_match" in key for key in event)
        for entry in event["clients"]:
            assert not any("exact_match" in key for key in entry)
            if event["eval/loss"] is not None:
                assert len(entry["samples"]) == 2
    # Of one kind of adapter only: nobody would see the others'.
    assert len(answers) == 2 * N
    counts = [len(part["eval"]) for part in parts_of(tmp_path / "run")]
    assert min(counts) > 2


def test_without_generation_nothing_is_written(tiny_folder, tmp_path):
    own = settings(tiny_folder, tmp_path, evaluation={"generate": False})
    answers, shapes = watched_run(own)
    assert not answers and not shapes
    last = runs.rounds(tmp_path / "run")[-1]
    assert not any("exact_match" in key for key in last)
    assert not any("samples" in entry for entry in last["clients"])


# --- limits --------------------------------------------------------------------------------------


def test_an_answer_ends_at_the_context_of_the_model(tiny_folder, tmp_path):
    """Prompts of unequal lengths, the longest of them close to the 128 tokens of the model."""
    own = settings(
        tiny_folder,
        tmp_path,
        data={"max_tokens": 128},
        evaluation={"max_new_tokens": 500},
        federated={"num_rounds": 1},
    )
    for client in range(N):
        rows = [{"question": "q" * length, "answer": "#### 1"} for length in (5, 95)]
        save(tmp_path / "files" / f"held-{client}.jsonl", rows)
    _, shapes = watched_run(own)
    assert shapes and all(width <= 128 for _, width in shapes)


def test_an_answer_has_at_most_the_tokens_that_were_asked_for(tiny_folder, tmp_path):
    own = settings(tiny_folder, tmp_path, evaluation={"max_new_tokens": 4})
    answers, _ = watched_run(own)
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    assert all(len(tokenizer.tokenize(text)) <= 3 * 4 for text in answers.values())
    assert all(len(text) <= 4 for text in answers.values())


def test_a_classifier_that_is_to_write_is_refused():
    data = {"task": "glue", "name": "sst2"}
    with pytest.raises(UserError, match=r"evaluation\.generate"):
        config_load.validate({"data": data, "evaluation": {"generate": True}})
