"""Tests of the tokens of a row: what is supervised, what is left out, and what the cache keeps."""

import json
from pathlib import Path

import numpy as np
import pytest
from tokenizers import processors
from transformers import AutoTokenizer

from sfed.config import load as config_load
from sfed.data import demo, sources, tokenize
from sfed.data.sources import has_split
from sfed.data.tokenize import Examples, tokenise
from sfed.utils.errors import DataError, UserError
from tests.support import chats

ROWS = [
    {"prompt": "x" * 30, "completion": "yz", "kind": "b"},
    {"prompt": "Say hi:", "completion": " hi", "kind": "a"},
    {"prompt": "", "completion": "b", "kind": "b"},
    {"prompt": "ünï", "completion": "cödé → 😀\n", "kind": "a"},
    {"text": "  whole text ", "kind": "c"},
    {"prompt": "ends in a space ", "completion": "\n. ", "kind": "c"},
]


@pytest.fixture
def tokenizer(tiny_folder):
    return AutoTokenizer.from_pretrained(tiny_folder / "model")


@pytest.fixture
def calls(monkeypatch):
    """Counts how often rows are tokenised and not taken from the cache."""
    made = []

    def counted(*arguments):
        made.append(1)
        return original(*arguments)

    original = tokenize._tokenised
    monkeypatch.setattr(tokenize, "_tokenised", counted)
    return made


def save(folder, rows, name="rows.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def make_config(path, *, key=None, **data):
    return config_load.validate(
        {
            "data": {"task": "jsonl", "train_files": str(path), "max_tokens": 64, **data},
            "partition": {"key": key},
        }
    )


def tokenised(path, tokenizer, **settings):
    return tokenise(make_config(path, **settings), tokenizer, "train", (str(path),))


def rows_of(table):
    examples = Examples(table, np.arange(len(table)))
    return [examples.row(position)[:2] for position in range(len(table))]


def texts_of(row):
    return (row.get("prompt", ""), row.get("completion", row.get("text")))


def mistake_in(path, tokenizer, **settings):
    with pytest.raises(UserError) as caught:
        tokenised(path, tokenizer, **settings)
    return str(caught.value)


def with_template(tokenizer, template):
    marks = [(mark, tokenizer.convert_tokens_to_ids(mark)) for mark in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=template, special_tokens=marks
    )
    return tokenizer


# --- a row ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>", "$A </s>"])
def test_the_tokens_read_as_the_text_and_the_supervised_ones_as_its_completion(
    tmp_path, tokenizer, template
):
    tokenizer = with_template(tokenizer, template)
    table = tokenised(save(tmp_path, ROWS), tokenizer)
    assert table.left_out == 0 and len(table) == len(ROWS)
    begin = "<s>" if template.startswith("<s>") else ""
    for row, (ids, prompt_length) in zip(ROWS, rows_of(table), strict=True):
        prompt, completion = texts_of(row)
        assert tokenizer.decode(ids) == f"{begin}{prompt}{completion}</s>"
        assert tokenizer.decode(ids[prompt_length:]) == f"{completion}</s>"


def test_a_token_that_reaches_into_the_completion_belongs_to_it(tmp_path, shared_data):
    real = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama-2")
    rows = [{"prompt": "The capital of France is Par", "completion": "is, of course."}]
    ((ids, prompt_length),) = rows_of(tokenised(save(tmp_path, rows), real))
    assert real.decode(ids[prompt_length:]).endswith("Paris, of course.</s>")
    assert real.decode(ids[:prompt_length]).endswith("France is")


def test_real_rows_with_a_real_tokenizer_supervise_their_answers(tmp_path, shared_data):
    real = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / "llama-2")
    lines = (shared_data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()[:50]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    config = config_load.validate({"data": {"task": "gsm8k", "train_files": str(path)}})
    table = tokenise(config, real, "train", (str(path),))
    for line, (ids, prompt_length) in zip(lines, rows_of(table), strict=True):
        assert ids[0] == real.bos_token_id and list(ids).count(real.eos_token_id) == 1
        assert real.decode(ids[prompt_length:-1]).strip() == json.loads(line)["answer"].strip()
        assert real.decode(ids[1:prompt_length]).endswith("Answer:")


def test_a_long_row_is_cut_at_the_end(tmp_path, tokenizer):
    path = save(tmp_path, ROWS)
    whole, cut = tokenised(path, tokenizer), tokenised(path, tokenizer, max_tokens=10)
    expected = {tuple(ids[:10]) for ids, prompt_length in rows_of(whole) if prompt_length < 10}
    assert {tuple(ids) for ids, _ in rows_of(cut)} == expected
    assert cut.lengths.max() == 10 and whole.lengths.max() > 10


def test_a_row_whose_completion_is_cut_off_is_left_out_and_counted(tmp_path, tokenizer):
    path = save(tmp_path, ROWS)
    table = tokenised(path, tokenizer, max_tokens=10, key="kind")
    kept = [row for row in ROWS if 1 + len(texts_of(row)[0].encode()) < 10]
    assert 0 < table.left_out == len(ROWS) - len(kept)
    assert table.keys == tuple(row["kind"] for row in kept)
    for row, (ids, prompt_length) in zip(kept, rows_of(table), strict=True):
        assert tokenizer.decode(ids[1:]) in "".join(texts_of(row)) + "</s>"
        assert len(ids) - max(prompt_length, 1) > 0


@pytest.mark.parametrize("max_tokens", [8, 9])
def test_a_row_is_kept_exactly_when_one_completion_token_remains(tmp_path, tokenizer, max_tokens):
    rows = [{"prompt": "1234567", "completion": "8"}, {"prompt": "", "completion": "8"}]
    table = tokenised(save(tmp_path, rows), tokenizer, max_tokens=max_tokens)  # 1 bos + 7 + 1
    assert table.left_out == (1 if max_tokens == 8 else 0)


def test_the_first_token_of_a_row_does_not_count_as_supervised(tmp_path, tokenizer):
    tokenizer = with_template(tokenizer, "$A")
    rows = [{"text": "a"}, {"text": "ab"}]
    table = tokenised(save(tmp_path, rows), tokenizer, max_tokens=2)
    assert table.left_out == 0 and table.prompt_lengths.tolist() == [0, 0]
    assert "data.max_tokens" in mistake_in(tmp_path / "rows.jsonl", tokenizer, max_tokens=1)


def test_where_every_row_is_left_out_the_remedy_is_named(tmp_path, tokenizer):
    rows = [{"prompt": "x" * 80, "completion": "y"}]
    message = mistake_in(save(tmp_path, rows), tokenizer)
    assert "no row of the train data" in message and "data.max_tokens" in message


@pytest.mark.parametrize("template", ["<s> $A", "$A", "<s> $A </s>", "$A </s>"])
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [
        ("<s>[INST] q [/INST]", " a</s>"),
        ("<s> [INST] q [/INST]", " a"),
        ("<s><s><s>q", " a</s></s>"),
        ("<s>", "q a</s>"),
        ("", "<s>q a</s>"),
        ("", "<s><s>q"),
        ("q</s>", " a</s></s></s>"),
        ("q</s>", "</s>"),
    ],
)
def test_marks_that_a_text_holds_already_stand_once(
    tmp_path, tokenizer, template, prompt, completion
):
    tokenizer = with_template(tokenizer, template)
    path = save(tmp_path, [{"prompt": prompt, "completion": completion}])
    ((ids, prompt_length),) = rows_of(tokenised(path, tokenizer))
    bare = (prompt + completion).removeprefix("<s>").removeprefix("<s>").removeprefix("<s>")
    while bare.endswith("</s></s>"):
        bare = bare.removesuffix("</s>")
    if (prompt, completion) == ("q</s>", "</s>"):  # the first belongs to the prompt
        bare = "q</s></s>"
    begin = "<s>" if template.startswith("<s>") or "<s>" in prompt + completion else ""
    assert tokenizer.decode(ids) == begin + bare.removesuffix("</s>") + "</s>"
    if prompt not in ("", "<s>"):
        assert tokenizer.decode(ids[:prompt_length]).endswith(prompt.replace("<s>", ""))
        supervised = completion.replace("</s>", "") + "</s>"
        assert tokenizer.decode(ids[prompt_length:]) == supervised


def test_a_mark_within_a_text_stays(tmp_path, tokenizer):
    path = save(tmp_path, [{"prompt": "<s>a</s><s>b", "completion": "c</s><s>d"}])
    ((ids, _),) = rows_of(tokenised(path, tokenizer))
    assert tokenizer.decode(ids) == "<s>a</s><s>bc</s><s>d</s>"


def test_a_mark_before_a_line_break_is_within_the_text(tmp_path, tokenizer):
    path = save(tmp_path, [{"prompt": "q", "completion": " a</s>\n"}])
    ((ids, _),) = rows_of(tokenised(path, tokenizer))
    assert tokenizer.decode(ids) == "<s>q a</s>\n</s>"


def test_rows_that_are_cut_are_counted(tmp_path, tokenizer):
    path = save(tmp_path, ROWS)
    whole, cut = tokenised(path, tokenizer), tokenised(path, tokenizer, max_tokens=12)
    longer = [ids for ids, prompt_length in rows_of(whole) if len(ids) > 12 > prompt_length]
    assert not whole.is_cut.any() and cut.is_cut.sum() == len(longer) > 0


def test_long_rows_are_dropped_or_refused_on_request(tmp_path, tokenizer):
    path = save(tmp_path, ROWS)
    whole = tokenised(path, tokenizer)
    short = [row for row in rows_of(whole) if len(row[0]) <= 12]
    dropped = tokenised(path, tokenizer, max_tokens=12, on_long="drop")
    assert [row[0].tolist() for row in rows_of(dropped)] == [row[0].tolist() for row in short]
    assert dropped.gone == dropped.left_out == len(ROWS) - len(short) > 0
    assert not dropped.is_cut.any() and dropped.whole_lengths.max() == whole.lengths.max()
    message = mistake_in(path, tokenizer, max_tokens=12, on_long="error")
    assert f"{dropped.gone} of {len(ROWS)} rows of the train data" in message
    assert f"the longest has {whole.lengths.max()} tokens" in message and "drop" in message
    longest = int(whole.lengths.max())
    for choice in ("truncate", "drop", "error"):
        same = tokenised(path, tokenizer, max_tokens=longest, on_long=choice)
        assert np.array_equal(same.flat, whole.flat)


def test_truncation_says_what_is_lost_and_what_is_gone(tmp_path, tokenizer):
    rows = [
        {"prompt": "1234567", "completion": "8"},
        {"prompt": "1", "completion": "2345678"},
        {"prompt": "1", "completion": " "},
        {"prompt": "1" * 20, "completion": ""},
    ]
    table = tokenised(save(tmp_path, rows), tokenizer, max_tokens=8)  # 1 bos, 1 eos
    assert table.left_out == 3 and table.gone == 1
    assert table.is_cut.tolist() == [True] and table.lost.tolist() == [2]
    assert sorted(table.whole_lengths.tolist()) == [10, 10]


def test_the_columns_that_are_used_are_known_also_from_the_cache(tmp_path, tokenizer, calls):
    rows = [{"prompt": "a", "completion": "b", "text": None, "kind": 1}, {"text": "c", "id": 2}]
    path = save(tmp_path, rows)
    tables = [tokenised(path, tokenizer) for _ in range(2)]
    assert len(calls) == 1
    for table in tables:
        assert table.used_columns == {"prompt", "completion", "text"}
        assert table.other_columns == {"text", "kind", "id"}


def test_text_and_jsonl_share_the_cache_and_other_forms_do_not(tmp_path, tokenizer, calls):
    path = save(tmp_path, [{"prompt": "a", "completion": "b", "text": None}])
    tokenised(path, tokenizer)
    tokenised(path, tokenizer, task="text", on_long="error")
    assert len(calls) == 1
    tokenised(path, tokenizer, columns={"text": "prompt"})
    tokenised(path, tokenizer, template="{prompt}")
    tokenised(path, tokenizer, on_long="drop")
    tokenizer.chat_template = "x"
    tokenised(path, tokenizer)
    tokenised(path, tokenizer, chat_loss="last")
    tokenised(path, tokenizer, chat_template="{{ messages }}")
    assert len(calls) == 7


# --- tables --------------------------------------------------------------------------------------


def test_many_rows_keep_their_order(tmp_path, tokenizer):
    rows = [{"prompt": f"{i}:", "completion": str(i * i), "kind": i % 7} for i in range(2500)]
    table = tokenised(save(tmp_path, rows), tokenizer, key="kind")
    for i, (ids, prompt_length) in enumerate(rows_of(table)):
        assert tokenizer.decode(ids[prompt_length:-1]) == str(i * i)
    assert table.keys == tuple(str(i % 7) for i in range(2500))
    assert np.array_equal(table.lengths, [len(ids) for ids, _ in rows_of(table)])


def test_several_files_follow_one_another(tmp_path, tokenizer):
    paths = [save(tmp_path, ROWS[:2], "a.jsonl"), save(tmp_path, ROWS[2:], "b.jsonl")]
    files = tuple(map(str, paths))
    joined = tokenise(make_config(paths[0]), tokenizer, "train", files)
    single = tokenised(save(tmp_path, ROWS), tokenizer)
    assert np.array_equal(joined.flat, single.flat)
    assert np.array_equal(joined.starts, single.starts)


def test_examples_are_the_chosen_rows_of_a_table(tmp_path, tokenizer):
    table = tokenised(save(tmp_path, ROWS), tokenizer)
    chosen = Examples(table, np.array([4, 0]))
    everything = rows_of(table)
    assert len(chosen) == 2
    assert chosen.lengths.tolist() == [len(everything[4][0]), len(everything[0][0])]
    for position, index in enumerate((4, 0)):
        ids, prompt_length, target, _ = chosen.row(position)
        assert target is None
        assert np.array_equal(ids, everything[index][0])
        assert prompt_length == everything[index][1]


def test_without_a_key_a_table_has_none(tmp_path, tokenizer):
    assert tokenised(save(tmp_path, ROWS), tokenizer).keys is None


@pytest.mark.parametrize(
    ("split", "per_kind"),
    [("train", sources.DEMO_TRAIN_PER_KIND), ("eval", sources.DEMO_EVAL_PER_KIND)],
)
def test_the_demo_gives_each_kind_its_rows(tokenizer, split, per_kind):
    table = tokenise(
        config_load.parse(["data.task=demo", "data.max_tokens=1000"]), tokenizer, split, ()
    )
    assert len(table) == per_kind * len(demo.KINDS)
    assert {kind: table.keys.count(kind) for kind in demo.KINDS} == dict.fromkeys(
        demo.KINDS, per_kind
    )


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({"task": "demo"}, True),
        ({"task": "gsm8k"}, True),
        ({"task": "alpaca"}, False),
        ({"task": "gsm8k", "train_files": "a"}, False),
        ({"task": "gsm8k", "train_files": "a", "eval_files": "b"}, True),
        ({"task": "alpaca", "eval_files": "b"}, True),
    ],
)
def test_held_out_data_come_from_files_or_from_the_task(data, expected):
    config = config_load.validate({"data": data})
    assert has_split(config, "train")
    assert has_split(config, "eval") == expected


# --- mistakes ------------------------------------------------------------------------------------


def test_a_malformed_line_is_named_however_often_it_is_met(tmp_path, tokenizer):
    path = save(tmp_path, ROWS)
    path.write_text(path.read_text() + "{nonsense\n")
    for _ in range(2):
        assert mistake_in(path, tokenizer).startswith(f"{path}, line {len(ROWS) + 1}: not JSON")


def test_a_row_of_another_form_is_named(tmp_path, tokenizer):
    path = save(tmp_path, [*ROWS, {"prompt": "a", "completion": 5}])
    message = mistake_in(path, tokenizer)
    assert message.startswith(f"{path}, line {len(ROWS) + 1}: 'completion' holds int")


def test_a_row_without_the_column_of_the_partition_is_named(tmp_path, tokenizer):
    path = save(tmp_path, [*ROWS, {"text": "a", "sort": "x"}])
    message = mistake_in(path, tokenizer, key="kind")
    assert message.startswith(f"{path}, line {len(ROWS) + 1}: no column 'kind' (partition.key)")
    assert message.endswith("the columns are sort, text")


def test_a_column_that_holds_half_a_character_is_named(tmp_path, tokenizer):
    path = save(tmp_path, [{"text": "a", "kind": "b"}, {"text": "a", "kind": "\ud83d"}])
    assert mistake_in(path, tokenizer, key="kind").startswith(f"{path}, line 2: 'kind'")


def test_a_file_that_is_not_there_is_named_with_its_key(tmp_path, tokenizer):
    message = mistake_in(tmp_path / "none.jsonl", tokenizer)
    assert message.startswith("data.train_files: ") and "none.jsonl" in message


@pytest.mark.parametrize("content", ["", "\n\n"])
def test_files_without_rows_are_refused(tmp_path, tokenizer, content):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    message = mistake_in(path, tokenizer)
    assert message.startswith("data.train_files") and "no rows" in message


@pytest.mark.parametrize("row", [{"text": "half \ud83d"}, {"prompt": "\udc00", "completion": "a"}])
def test_half_a_character_in_a_row_is_named(tmp_path, tokenizer, row):
    path = save(tmp_path, [*ROWS, row])
    message = mistake_in(path, tokenizer)
    assert message.startswith(f"{path}, line {len(ROWS) + 1}")


# --- the cache -----------------------------------------------------------------------------------


def test_a_second_call_comes_from_the_cache_and_gives_the_same(tmp_path, tokenizer, calls):
    path = save(tmp_path, [*ROWS, {"text": "of the cache test", "kind": "d"}])
    first = tokenised(path, tokenizer, key="kind")
    assert len(calls) == 1
    second = tokenised(path, tokenizer, key="kind")
    assert len(calls) == 1
    for name in ("flat", "starts", "prompt_lengths"):
        assert np.array_equal(getattr(first, name), getattr(second, name))
    assert (first.keys, first.left_out) == (second.keys, second.left_out)


def test_the_cache_goes_by_content_and_not_by_the_name_of_a_file(tmp_path, tokenizer, calls):
    rows = [*ROWS, {"text": "by content", "kind": "d"}]
    tokenised(save(tmp_path, rows), tokenizer)
    tokenised(save(tmp_path, rows, "renamed.jsonl"), tokenizer)
    assert len(calls) == 1
    changed = tokenised(save(tmp_path, [*rows[:-1], {"text": "By content"}]), tokenizer)
    assert len(calls) == 2
    assert tokenizer.decode(rows_of(changed)[-1][0]) == "<s>By content</s>"


@pytest.mark.parametrize("settings", [{"max_tokens": 250}, {"key": "kind"}, {"task": "alpaca"}])
def test_another_setting_is_not_served_from_the_cache(tmp_path, tokenizer, calls, settings):
    rows = [{"instruction": "i", "output": "o", "kind": "a", "of": str(settings)}]
    path = save(tmp_path, rows)
    tokenised(path, tokenizer, max_tokens=300)
    tokenised(path, tokenizer, **{"max_tokens": 300, **settings})
    assert len(calls) == 2


LINES = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "d"}]


def test_lines_in_a_json_file_are_refused_whatever_the_cache_holds(tmp_path, tokenizer):
    as_json, as_lines = save(tmp_path, LINES, "rows.json"), save(tmp_path, LINES, "rows.jsonl")
    before = mistake_in(as_json, tokenizer)
    assert "name it .jsonl" in before
    assert len(tokenised(as_lines, tokenizer)) == 2
    assert mistake_in(as_json, tokenizer) == before


def test_a_list_in_a_jsonl_file_is_refused_whatever_the_cache_holds(tmp_path, tokenizer):
    as_list, as_lines = tmp_path / "list.json", tmp_path / "list.jsonl"
    for path in (as_list, as_lines):
        path.write_text(json.dumps(LINES))
    before = mistake_in(as_lines, tokenizer)
    assert len(tokenised(as_list, tokenizer)) == 2
    assert mistake_in(as_lines, tokenizer) == before


def parts_of(paths, tokenizer):
    files = tuple(map(str, paths))
    table = tokenise(make_config(paths[0]), tokenizer, "eval", files)
    return [table.parts[number] for number in table.part_of_row]


def test_parts_have_the_names_of_the_files_whatever_the_cache_holds(tmp_path, tokenizer):
    rows = [LINES[:1], [{"text": "of parts"}]]
    for names in (["a", "b"], ["b", "a"], ["c", "hard_c"], ["a.json", "b"]):
        paths = [
            save(tmp_path, own, f"{name}.jsonl") for own, name in zip(rows, names, strict=True)
        ]
        assert parts_of(paths, tokenizer) == names
    assert parts_of(paths[:1], tokenizer) == [""]
    both = save(tmp_path, rows[0] + rows[1], "both.jsonl")
    assert parts_of([both], tokenizer) == ["", ""]


def test_two_names_of_the_same_bytes_share_the_cache(tmp_path, tokenizer, calls):
    paths = [save(tmp_path, [{"text": "shared by clients"}], f"{i}.jsonl") for i in range(2)]
    first, second = (tokenised(path, tokenizer) for path in paths)
    assert len(calls) == 1
    assert np.array_equal(first.flat, second.flat) and first.parts == second.parts == ("",)


@pytest.mark.parametrize(
    "change",
    [
        lambda tokenizer: setattr(tokenizer, "eos_token", "a"),
        lambda tokenizer: setattr(tokenizer, "eos_token", None),
        lambda tokenizer: setattr(tokenizer, "bos_token", "b"),
        lambda tokenizer: setattr(tokenizer, "split_special_tokens", True),
        lambda tokenizer: setattr(tokenizer, "truncation_side", "left"),
        lambda tokenizer: setattr(tokenizer, "sep_token", "</s>"),
        lambda tokenizer: tokenizer.add_tokens(["the word"]),
    ],
)
def test_a_tokenizer_with_another_setting_is_not_served_from_the_cache(
    tmp_path, tokenizer, calls, change
):
    path = save(tmp_path, [{"text": f"the word and its </s> mark, {tmp_path.name}"}])
    tokenised(path, tokenizer)
    change(tokenizer)
    tokenised(path, tokenizer)
    assert len(calls) == 2


@pytest.mark.parametrize("settings", ["none", "some"])
def test_tokenising_leaves_the_tokenizer_as_it_was(tmp_path, tokenizer, settings):
    if settings == "some":
        tokenizer.backend_tokenizer.enable_truncation(20, stride=1, direction="left")
        tokenizer.backend_tokenizer.enable_padding(length=20, pad_id=3)
    rows = [{"sentence": "a long sentence", "label": 1, "more": settings}]
    path = save(tmp_path, rows)
    before = tokenizer.backend_tokenizer.to_str()
    config = config_load.validate(
        {"data": {"task": "glue", "name": "sst2", "train_files": str(path), "max_tokens": 9}}
    )
    table = tokenise(config, tokenizer, "train", (str(path),))
    assert table.lengths.tolist() == [9] and table.is_cut.tolist() == [True]
    assert tokenizer.backend_tokenizer.to_str() == before


def test_another_tokenizer_is_not_served_from_the_cache(tmp_path, tokenizer, calls):
    path = save(tmp_path, [{"text": "another tokenizer"}])
    first = tokenised(path, tokenizer)
    second = tokenised(path, with_template(tokenizer, "$A"))
    assert len(calls) == 2
    assert len(first.flat) == len(second.flat) + 1


def test_the_cache_does_not_depend_on_what_a_tokenizer_did_before(tmp_path, tokenizer, calls):
    tokenizer.backend_tokenizer.enable_truncation(20)  # as some published tokenizers come
    tokenizer.backend_tokenizer.enable_padding(length=20)
    folder = tmp_path / "tokenizer"
    tokenizer.save_pretrained(folder)
    train, held_out = [
        save(tmp_path, [{"text": f"{i} {'x' * 30}"}], f"{i}.jsonl") for i in range(2)
    ]
    used, fresh = (AutoTokenizer.from_pretrained(folder) for _ in range(2))
    assert tokenised(train, used).lengths.tolist() == [34]
    tokenised(held_out, used)
    assert len(calls) == 2
    tokenised(held_out, fresh)
    assert len(calls) == 2


def test_the_cache_lies_where_datasets_keeps_it(tmp_path, tokenizer, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "elsewhere")
    tokenised(save(tmp_path, [{"text": "elsewhere"}]), tokenizer)
    assert list(Path(tmp_path / "elsewhere").rglob("*.arrow"))


@pytest.mark.parametrize(
    ("split", "data", "asked"),
    [
        ("train", {}, ("org/name", None, "train")),
        ("train", {"split": "all[:9]"}, ("org/name", None, "all[:9]")),
        ("eval", {}, ("org/name", None, "test")),
        ("eval", {"eval_split": "validation"}, ("org/name", None, "validation")),
    ],
)
def test_a_data_set_of_the_hub_is_named_among_the_files(
    tmp_path, tokenizer, monkeypatch, split, data, asked
):
    import datasets

    calls = []

    def load(name, config, split):
        calls.append((name, config, split))
        return datasets.Dataset.from_list([{"text": f"{name} {split}"}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    path = save(tmp_path, [{"text": "mine"}])
    config = make_config("hub:org/name", eval_files="hub:org/name", **data)
    table = tokenise(config, tokenizer, split, (str(path), "hub:org/name"))
    assert calls == [asked] and len(table) == 2
    tokenise(config, tokenizer, split, ("hub:org/name:part",))
    assert calls[1] == ("org/name", "part", asked[2])


def test_a_conversation_of_the_hub_has_the_fields_that_it_was_written_with(tmp_path, monkeypatch):
    import datasets

    tokenizer = chats.chat_tokenizer(chats.TOOLS)
    calls = [{"name": "f", "arguments": {"x": 1}}], [{"name": "g", "arguments": {"y": "z"}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", **said}]}
        for said in (
            {"content": "a"},
            *({"content": None, "tool_calls": some} for some in calls),
        )
    ]
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.Dataset.from_list(rows))
    path = save(tmp_path, rows)
    mine, theirs = (
        tokenise(make_config(path), tokenizer, "train", (name,)) for name in (str(path), "hub:a/b")
    )
    assert mine.flat.tolist() == theirs.flat.tolist()


def test_a_data_set_that_is_not_on_the_hub_is_named_with_its_key(tmp_path, tokenizer):
    with pytest.raises(DataError, match=r"^data.train_files: 'hub:nobody/none' cannot be loaded"):
        tokenise(make_config(save(tmp_path, ROWS)), tokenizer, "train", ("hub:nobody/none",))
