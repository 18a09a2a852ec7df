"""Whole runs of a classification of own texts, and their exported folders in stock PEFT."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, f1_score, matthews_corrcoef
from torch.nn import functional
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
)

from sfed.config import load as config_load
from sfed.data import splits
from sfed.distributed import world as distributed
from sfed.federated import session
from sfed.models import backbone
from sfed.report import __main__ as report
from sfed.report import tables
from sfed.utils.errors import UserError
from tests.support import glue, runs, tiny
from tests.support.deadlines import RUN_SECONDS
from tests.support.processes import on_processes

N = 3
LABELS = ["benign", "inconclusive", "malignant"]
COLUMNS = {"text": "note", "label": "diagnosis"}
BERT = "bert without a pooler"


def notes(count: int, *, seed: int = 0, labels: list[Any] = LABELS) -> list[dict[str, Any]]:
    """Records whose texts have to do with their labels; the last label is the most frequent."""
    generator = np.random.default_rng([seed, count])
    rows = []
    for i in range(count):
        place = int(generator.choice(3, p=[0.2, 0.3, 0.5]))
        word = "abc"[place] * int(generator.integers(1, 9))
        rows.append({"note": f"{i % 7} {word}", "diagnosis": labels[place]})
    return rows


@pytest.fixture(scope="session")
def folder(glue_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with records and backbones: only read it."""
    folder = tmp_path_factory.mktemp("own texts")
    for family in ("roberta", "llama", "bert"):
        (folder / family).symlink_to(glue_folder / family)
    tiny.save_bert(folder / BERT)
    whole = BertForPreTraining.from_pretrained(folder / BERT)
    masked = BertForMaskedLM(whole.config)
    masked.bert.load_state_dict(whole.bert.state_dict(), strict=False)
    masked.save_pretrained(folder / BERT)
    glue.save(folder / "train.jsonl", notes(48))
    glue.save(folder / "eval.jsonl", notes(23, seed=1))
    return folder


def settings(folder: Path, family: str, out: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / family)},
        "data": {
            "task": "classification",
            "columns": COLUMNS,
            "train_files": str(folder / "train.jsonl"),
            "eval_files": str(folder / "eval.jsonl"),
            "max_tokens": 64,
        },
        "partition": {"kind": "dirichlet", "concentration": 2.0},
        "lora": {"rank": 4},
        "federated": {"num_clients": N, "num_rounds": 2, "deadline_seconds": RUN_SECONDS},
        "train": {"local_steps": 2, "batch_size": 4, "lr": 0.03},
        "output": {"dir": str(out), "name": "run"},
    }
    return {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}


def run(folder: Path, family: str, out: Path, **sections: dict[str, Any]) -> Path:
    own = settings(folder, family, out, **sections)
    session.run_session(config_load.validate(own))
    return out / "run"


def as_the_card_says(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run the code of a folder's card within the folder; returns its variables."""
    [code] = re.findall(r"```python\n(.*?)```", (adapter / "README.md").read_text(), re.DOTALL)
    monkeypatch.chdir(adapter)
    found: dict[str, Any] = {}
    exec(code, found)
    return found


@torch.no_grad()
def stock_logits(found: dict[str, Any], texts: list[str]) -> torch.Tensor:
    """Logits of each text alone."""
    tokens = [found["tokenizer"](text, return_tensors="pt") for text in texts]
    if found["model"].base_model.model.config.model_type != "bert":
        for one in tokens:
            one.pop("token_type_ids", None)
    return torch.cat([found["model"](**one).logits for one in tokens])


def seen(folder: Path, split: str, run_folder: Path, client: int | None = None) -> list[Any]:
    """The records of a client, or all."""
    rows = glue.read(folder / f"{split}.jsonl")
    if client is None:
        return rows
    part = json.loads((run_folder / "partition.json").read_text())["clients"][client]
    return [rows[i] for i in part[split]]


@pytest.mark.parametrize("family", [BERT, "roberta", "llama"])
def test_the_card_of_a_folder_loads_it_in_stock_peft_with_the_predictions_of_the_trainer(
    folder, tmp_path, monkeypatch, capsys, family
):
    run_folder = run(folder, family, tmp_path, train={"local_steps": 4})
    event = runs.rounds(run_folder)[-1]
    personal = np.zeros((3, 3), dtype=int)
    for name in ["global", *(f"client-{client:04d}" for client in range(N))]:
        adapter = run_folder / "adapters" / name
        assert json.loads((adapter / "labels.json").read_text()) == LABELS
        capsys.readouterr()  # what the run said
        found = as_the_card_says(adapter, monkeypatch)
        assert capsys.readouterr().out.strip() in LABELS
        assert found["model"].base_model.model.config.id2label == dict(enumerate(LABELS))
        rows = seen(folder, "eval", run_folder, None if name == "global" else int(name[-4:]))
        logits = stock_logits(found, [row["note"] for row in rows])
        targets = torch.tensor([LABELS.index(row["diagnosis"]) for row in rows])
        loss = float(functional.cross_entropy(logits, targets))
        predicted = logits.argmax(dim=1)
        matrix = confusion_matrix(targets, predicted, labels=range(3))
        if name != "global":
            personal += matrix
            assert event["clients"][int(name[-4:])]["personal_loss"] == pytest.approx(
                loss, rel=1e-4
            )
            continue
        assert event["eval/global_loss"] == pytest.approx(loss, rel=1e-4)
        assert event["confusion"]["global"] == matrix.tolist()
        assert event["eval/global_accuracy"] == pytest.approx(
            (targets == predicted).double().mean()
        )
        macro = f1_score(targets, predicted, average="macro")
        assert event["eval/global_macro_f1"] == pytest.approx(macro)
        assert event["eval/global_matthews"] == pytest.approx(matthews_corrcoef(targets, predicted))
    assert event["confusion"]["personal"] == personal.tolist()
    assert "confusion" not in runs.rounds(run_folder)[-2]


def test_a_pooler_that_the_checkpoint_lacks_is_drawn_trained_and_exported(folder, tmp_path):
    run_folder = run(folder, BERT, tmp_path)
    config = json.loads((run_folder / "adapters" / "global" / "adapter_config.json").read_text())
    assert config["modules_to_save"] == ["classifier", "bert.pooler"]
    found = runs.adapters(run_folder)
    name = "base_model.model.bert.pooler.dense.weight"
    assert not torch.equal(found["client-0000"][name], found["client-0001"][name])
    mean = torch.stack([found[f"client-{i:04d}"][name] for i in range(N)]).mean(dim=0)
    torch.testing.assert_close(found["global"][name], mean)
    assert not any(".pooler." in key and "lora" in key for key in found["global"])


def first_head(settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The weights that all heads start from."""
    world = distributed.start(RUN_SECONDS)
    try:
        config = splits.with_labels(config_load.validate(settings), world, N)
        head = backbone.load(config, config.model.name, world).head
    finally:
        distributed.stop(world)
    assert head is not None
    return dict(head.initial)


@pytest.mark.dist
def test_a_pooler_that_the_checkpoint_lacks_is_the_same_on_shards(folder, tmp_path):
    own = settings(folder, BERT, tmp_path)
    plain = first_head(own)
    assert plain["bert.pooler.dense.weight"].std() > 0
    own["backbone"] = {"sharding": "zero3"}
    for found in on_processes(2, first_head, own):
        assert found.keys() == plain.keys()
        assert all(torch.equal(found[name], weight) for name, weight in plain.items())


def test_a_checkpoint_with_a_pooler_keeps_it_frozen(folder, tmp_path):
    run_folder = run(folder, "bert", tmp_path, federated={"num_rounds": 1})
    found = runs.adapters(run_folder)["global"]
    assert not any(".pooler." in key and "lora" not in key for key in found)


def test_a_head_of_other_classes_makes_way_in_stock_peft_too(folder, tmp_path, monkeypatch):
    tiny.save_bert(tmp_path / "model")
    config = BertForPreTraining.from_pretrained(tmp_path / "model").config
    config.num_labels = 5
    torch.manual_seed(0)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "model")
    run_folder = run(folder, "bert", tmp_path, model={"name": str(tmp_path / "model")})
    adapter = run_folder / "adapters" / "global"
    assert "ignore_mismatched_sizes=True" in (adapter / "README.md").read_text()
    rows = seen(folder, "eval", run_folder)
    logits = stock_logits(as_the_card_says(adapter, monkeypatch), [row["note"] for row in rows])
    targets = [LABELS.index(row["diagnosis"]) for row in rows]
    matrix = confusion_matrix(targets, logits.argmax(dim=1), labels=range(3))
    assert runs.rounds(run_folder)[-1]["confusion"]["global"] == matrix.tolist()


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.dist
def test_clients_with_files_of_their_own_share_the_labels_of_all(folder, tmp_path):
    """No process reads the files of the other's clients, and none of them has all labels."""
    numbers = [-1, 3, 20]
    for client in range(4):
        one, other = (20, 3) if client < 2 else (3, -1)  # of process 0, of process 1
        rows = notes(12, seed=client, labels=[one, one, other])
        glue.save(tmp_path / f"{client}.jsonl", rows)
    own = settings(
        folder,
        "roberta",
        tmp_path,
        data={"train_files": str(tmp_path / "{client}.jsonl"), "eval_files": None},
        partition={"kind": "by_file"},
        federated={"num_clients": 4, "num_rounds": 1},
        train={"class_weights": "balanced"},
    )
    run_folder = runs.run(2, own)
    for adapter in sorted((run_folder / "adapters").iterdir()):
        assert json.loads((adapter / "labels.json").read_text()) == numbers
    resolved = json.loads((run_folder / "config.json").read_text())["resolved"]
    assert resolved["classes"] == ["-1", "3", "20"]
    clients = json.loads((run_folder / "partition.json").read_text())["clients"]
    counts = np.sum([client["classes"] for client in clients], axis=0)
    assert counts.sum() == sum(len(client["train"]) for client in clients)
    assert np.dot(resolved["class_weights"], counts) == pytest.approx(counts.sum())
    assert np.allclose(np.array(resolved["class_weights"]) * counts, counts.sum() / 3)


@pytest.mark.dist
def test_two_processes_train_what_one_trains(folder, tmp_path):
    train = {"class_weights": "balanced", "optimizer": "sgd", "lr": 0.05}
    one = run(folder, BERT, tmp_path / "one", train=train)
    two = runs.run(2, settings(folder, BERT, tmp_path / "two", train=train))
    assert runs.rounds(one)[-1]["confusion"] == runs.rounds(two)[-1]["confusion"]
    for name, tensors in runs.adapters(one).items():
        for key, tensor in runs.adapters(two)[name].items():
            torch.testing.assert_close(tensor, tensors[key], rtol=1e-5, atol=1e-6)


def test_a_held_out_label_that_no_training_record_has_ends_the_run(folder, tmp_path):
    glue.save(tmp_path / "eval.jsonl", [{"note": "x", "diagnosis": "unknown"}])
    data = {"eval_files": str(tmp_path / "eval.jsonl")}
    with pytest.raises(UserError, match=r"line 1: 'diagnosis' is \"unknown\", not one of the 3"):
        run(folder, "bert", tmp_path, data=data)


# --- weights of the classes ----------------------------------------------------------------------


def one_step(folder: Path, out: Path, weights: Any) -> tuple[Path, dict[str, Any]]:
    """One step of each client on all of its records, too small to change anything."""
    train = {"local_steps": None, "local_epochs": 1, "batch_size": 48, "class_weights": weights}
    run_folder = run(
        folder,
        "bert",
        out,
        federated={"num_rounds": 1},
        train={**train, "optimizer": "sgd", "lr": 1e-12},
    )
    return run_folder, runs.rounds(run_folder)[-1]


def test_training_losses_are_weighted_and_held_out_losses_are_not(folder, tmp_path, monkeypatch):
    plain_folder, plain = one_step(folder, tmp_path / "plain", "none")
    asked = {"benign": 3.0, "inconclusive": 1.0, "malignant": 0.5}
    _, weighted = one_step(folder, tmp_path / "weighted", asked)
    rows = seen(folder, "train", plain_folder)
    found = as_the_card_says(plain_folder / "adapters" / "client-0000", monkeypatch)
    logits = stock_logits(found, [row["note"] for row in rows])
    targets = torch.tensor([LABELS.index(row["diagnosis"]) for row in rows])
    weights = torch.tensor([asked[label] for label in LABELS])
    weights = weights * len(rows) / weights[targets].sum()
    for event, weight in ((plain, None), (weighted, weights)):
        summed = torch.nn.CrossEntropyLoss(weight=weight, reduction="sum")(logits, targets)
        assert event["train/loss"] == pytest.approx(float(summed) / len(rows), rel=1e-5)
    assert abs(plain["train/loss"] - weighted["train/loss"]) > 1e-3
    assert plain["eval/loss"] == pytest.approx(weighted["eval/loss"], rel=1e-6)


def test_equal_weights_are_no_weights_and_others_change_what_is_learned(folder, tmp_path):
    found = {
        name: runs.adapters(run(folder, "bert", tmp_path / name, train={"class_weights": asked}))
        for name, asked in {
            "none": "none",
            "equal": dict.fromkeys(LABELS, 4.0),
            "balanced": "balanced",
        }.items()
    }
    for key, tensor in found["none"]["global"].items():
        assert torch.equal(tensor, found["equal"]["global"][key]), key
    head = "base_model.model.classifier.weight"
    assert not torch.equal(found["none"]["global"][head], found["balanced"]["global"][head])


# --- resuming, and the report --------------------------------------------------------------------


def test_a_resumed_run_is_the_undisturbed_one_and_other_labels_are_refused(folder, tmp_path):
    train = {"class_weights": "balanced"}
    whole = run(folder, BERT, tmp_path / "whole", train=train)
    for rounds in (1, 2):
        parts = run(folder, BERT, tmp_path / "parts", train=train, federated={"num_rounds": rounds})
    assert runs.rounds(parts)[-1]["confusion"] == runs.rounds(whole)[-1]["confusion"]
    for name, tensors in runs.adapters(whole).items():
        for key, tensor in runs.adapters(parts)[name].items():
            assert torch.equal(tensor, tensors[key]), (name, key)
    more = {"federated": {"num_rounds": 3}, "train": train}
    with pytest.raises(UserError, match=r"data\.labels"):
        run(folder, BERT, tmp_path / "parts", data={"labels": LABELS[::-1]}, **more)


def test_the_report_shows_the_confusion_matrix_of_the_last_round(folder, tmp_path):
    run_folder = run(folder, "bert", tmp_path)
    report.main([str(run_folder), "--out", str(tmp_path / "report")])
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Confusion matrix after round 2" in page and "macro f1" in page
    rows = re.findall(r"<tr>(.*?)</tr>", page, re.DOTALL)
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", row) for row in rows]
    matrix = runs.rounds(run_folder)[-1]["confusion"]["global"]
    for place, label in enumerate(LABELS):
        counts = matrix[place]
        recall = f"{counts[place] / sum(counts):.4f}" if sum(counts) else tables.NONE
        assert [label, *map(str, counts), str(sum(counts)), recall] in cells
    assert (tmp_path / "report" / "figures" / "confusion.png").stat().st_size > 1000
