"""Tests of the classification of own texts: records, labels, weights of the classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tokenizers import processors
from transformers import AutoTokenizer

from sfed.config import load as config_load
from sfed.config.sections.train import TrainSection
from sfed.data import splits, tasks, tokenize
from sfed.data.classification import class_weights, ordered
from sfed.distributed import world as distributed
from sfed.models.objective import target_losses
from sfed.utils.errors import ConfigError, DataError, UserError
from tests.support.deadlines import RUN_SECONDS

COLUMNS = {"text": "note", "label": "diagnosis"}


def save(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def notes(*labels):
    return [{"note": f"note {i}", "diagnosis": label} for i, label in enumerate(labels)]


def config(train_file, *, data=(), **sections):
    own = {"task": "classification", "columns": COLUMNS, "train_files": train_file}
    return config_load.validate(
        {"model": {"name": "m"}, "data": {**own, **dict(data)}, **sections},
    )


@pytest.fixture
def world():
    started = distributed.start(RUN_SECONDS)
    yield started
    distributed.stop(started)


def with_labels(world, folder, *labels, data=()):
    asked = config(save(folder / "notes.jsonl", notes(*labels)), data=data)
    return splits.with_labels(asked, world, 1)


# --- labels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("found", "classes"),
    [
        (("b", "a", "b", "C"), ("C", "a", "b")),
        ((10, 9, -1, 9), (-1, 9, 10)),
        (("10", "9"), ("10", "9")),
    ],
)
def test_the_labels_of_the_training_file_are_the_classes_sorted(world, tmp_path, found, classes):
    own = with_labels(world, tmp_path, *found)
    assert own.data.labels == classes
    task = tasks.task_of(own)
    assert (task.classes, task.labels) == (tuple(map(str, classes)), classes)
    assert task.num_outputs == len(classes) and task.is_classification
    rows = [tasks.checked_pair(task, row, "here") for row in notes(*found)]
    assert [classes[int(row.target)] for row in rows] == list(found)


def test_labels_that_are_given_keep_their_order_and_no_file_is_read_for_them(world):
    own = config("absent.jsonl", data={"labels": ["mild", "none", "severe"]})
    assert splits.with_labels(own, world, 1) is own
    task = tasks.task_of(own)
    assert tasks.checked_pair(task, notes("none")[0], "here").target == 1.0


def test_the_outputs_of_a_task_whose_labels_are_unknown_are_not_guessed():
    with pytest.raises(AssertionError, match="labels"):
        _ = tasks.task_of(config("notes.jsonl")).num_outputs


@pytest.mark.parametrize(
    ("found", "part"),
    [
        (("a", 1), "texts ('a') and integers (1)"),
        (("a", "a"), "1 different labels ('a')"),
        (("benign", "Benign "), "case, space or coding alone"),
        (("na\u00efve", "nai\u0308ve"), "alone ('nai\\u0308ve', 'na\\xefve')"),
        (("grade 1", "grade\u200b 1"), "alone ('grade 1', 'grade\\u200b 1')"),
        ((1.5, 2.5), "line 1: 'diagnosis' holds 1.5; a label is a text or an integer"),
        ((True, False), "line 1: 'diagnosis' holds true"),
        (("a", None), "line 2: 'diagnosis' holds null"),
        (("a", " "), "line 2: 'diagnosis' is empty"),
        (tuple(f"{i}" for i in range(1001)), "1001 different labels"),
    ],
)
def test_labels_that_are_no_classes_are_refused(world, tmp_path, found, part):
    with pytest.raises(DataError) as caught:
        with_labels(world, tmp_path, *found)
    assert part in str(caught.value)


def test_labels_that_differ_in_case_alone_may_be_named():
    own = config("notes.jsonl", data={"labels": ["a", "A"]})
    assert tasks.task_of(own).classes == ("a", "A")


@pytest.mark.parametrize(
    ("labels", "part"),
    [
        (["a", 1], "texts and integers"),
        (["a", "a"], "'a' twice"),
        (["a"], "names 1 labels"),
        (["a", " "], "an empty text"),
        ([True, False], "labels"),
    ],
)
def test_labels_of_a_configuration_that_are_no_classes_are_refused(labels, part):
    with pytest.raises(ConfigError, match=part):
        config("notes.jsonl", data={"labels": labels})


def test_the_order_of_labels_does_not_depend_on_who_found_which_first():
    assert ordered(["b", "a", "c"]) == ordered(["c", "a", "b", "a"]) == ("a", "b", "c")


@pytest.mark.parametrize("held_out", [["a", "z"], ["a", 1]])
def test_a_held_out_label_that_no_training_record_has_is_refused_with_its_line(
    world, tiny_folder, tmp_path, held_out
):
    own = with_labels(world, tmp_path, "a", "b")
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    path = save(tmp_path / "held-out.jsonl", notes(*held_out))
    with pytest.raises(DataError) as caught:
        tokenize.tokenise(own, tokenizer, "eval", (path,))
    expected = f"{path}, line 2: 'diagnosis' is {json.dumps(held_out[1])}, not one of the 2 labels"
    assert str(caught.value).startswith(expected)


def test_other_labels_are_not_read_from_the_cache(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    path = save(tmp_path / "notes.jsonl", notes("a", "b"))
    targets = [
        tokenize.tokenise(
            config(path, data={"labels": labels}), tokenizer, "train", (path,)
        ).targets.tolist()
        for labels in (["a", "b"], ["b", "a"])
    ]
    assert targets == [[0.0, 1.0], [1.0, 0.0]]


# --- empty texts ---------------------------------------------------------------------------------


@pytest.mark.parametrize("marks", ["<s> $A </s>", "$A"])
def test_a_row_of_empty_text_is_left_out_and_counted_whatever_the_tokenizer_adds(
    tiny_folder, tmp_path, marks
):
    """One that adds a mark makes a token of nothing; from nothing no class can be learned."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    special = [("<s>", 0), ("</s>", 1)]
    post = processors.TemplateProcessing(single=marks, special_tokens=special)
    tokenizer.backend_tokenizer.post_processor = post
    texts = ["one", "", " \n", "two"]
    rows = [{"note": text, "diagnosis": "ab"[i % 2]} for i, text in enumerate(texts)]
    path = save(tmp_path / "notes.jsonl", rows)
    own = config(path, data={"eval_files": path, "labels": ["a", "b"]})
    data = splits.held_out_for_all(own, tokenizer, 1)
    assert sorted(data.held_out[0].targets) == [0.0, 1.0] and data.eval_counts == (2,)
    assert list(data.notes) == ["2 held-out examples have no text in 'note' and are left out"]


def test_a_pair_of_texts_is_left_out_where_both_are_empty(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    columns = {"text": "q", "text_pair": "a", "label": "y"}
    rows = [{"q": q, "a": a, "y": "no"} for q, a in [("x", ""), ("", "x"), ("", ""), ("x", "y")]]
    path = save(tmp_path / "pairs.jsonl", rows)
    own = config(path, data={"columns": columns, "labels": ["no", "yes"]})
    table = tokenize.tokenise(own, tokenizer, "train", (path,))
    assert (len(table), table.left_out, table.needs) == (3, 1, "text in 'q' or 'a'")


def test_texts_that_are_all_empty_are_said_to_be(tiny_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder / "model")
    path = save(tmp_path / "notes.jsonl", [{"note": " ", "diagnosis": "a"}] * 2)
    own = config(path, data={"labels": ["a", "b"]})
    with pytest.raises(DataError, match=r"no row of the train data has text in 'note' within"):
        tokenize.tokenise(own, tokenizer, "train", (path,))


# --- records -------------------------------------------------------------------------------------


def test_a_second_text_is_read_where_its_column_is_named():
    columns = {"text": "q", "text_pair": "a", "label": "y"}
    task = tasks.task_of(config("f", data={"columns": columns, "labels": ["no", "yes"]}))
    pair = tasks.checked_pair(task, {"q": "1", "a": "2", "y": "yes"}, "here")
    assert (pair.prompt, pair.completion, pair.target) == ("1", "2", 1.0)
    assert task.has_pair


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": "x", "label": "a", "text_pair": "y"}, "set data.columns.text_pair=text_pair"),
        ({"text": 1, "label": "a"}, "'text' holds int"),
        ({"label": "a"}, "no key 'text'"),
        ({"text": "x"}, "no key 'label'"),
        ({"text": "x", "label": "c"}, "'label' is \"c\", not one of the 2 labels"),
    ],
)
def test_a_record_of_another_form_is_refused(row, part):
    task = tasks.task_of(config("f", data={"columns": {}, "labels": ["a", "b"]}))
    with pytest.raises(DataError) as caught:
        tasks.checked_pair(task, row, "notes.jsonl, line 3")
    assert str(caught.value).startswith("notes.jsonl, line 3: ") and part in str(caught.value)
    assert str(caught.value).endswith("expected text, label")


@pytest.mark.parametrize(
    ("sections", "part"),
    [
        ({"data": {"columns": {"output": "x"}}}, "'output' is none of text, text_pair, label"),
        ({"data": {"columns": {"text": "label"}}}, "column 'label' is named twice"),
        ({"data": {"train_files": None}}, "needs data.train_files"),
        ({"data": {"task": "jsonl"}}, "data.columns.label needs data.task=classification"),
        ({"evaluation": {"generate": True}}, "writes no text"),
        (
            {"train": {"class_weights": {"a": -1.0}}},
            "the weight of 'a' is -1.0, not a number above 0",
        ),
        ({"train": {"class_weights": "even"}}, "'none' or 'balanced'"),
    ],
)
def test_settings_that_do_not_fit_are_refused(sections, part):
    with pytest.raises(ConfigError) as caught:
        config("notes.jsonl", **sections)
    assert part in str(caught.value)


def test_class_weights_need_classes():
    data = {"task": "glue", "name": "stsb"}
    with pytest.raises(ConfigError, match="values and no classes"):
        config_load.validate({"data": data, "train": {"class_weights": "balanced"}})
    with pytest.raises(ConfigError, match="needs a task with classes"):
        config_load.validate({"train": {"class_weights": "balanced"}})


# --- weights of the classes ----------------------------------------------------------------------

COUNTS = [6, 3, 1]


def weights_of(asked, counts=COUNTS):
    return class_weights(TrainSection(class_weights=asked), ["a", "b", "3"], counts)


def test_classes_count_the_same_unless_asked():
    assert weights_of("none") is None


@pytest.mark.parametrize(
    "asked", ["balanced", {"a": 1.0, "b": 2.0, "3": 5.0}, {"a": 7, "b": 7, 3: 7}]
)
def test_the_mean_weight_of_a_training_example_is_one(asked):
    found = weights_of(asked)
    assert np.dot(found, COUNTS) == pytest.approx(sum(COUNTS))
    if asked == "balanced":
        from sklearn.utils.class_weight import compute_class_weight

        y = np.repeat(range(3), COUNTS)
        assert found == pytest.approx(compute_class_weight("balanced", classes=np.arange(3), y=y))
    elif asked["a"] == 1.0:
        assert found == pytest.approx([10 / 17, 20 / 17, 50 / 17])
    else:
        assert found == [1.0, 1.0, 1.0]


def test_a_class_that_nobody_holds_has_no_say_in_balanced_weights():
    assert weights_of("balanced", [2, 6, 0]) == pytest.approx([2.0, 2 / 3, 0.0])


@pytest.mark.parametrize(
    ("asked", "part"),
    [({"a": 1.0, "b": 1.0}, "'3' has no weight"), ({"a": 1, "b": 1, "3": 1, "x": 1}, "'x' is no")],
)
def test_weights_of_other_classes_are_refused(asked, part):
    with pytest.raises(ConfigError, match=part):
        weights_of(asked)


def test_weighted_losses_are_those_of_torch():
    torch.manual_seed(0)
    outputs = torch.randn(7, 3, requires_grad=True)
    targets = torch.tensor([0.0, 2.0, 1.0, 1.0, torch.nan, 0.0, 2.0])
    weights = torch.tensor([0.5, 2.0, 3.0])
    losses = target_losses(outputs, targets, weights)
    present = ~targets.isnan()
    stock = torch.nn.CrossEntropyLoss(weight=weights, reduction="sum")
    expected = stock(outputs[present], targets[present].long())
    torch.testing.assert_close(losses.sum(), expected)
    assert losses[4] == 0.0
    ours, theirs = (torch.autograd.grad(one, outputs)[0] for one in (losses.sum(), expected))
    torch.testing.assert_close(ours, theirs)


def test_a_plan_asks_for_the_labels():
    from sfed.plan.checks import check_plan

    with pytest.raises(UserError, match=r"data\.labels: the plan reads no data"):
        check_plan(config("notes.jsonl", federated={"num_clients": 8}), 8)
    check_plan(config("f", data={"labels": ["a", "b"]}, federated={"num_clients": 8}), 8)
