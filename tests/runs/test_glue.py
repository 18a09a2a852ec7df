"""GLUE's rows, how they are dealt, and the scores of a run against those computed outside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import torch
from torch.nn import functional
from transformers import AutoTokenizer

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.data import sources, tokenize
from sfed.data.batches import collate
from sfed.observability import metrics
from sfed.utils.errors import UserError
from tests.support import glue, runs
from tests.support.glue import NAMES, N
from tests.support.reference import parts_of
from tests.support.selection import full


@pytest.fixture
def folder(glue_folder: Path) -> Path:
    return glue_folder


def config(folder: Path, family: str, name: str, **data: Any) -> Config:
    return config_load.validate(glue.settings(folder, family, name, folder, data=data))


def table_of(
    folder: Path, family: str, name: str, path: Path, split: sources.Split = "train", **data: Any
) -> tokenize.Tokens:
    own = config(folder, family, name, **data)
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    return tokenize.tokenise(own, tokenizer, split, (str(path),))


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "label", "part"),
    [
        ("mnli", 3, "not one of 0 to 2"),
        ("mnli", -1, "hold no labels"),
        ("mnli", 1.5, "not one of 0 to 2"),
        ("mnli", True, "not a number"),
        ("mnli", "1", "not a number"),
        ("mnli", None, "not a number"),
        ("sst2", 2, "not one of 0 to 1"),
        ("stsb", False, "not a number"),
        ("stsb", float("nan"), "not a number"),
        ("stsb", float("inf"), "not a number"),
        ("stsb", 10**400, "not a number"),
        ("stsb", "3.5", "not a number"),
    ],
)
def test_a_label_that_is_none_is_refused_with_its_place(folder, tmp_path, name, label, part):
    rows = glue.rows_of(name, 4)
    rows[2]["label"] = label
    path = glue.save(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as mistake:
        table_of(folder, "roberta", name, path)
    assert f"{path}, line 3" in str(mistake.value)
    assert part in str(mistake.value)


@pytest.mark.parametrize("missing", ["label", "hypothesis"])
def test_a_row_without_a_column_is_refused_with_its_place(folder, tmp_path, missing):
    rows = glue.rows_of("mnli", 4)
    del rows[1][missing]
    path = glue.save(tmp_path / "rows.jsonl", rows)
    with pytest.raises(UserError) as mistake:
        table_of(folder, "roberta", "mnli", path)
    assert f"{path}, line 2" in str(mistake.value)
    assert repr(missing) in str(mistake.value)


def test_labels_are_the_targets_and_classes_have_names(folder, tmp_path):
    rows = glue.rows_of("mnli", 9)
    found = table_of(folder, "roberta", "mnli", glue.save(tmp_path / "rows.jsonl", rows))
    assert found.targets.tolist() == [row["label"] for row in rows]
    names = ("entailment", "neutral", "contradiction")
    assert found.keys == tuple(names[row["label"]] for row in rows)
    values = glue.rows_of("stsb", 9)
    found = table_of(folder, "roberta", "stsb", glue.save(tmp_path / "values.jsonl", values))
    assert found.targets.tolist() == [row["label"] for row in values]
    assert found.keys is None


@pytest.mark.parametrize("family", ["roberta", "bert"])
@pytest.mark.parametrize("max_tokens", [12, 25])
def test_two_long_texts_are_cut_and_keep_their_marks(folder, tmp_path, family, max_tokens):
    rows = [
        {"premise": "p" * 40, "hypothesis": "h" * 30, "label": 0},
        {"premise": "p" * 40, "hypothesis": "h", "label": 1},
        {"premise": "p", "hypothesis": "h" * 40, "label": 2},
    ]
    path = glue.save(tmp_path / "rows.jsonl", rows)
    found = table_of(folder, family, "mnli", path, max_tokens=max_tokens)
    tokenizer = AutoTokenizer.from_pretrained(folder / family)
    examples = tokenize.Examples(found, np.arange(3))
    marks = {"roberta": (0, [2, 2], 2), "bert": (2, [3], 3)}[family]
    for place in range(3):
        row = examples.row(place)
        assert len(row.ids) == max_tokens
        assert row.ids[0] == marks[0] and row.ids[-1] == marks[2]
        assert row.ids[row.prompt_length - len(marks[1]) : row.prompt_length].tolist() == marks[1]
        first, second = row.ids[: row.prompt_length], row.ids[row.prompt_length :]
        texts = [
            tokenizer.decode(ids.tolist(), skip_special_tokens=True) for ids in (first, second)
        ]
        for text, column in zip(texts, ("premise", "hypothesis"), strict=True):
            assert text and rows[place][column].startswith(text)
        if len(rows[place]["hypothesis"]) == 1:
            assert texts[1] == "h"
        if len(rows[place]["premise"]) == 1:
            assert texts[0] == "p"


@pytest.mark.parametrize("family", ["roberta", "bert", "llama"])
@pytest.mark.parametrize("name", ["mnli", "sst2"])
def test_a_batch_holds_what_the_tokenizer_of_the_model_gives(folder, family, name):
    """Ids, what is padding and what belongs to the second text."""
    rows = glue.read(folder / f"{name}-eval.jsonl")[:6]
    found = table_of(folder, family, name, folder / f"{name}-eval.jsonl", "eval")
    examples = tokenize.Examples(found, np.arange(6))
    batch = collate([[examples.row(i) for i in range(6)]], 6)
    expected = glue.Encoder(folder, family, name).inputs(rows)
    width = expected["input_ids"].shape[1]
    is_token = expected["attention_mask"].bool()
    assert torch.equal(batch.is_token[:, :width], is_token)
    assert not batch.is_token[:, width:].any()
    assert torch.equal(batch.input_ids[:, :width][is_token], expected["input_ids"][is_token])
    if family == "bert":
        assert torch.equal(batch.is_second[:, :width].long(), expected["token_type_ids"])
        assert batch.is_second.any() == (name == "mnli")
    assert batch.targets is not None
    assert batch.targets.tolist() == [row["label"] for row in rows]


MARKS = {"roberta": ("<s>", "</s>"), "bert": ("[CLS]", "[SEP]"), "llama": ("<s>", "")}


@pytest.mark.parametrize("family", MARKS)
@pytest.mark.parametrize("name", ["mnli", "sst2"])
def test_marks_that_a_text_holds_already_stand_once(folder, tmp_path, family, name):
    """What a tokenizer puts around its texts itself; a mark within a text is the user's."""
    first, last = MARKS[family]
    columns, _ = glue.FORMS[name]
    bare = [{column: f"a {column[0]}" for column in columns} | {"label": i % 2} for i in range(4)]
    dressed = [
        {
            **row,
            columns[0]: f"{first * (1 + i)}{row[columns[0]]}",
            columns[-1]: row[columns[-1]] + last * i,
        }
        for i, row in enumerate(bare)
    ]
    if len(columns) == 1:
        dressed = [{**row, "sentence": f"{first}{row['sentence']}{last}"} for row in bare]
    elif family != "llama":  # one of two texts opens with the mark of the row
        dressed[1]["hypothesis"] = first + dressed[1]["hypothesis"]
    tables = [
        table_of(folder, family, name, glue.save(tmp_path / f"{i}.jsonl", rows))
        for i, rows in enumerate((bare, dressed))
    ]
    assert np.array_equal(tables[0].flat, tables[1].flat)
    assert np.array_equal(tables[0].prompt_lengths, tables[1].prompt_lengths)
    within = [{**row, columns[0]: f"a{first}b"} for row in bare]
    other = table_of(folder, family, name, glue.save(tmp_path / "within.jsonl", within))
    assert len(other.flat) == len(tables[0].flat)  # "a b" or "a", mark, "b"


# --- who holds what ------------------------------------------------------------------------------


@pytest.mark.parametrize("held_out", ["own file", "part of the training data"])
def test_dirichlet_without_a_key_skews_the_classes_and_held_out_data_follow(
    folder, tmp_path, held_out
):
    train = glue.rows_of("mnli", 900, seed=3)
    held = glue.rows_of("mnli", 400, seed=4)
    data: dict[str, Any] = {"train_files": str(glue.save(tmp_path / "train.jsonl", train))}
    data["eval_files"] = None
    if held_out == "own file":
        data["eval_files"] = str(glue.save(tmp_path / "held.jsonl", held))
    else:
        held = train
    run_folder = glue.run(
        folder,
        "roberta",
        "mnli",
        tmp_path,
        data=data,
        partition={"concentration": 0.3},
        federated={"num_rounds": 1},
        train={"local_steps": 1},
        evaluation={"max_examples": 2},
    )
    names = ("entailment", "neutral", "contradiction")
    own_shares = []
    for part in parts_of(run_folder):
        labels = [train[i]["label"] for i in part["train"]]
        if held_out == "own file":
            counts = {names[c]: labels.count(c) for c in range(3) if labels.count(c)}
            assert part["labels"] == counts
        assert set(part["labels"]) <= set(names)
        held_labels = [held[i]["label"] for i in part["eval"]]
        shares = [np.bincount(some, minlength=3) / len(some) for some in (labels, held_labels)]
        assert np.abs(shares[0] - shares[1]).sum() / 2 <= 0.12
        own_shares.append(shares[0])
    apart = [np.abs(one - other).sum() / 2 for one in own_shares for other in own_shares]
    assert max(apart) > 0.4, "there is no skew"


def test_unequal_numbers_of_examples_are_reported_and_weighted(folder, tmp_path):
    run_folder = glue.run(folder, "roberta", "mnli", tmp_path)
    counts = [len(part["train"]) for part in parts_of(run_folder)]
    last = runs.rounds(run_folder)[-1]
    assert len(set(counts)) > 1
    assert [entry["examples"] for entry in last["clients"]] == counts
    assert sum(counts) == 48


# --- held-out losses and scores ------------------------------------------------------------------


LITTLE = 0.002
"""A rate at which the clients learn something and not everything."""


class Outside:
    """A run's held-out rows, and what its exported adapters predict for them in plain passes."""

    def __init__(self, folder: Path, family: str, name: str, run_folder: Path, rows: list) -> None:
        self.folder, self.family, self.name, self.run_folder = folder, family, name, run_folder
        self.encoder = glue.Encoder(folder, family, name)
        parts = parts_of(run_folder)
        self.places = [part["eval"] for part in parts]
        self.rows = [[rows[i] for i in places] for places in self.places]
        self.train_counts = [len(part["train"]) for part in parts]
        self.targets = [
            self.encoder.targets(some) if some else torch.zeros(0) for some in self.rows
        ]

    def logits(self, kind: str) -> list[torch.Tensor]:
        """One tensor of outputs per client."""
        found = []
        for client, name in enumerate(NAMES):
            paths = runs.adapter_paths(self.run_folder)
            adapter = paths["global" if kind == "global" else name]
            model = glue.with_adapter(self.folder, self.family, self.name, adapter)
            found.append(self.encoder.logits(model, self.rows[client]))
        return found

    def mean(self, values: list[float], weights: list[float] | None = None) -> float:
        return float(np.average(values, weights=weights))


@pytest.mark.parametrize(
    ("family", "clients_per_pass"),
    [
        *(("roberta", 1), full("roberta", 2), full("roberta", 3)),
        *(full("bert", 1), ("bert", 2), full("bert", 3)),
        *(full("llama", 1), full("llama", 2), ("llama", 3)),
    ],
)
def test_losses_and_accuracies_are_those_of_the_exported_adapters(
    folder, tmp_path, family, clients_per_pass
):
    run_folder = glue.run(
        folder,
        family,
        "mnli",
        tmp_path,
        train={"optimizer": "adamw", "lr": LITTLE},
        federated={"clients_per_pass": clients_per_pass},
    )
    outside = Outside(folder, family, "mnli", run_folder, glue.read(folder / "mnli-eval.jsonl"))
    last = runs.rounds(run_folder)[-1]
    for kind in ("personal", "global"):
        logits = outside.logits(kind)
        right = [
            (own.argmax(dim=1) == targets).double()
            for own, targets in zip(logits, outside.targets, strict=True)
        ]
        losses = [
            functional.cross_entropy(own.double(), targets, reduction="none")
            for own, targets in zip(logits, outside.targets, strict=True)
        ]
        for measure, values in (("accuracy", right), ("loss", losses)):
            own = [float(some.mean()) for some in values]
            for client, value in enumerate(own):
                reported = last["clients"][client][f"{kind}_{measure}"]
                assert reported == pytest.approx(value, rel=1e-5), (kind, measure, client)
            expected = {
                "": float(torch.cat(values).mean()),
                "_unweighted": outside.mean(own),
                "_by_examples": outside.mean(own, outside.train_counts),
            }
            for end, value in expected.items():
                found = last[f"eval/{kind}_{measure}{end}"]
                assert found == pytest.approx(value, rel=1e-5), (kind, measure, end)
            if kind == "personal":
                assert last[f"eval/{measure}"] == pytest.approx(expected[""], rel=1e-5)
            distinct = len({round(v, 6) for v in expected.values()})
            assert distinct == 3 or (measure == "accuracy" and distinct == 2), "nothing is shown"
    assert last["eval/perplexity"] is None


def test_the_parts_of_mnli_have_scores_of_their_own(folder, tmp_path):
    matched = glue.rows_of("mnli", 17, seed=5)
    mismatched = glue.rows_of("mnli", 29, seed=6)
    files = [
        str(glue.save(tmp_path / "validation_mismatched.jsonl", mismatched)),
        str(glue.save(tmp_path / "validation_matched.jsonl", matched)),
    ]
    run_folder = glue.run(
        folder,
        "roberta",
        "mnli",
        tmp_path,
        data={"eval_files": files},
        train={"optimizer": "adamw", "lr": 0.02, "local_steps": 4},
    )
    outside = Outside(folder, "roberta", "mnli", run_folder, mismatched + matched)
    last = runs.rounds(run_folder)[-1]
    found = {}
    for kind in ("personal", "global"):
        right: dict[str, list[bool]] = {"": [], "_matched": [], "_mismatched": []}
        for client, logits in enumerate(outside.logits(kind)):
            own: dict[str, list[bool]] = {key: [] for key in right}
            verdicts = (logits.argmax(dim=1) == outside.targets[client]).tolist()
            for place, verdict in zip(outside.places[client], verdicts, strict=True):
                for key in ("", "_mismatched" if place < len(mismatched) else "_matched"):
                    own[key].append(verdict)
                    right[key].append(verdict)
            for key, some in own.items():
                reported = last["clients"][client][f"{kind}_accuracy{key}"]
                assert reported == pytest.approx(np.mean(some)), (kind, client, key)
        assert [len(some) for some in right.values()] == [46, 17, 29]
        for key, some in right.items():
            assert last[f"eval/{kind}_accuracy{key}"] == pytest.approx(np.mean(some)), (kind, key)
            found[kind, key] = np.mean(some)
    assert last["eval/accuracy"] == pytest.approx(found["personal", ""])
    assert last["eval/accuracy_matched"] == pytest.approx(found["personal", "_matched"])
    assert last["eval/accuracy_mismatched"] == pytest.approx(found["personal", "_mismatched"])
    assert len(set(found.values())) > 2, "parts cannot be told apart"
    names = json.loads((run_folder / "config.json").read_text())["resolved"]["scores"]
    assert names == ["accuracy", "accuracy_matched", "accuracy_mismatched"]


@pytest.mark.parametrize("family", ["roberta", "llama"])
def test_regression_gives_correlations_squared_errors_and_no_perplexity(folder, tmp_path, family):
    run_folder = glue.run(
        folder, family, "stsb", tmp_path, train={"optimizer": "adamw", "lr": 0.02}
    )
    outside = Outside(folder, family, "stsb", run_folder, glue.read(folder / "stsb-eval.jsonl"))
    last = runs.rounds(run_folder)[-1]
    predicted = [own[:, 0].double() for own in outside.logits("personal")]
    squares = [(p - t).square() for p, t in zip(predicted, outside.targets, strict=True)]
    for client in range(N):
        entry, pair = last["clients"][client], (predicted[client], outside.targets[client])
        pearson, spearman = scipy.stats.pearsonr(*pair)[0], scipy.stats.spearmanr(*pair)[0]
        assert entry["personal_loss"] == pytest.approx(float(squares[client].mean()), rel=1e-4)
        assert entry["personal_pearson"] == pytest.approx(pearson, abs=1e-4)
        assert entry["personal_spearman"] == pytest.approx(spearman, abs=1e-4)
    pair = (torch.cat(predicted), torch.cat(outside.targets))
    assert last["eval/pearson"] == pytest.approx(scipy.stats.pearsonr(*pair)[0], abs=1e-4)
    assert last["eval/spearman"] == pytest.approx(scipy.stats.spearmanr(*pair)[0], abs=1e-4)
    assert last["eval/loss"] == pytest.approx(float(torch.cat(squares).mean()), rel=1e-4)
    for event in runs.rounds(run_folder):
        assert event["eval/perplexity"] is None
    assert metrics.EVAL_PERPLEXITY == "eval/perplexity"


def test_the_training_loss_is_the_mean_over_the_examples_of_a_round(folder, tmp_path):
    """Round 1 of one step: the loss of the backbone with the first head, B = 0."""
    run_folder = glue.run(
        folder,
        "bert",
        "mnli",
        tmp_path,
        federated={"num_rounds": 1},
        train={"local_steps": None, "local_epochs": 1, "batch_size": 48, "lr": 1e-9},
    )
    rows = glue.read(folder / "mnli-train.jsonl")
    adapter = run_folder / "adapters" / NAMES[0]  # at this rate all are still as they began
    model = glue.with_adapter(folder, "bert", "mnli", adapter)
    encoder = glue.Encoder(folder, "bert", "mnli")
    logits, targets = encoder.logits(model, rows), encoder.targets(rows)
    losses = functional.cross_entropy(logits, targets, reduction="none")
    event = runs.rounds(run_folder)[-1]
    assert event["train/loss"] == pytest.approx(float(losses.mean()), rel=1e-4)
    for part, entry in zip(parts_of(run_folder), event["clients"], strict=True):
        own = float(losses[part["train"]].mean())
        assert entry["train_loss"] == pytest.approx(own, rel=1e-4)


def test_a_client_without_held_out_examples_has_no_score_and_no_say(folder, tmp_path):
    """One class only in the held-out file: who holds none of it is left out of the means."""
    train = [{"sentence": f"{'ab'[i % 2]} {i % 5}", "label": i % 2} for i in range(40)]
    held = [{"sentence": f"b {i}", "label": 1} for i in range(6)]
    data = {
        "train_files": str(glue.save(tmp_path / "train.jsonl", train)),
        "eval_files": str(glue.save(tmp_path / "held.jsonl", held)),
    }
    run_folder = glue.run(
        folder,
        "roberta",
        "sst2",
        tmp_path,
        data=data,
        partition={"kind": "by_key", "key": "label"},
        federated={"num_clients": 2},
    )
    last = runs.rounds(run_folder)[-1]
    without, with_all = last["clients"]
    assert without["personal_accuracy"] is None and without["personal_loss"] is None
    assert with_all["personal_accuracy"] is not None
    for end in ("", "_unweighted", "_by_examples"):
        assert last[f"eval/personal_accuracy{end}"] == with_all["personal_accuracy"]
