"""Tests of the tasks: how a row becomes a prompt and a completion, and mistakes in a file."""

import pytest

from sfed.config import load as config_load
from sfed.data.tasks import TASKS, checked_pair, task_of
from sfed.files.readers import read_rows
from sfed.utils.errors import UserError

ALPACA = "Below is an instruction that describes a task"
ALPACA_REQUEST = ". Write a response that appropriately completes the request.\n\n"


# --- rows ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "row", "prompt", "completion"),
    [
        (
            "gsm8k",
            {"question": " 1+1? \n", "answer": " two\n#### 2 "},
            "Question: 1+1?\nAnswer:",
            " two\n#### 2",
        ),
        (
            "demo",
            {"question": "1+1?", "answer": "2", "kind": "x"},
            "Question: 1+1?\nAnswer:",
            " 2",
        ),
        (
            "alpaca",
            {"instruction": "Say hi.", "input": "", "output": "hi"},
            f"{ALPACA}{ALPACA_REQUEST}### Instruction:\nSay hi.\n\n### Response:\n",
            "hi",
        ),
        (
            "alpaca",
            {"instruction": "Translate.", "input": "Haus", "output": "house"},
            f"{ALPACA}, paired with an input that provides further context{ALPACA_REQUEST}"
            "### Instruction:\nTranslate.\n\n### Input:\nHaus\n\n### Response:\n",
            "house",
        ),
        ("jsonl", {"prompt": "a ", "completion": " b"}, "a ", " b"),
        ("jsonl", {"prompt": "", "completion": "b", "more": 1}, "", "b"),
        ("jsonl", {"text": " whole "}, "", " whole "),
        (
            "jsonl",
            {"instruction": "Say hi.", "output": "hi"},
            f"{ALPACA}{ALPACA_REQUEST}### Instruction:\nSay hi.\n\n### Response:\n",
            "hi",
        ),
    ],
)
def test_a_row_becomes_a_prompt_and_a_completion(task, row, prompt, completion):
    pair = checked_pair(TASKS[task], row, "here")
    assert (pair.prompt, pair.completion) == (prompt, completion)


@pytest.mark.parametrize("missing", [{"input": None}, {}])
def test_an_alpaca_row_without_an_input_is_one_with_an_empty_input(missing):
    row = {"instruction": "Say hi.", "output": "hi"}
    expected = checked_pair(TASKS["alpaca"], {**row, "input": ""}, "here")
    assert checked_pair(TASKS["alpaca"], {**row, **missing}, "here") == expected


@pytest.mark.parametrize(
    ("task", "row", "part"),
    [
        ("gsm8k", {"question": "1+1?"}, "no key 'answer'"),
        ("gsm8k", {"question": "1+1?", "answer": 2}, "'answer' holds int, not text"),
        ("gsm8k", {"question": None, "answer": "2"}, "'question' holds NoneType, not text"),
        ("alpaca", {"instruction": "Say hi.", "input": ""}, "no key 'output'"),
        ("alpaca", {"instruction": "a", "input": ["b"], "output": "c"}, "'input' holds list"),
        ("jsonl", {"prompt": "a"}, "no key 'completion'"),
        ("jsonl", {"text": 1.5}, "'text' holds float, not text"),
        ("jsonl", {}, "no key 'prompt'"),
        (
            "jsonl",
            {"Prompt": "a", "Completion": "b"},
            "no key 'prompt': it holds 'Prompt' and 'Completion';",
        ),
        ("jsonl", {"x": 1}, "no key 'prompt': it holds 'x'; name its columns in data.columns,"),
        ("jsonl", ["a", "b"], "it holds list"),
        ("jsonl", "a", "it holds str"),
        ("jsonl", None, "it holds NoneType"),
    ],
)
def test_a_row_of_another_form_is_refused_with_its_place_and_the_form(task, row, part):
    with pytest.raises(UserError) as caught:
        checked_pair(TASKS[task], row, "rows.jsonl, line 7")
    assert str(caught.value).startswith(f"rows.jsonl, line 7: {part}")
    assert str(caught.value).endswith(f"expected {TASKS[task].form}")


TEXT, PAIR, ALPACA_ROW = (
    {"text": "t"},
    {"prompt": "p", "completion": " c"},
    {"instruction": "i", "output": "o"},
)


@pytest.mark.parametrize(
    ("row", "named"),
    [
        ({**PAIR, **TEXT}, "'text', 'prompt' and 'completion'"),
        ({**TEXT, "prompt": "p"}, "'text' and 'prompt'"),
        ({**TEXT, "completion": ""}, "'text' and 'completion'"),
        ({**PAIR, "text": ""}, "'text', 'prompt' and 'completion'"),
        ({**ALPACA_ROW, **TEXT}, "'instruction', 'output' and 'text'"),
        ({**ALPACA_ROW, **PAIR}, "'instruction', 'output', 'prompt' and 'completion'"),
        ({**TEXT, "output": "o"}, "'output' and 'text'"),
        ({**TEXT, **PAIR, **ALPACA_ROW}, "in 3 ways"),
    ],
)
def test_a_row_of_two_forms_is_refused_with_its_place_and_columns(row, named):
    with pytest.raises(UserError) as caught:
        checked_pair(TASKS["jsonl"], row, "rows.jsonl, line 7")
    message = str(caught.value)
    assert message.startswith("rows.jsonl, line 7: it can be read in ")
    assert named in message and "null" in message


@pytest.mark.parametrize(
    ("row", "prompt", "completion"),
    [
        ({**PAIR, "text": None}, "p", " c"),
        ({**PAIR, "instruction": None, "output": None, "input": "x"}, "p", " c"),
        ({**TEXT, "prompt": None, "completion": None}, "", "t"),
        ({**TEXT, "input": "a column of another meaning"}, "", "t"),
    ],
)
def test_a_column_of_null_counts_as_not_there(row, prompt, completion):
    pair = checked_pair(TASKS["jsonl"], row, "here")
    assert (pair.prompt, pair.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"text": None}, "'text' holds NoneType"),
        ({"prompt": "p", "completion": None}, "'completion' holds NoneType"),
        ({"instruction": None, "text": None}, "'instruction' holds NoneType"),
    ],
)
def test_a_row_of_nulls_is_refused(row, part):
    with pytest.raises(UserError, match=part):
        checked_pair(TASKS["jsonl"], row, "here")


def test_a_task_with_columns_of_its_own_passes_others_over():
    row = {**ALPACA_ROW, "input": "", "text": "the whole prompt again"}
    assert checked_pair(TASKS["alpaca"], row, "here").completion == "o"


@pytest.mark.parametrize(
    ("task", "file", "count"),
    [
        ("gsm8k", "gsm8k/train.jsonl", 7473),
        ("gsm8k", "gsm8k/test.jsonl", 1319),
        ("alpaca", "alpaca/alpaca_5000.json", None),
    ],
)
def test_the_published_files_are_read_whole(shared_data, task, file, count):
    rows = list(read_rows(shared_data / file))
    assert len(rows) == (count or 5000)
    filled = [(where, row) for where, row in rows if row.get("output") != ""]
    assert len(filled) > 0.99 * len(rows)
    pairs = [checked_pair(TASKS[task], row, where) for where, row in filled]
    assert all(pair.prompt and pair.completion for pair in pairs)


# --- names of columns and own prompts -----------------------------------------------------------


def of_text(**data):
    return task_of(
        config_load.validate({"data": {"task": "text", "train_files": "x.jsonl", **data}})
    )


QA = {"question": "q", "answer": "a", "id": 7}


@pytest.mark.parametrize(
    ("columns", "row", "prompt", "completion"),
    [
        ({"prompt": "question", "completion": "answer"}, QA, "q", "a"),
        ({"prompt": "question"}, {"question": "q", "completion": "a"}, "q", "a"),
        ({"text": "answer"}, QA, "", "a"),
        ({"prompt": "completion", "completion": "prompt"}, PAIR, " c", "p"),
        # What is named is no longer ambiguous.
        ({"text": "text"}, {**PAIR, **TEXT}, "", "t"),
        ({"prompt": "prompt"}, {**PAIR, **TEXT, "messages": []}, "p", " c"),
        ({"completion": "output"}, {**ALPACA_ROW, "prompt": "p"}, "p", "o"),
    ],
)
def test_columns_have_the_names_of_the_file(columns, row, prompt, completion):
    pair = checked_pair(of_text(columns=columns), row, "here")
    assert (pair.prompt, pair.completion) == (prompt, completion)


@pytest.mark.parametrize(
    ("input_", "opening"), [("z", "paired with an input"), (None, "Write a response")]
)
def test_an_instruction_under_other_names(input_, opening):
    task = of_text(columns={"instruction": "question", "output": "answer", "input": "context"})
    pair = checked_pair(task, {**QA, "context": input_}, "here")
    assert opening in pair.prompt and "### Instruction:\nq\n" in pair.prompt
    assert pair.completion == "a"


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"question": "q"}, "no key 'answer'"),
        ({"question": "q", "answer": 5}, "'answer' holds int, not text"),
        ({"prompt": "q", "completion": "a"}, "no key 'question'"),
    ],
)
def test_mistakes_are_told_in_the_files_own_names(row, part):
    with pytest.raises(UserError) as caught:
        checked_pair(of_text(columns={"prompt": "question", "completion": "answer"}), row, "here")
    assert str(caught.value) == f"here: {part}; expected question, answer"


@pytest.mark.parametrize(
    ("template", "row", "prompt"),
    [
        ("Q: {question}\nA:", QA, "Q: q\nA:"),
        ("{id}: {question} {id}", QA, "7: q 7"),
        ("{{{question}}} {{id}}", QA, "{q} {id}"),
        ("{question}", {**QA, "question": "{answer} {0} {{"}, "{answer} {0} {{"),
        ("{two words}", {"two words": "x", "answer": "a"}, "x"),
        ("{question}", {**QA, "text": "t", "prompt": "p", "messages": []}, "q"),
    ],
)
def test_a_template_of_ones_own_makes_the_prompt(template, row, prompt):
    task = of_text(template=template, columns={"completion": "answer"})
    pair = checked_pair(task, row, "here")
    assert (pair.prompt, pair.completion) == (prompt, "a")


@pytest.mark.parametrize(
    ("row", "part"),
    [
        ({"answer": "a"}, "no key 'question'"),
        ({"question": None, "answer": "a"}, "'question' holds null"),
        ({"question": ["q"], "answer": "a"}, "'question' holds list"),
        ({"question": True, "answer": "a"}, "'question' holds bool"),
        ({"question": "q"}, "no key 'answer'"),
    ],
)
def test_a_row_that_a_template_cannot_be_filled_with_is_refused(row, part):
    task = of_text(template="{question}", columns={"completion": "answer"})
    with pytest.raises(UserError, match=part):
        checked_pair(task, row, "rows.jsonl, line 7")


@pytest.mark.parametrize(
    ("task", "row"),
    [
        ("gsm8k", {"question": "1+1?", "answer": "#### 2"}),
        ("alpaca", {"instruction": "i", "input": "", "output": "o"}),
        ("alpaca", {"instruction": "i", "input": "x", "output": "o"}),
        ("text", {"prompt": "p", "completion": "c"}),
        ("text", {"text": "t"}),
    ],
)
def test_what_is_said_of_a_prompt_is_how_it_is_written(task, row):
    pair = checked_pair(TASKS[task], row, "here")
    known = of_text().written if task == "text" else TASKS[task].written
    filled = [
        (one.prompt.format(**row), one.completion.format(**row))
        for one in known
        if one.columns == {name for name, value in row.items() if value}
    ]
    assert filled == [(pair.prompt, pair.completion)]


def test_text_is_the_name_of_jsonl():
    assert TASKS["text"] is TASKS["jsonl"]
    for name in ("text", "jsonl"):
        data = {"task": name, "train_files": "x.jsonl"}
        task = task_of(config_load.validate({"data": data}))
        assert checked_pair(task, PAIR, "here").completion == " c"
