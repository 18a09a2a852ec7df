"""Tests of the tasks: how a row becomes a prompt and a completion, and mistakes in a file."""

import json

import pytest

from sfed.data.tasks import TASKS, checked_pair, read_rows
from sfed.utils.errors import UserError

ALPACA = "Below is an instruction that describes a task"
ALPACA_REQUEST = ". Write a response that appropriately completes the request.\n\n"


def save(folder, content, name="rows.jsonl"):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def mistake_in(path):
    with pytest.raises(UserError) as caught:
        list(read_rows(path))
    return str(caught.value)


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


# --- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_jsonl_file_gives_rows_with_their_lines_and_passes_over_blank_ones(tmp_path, end):
    path = save(tmp_path, end.join(['{"a": 1}', "", "   ", '{"a": "é"}', "[2]"]))
    assert list(read_rows(path)) == [
        (f"{path}, line 1", {"a": 1}),
        (f"{path}, line 4", {"a": "é"}),
        (f"{path}, line 5", [2]),
    ]


def test_a_separator_of_unicode_within_a_row_does_not_end_it(tmp_path):
    row = {"text": "a\u2028b\u0085c"}
    path = save(tmp_path, json.dumps(row, ensure_ascii=False) + "\n")
    assert list(read_rows(path)) == [(f"{path}, line 1", row)]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_json_file_gives_the_rows_of_its_list(tmp_path, indent):
    path = save(tmp_path, json.dumps([{"a": 1}, {"a": 2}], indent=indent), "rows.json")
    assert list(read_rows(path)) == [(f"{path}, row 1", {"a": 1}), (f"{path}, row 2", {"a": 2})]


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_without_rows_gives_none(tmp_path, name):
    assert list(read_rows(save(tmp_path, "[]" if name == "rows.json" else "\n\n", name))) == []


def test_a_line_that_is_not_json_is_refused_by_file_and_line(tmp_path):
    path = save(tmp_path, '{"a": 1}\n\n{"a": 2\n')
    assert mistake_in(path).startswith(f"{path}, line 3: not JSON")


def test_rows_before_a_malformed_line_are_read(tmp_path):
    rows = read_rows(save(tmp_path, '{"a": 1}\nnonsense\n'))
    assert next(rows)[1] == {"a": 1}
    with pytest.raises(UserError, match="line 2"):
        next(rows)


@pytest.mark.parametrize(
    ("content", "part"),
    [('[{"a": 1}', "not JSON"), ('{"a": 1}', "holds a list of rows; name it .jsonl")],
)
def test_a_json_file_that_holds_no_list_is_refused_by_its_name(tmp_path, content, part):
    path = save(tmp_path, content, "rows.json")
    message = mistake_in(path)
    assert message.startswith(str(path)) and part in message


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_that_is_not_utf8_is_refused_by_its_name(tmp_path, name):
    path = save(tmp_path, b'[{"a": "\xe9"}]\n', name)
    assert mistake_in(path).startswith(f"{path}: not UTF-8 text")


@pytest.mark.parametrize("name", ["rows.json", "rows.jsonl"])
def test_a_file_that_is_not_there_or_is_a_folder_is_refused_by_its_name(tmp_path, name):
    assert mistake_in(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read")
    (tmp_path / name).mkdir()
    assert mistake_in(tmp_path / name).startswith(f"{tmp_path / name}: cannot be read")


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


@pytest.mark.parametrize(
    "line",
    [
        '{"text": "a", "text": "b"}',
        '{"text": "a", "more": {"x": 1, "x": 1}}',
        '{"text": "a", "n": ' + "9" * 5000 + "}",
    ],
)
def test_a_line_that_loses_something_when_it_is_read_is_named(tmp_path, line):
    message = mistake_in(save(tmp_path, f'{{"text": "a"}}\n{line}\n'))
    assert message.startswith(f"{tmp_path / 'rows.jsonl'}, line 2: not JSON")
    message = mistake_in(save(tmp_path, f"[{line}]", "rows.json"))
    assert message.startswith(f"{tmp_path / 'rows.json'}: not JSON")


@pytest.mark.parametrize(
    "content", ['{"a": 1}\n{"a": 2}\n', '{"a": 1}\n', '{"a": 1}', '\ufeff{"a": 1}\n\n{"a": 2}']
)
def test_lines_in_a_json_file_are_told_to_be_jsonl(tmp_path, content):
    message = mistake_in(save(tmp_path, content, "rows.json"))
    assert message.startswith(str(tmp_path / "rows.json")) and "name it .jsonl" in message


def test_every_file_may_begin_with_a_byte_order_mark(tmp_path):
    for name in ("a.jsonl", "b.jsonl", "c.json"):
        row = b'{"a": 1}'
        path = save(
            tmp_path, b"\xef\xbb\xbf" + (b"[" + row + b"]" if name[2:] == "json" else row), name
        )
        assert [row for _, row in read_rows(path)] == [{"a": 1}]
