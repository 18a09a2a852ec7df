"""Tests of conversations: what is rendered, what of it is learned, and what is refused."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import replace
from itertools import groupby, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sfed.config import load as config_load
from sfed.data.batches import IGNORED_LABEL, collate
from sfed.data.forms import chat
from sfed.data.forms.pair import conversation
from sfed.data.tokenize import Examples, tokenise
from sfed.utils.errors import DataError
from tests.support import chats

TALK = [
    {"role": "user", "content": "What is 2+3?"},
    {"role": "assistant", "content": "5"},
    {"role": "user", "content": "And ünï 2*3?"},
    {"role": "assistant", "content": "6 → 😀"},
]
SYSTEM = {"role": "system", "content": "Be brief."}
ENDS = {
    "chatml": "<|im_end|>\n",
    "chatml-marked": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma": "<end_of_turn>\n",
}


def examples_of(folder, rows, tokenizer, **settings):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    data = {"task": "text", "train_files": str(path), **settings}
    table = tokenise(config_load.validate({"data": data}), tokenizer, "train", (str(path),))
    return Examples(table, np.arange(len(table)))


def stretches(row, tokenizer):
    """The text of a row as (is learned, text)."""
    grouped = groupby(range(len(row.ids)), key=row.is_learned.__getitem__)
    return [(bool(learned), tokenizer.decode(row.ids[list(some)])) for learned, some in grouped]


def refused(folder, rows, tokenizer, **settings):
    with pytest.raises(DataError) as caught:
        examples_of(folder, rows, tokenizer, **settings)
    return str(caught.value)


# --- what is learned -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_the_tokens_are_those_of_the_template_and_the_answers_with_their_ends_are_learned(
    tmp_path, name
):
    tokenizer = chats.chat_tokenizer(chats.TEMPLATES[name])
    row = examples_of(tmp_path, [{"messages": TALK}], tokenizer).row(0)
    assert row.ids.tolist() == tokenizer.apply_chat_template(TALK, return_dict=False)
    expected = [TALK[1]["content"] + ENDS[name], TALK[3]["content"] + ENDS[name]]
    learned = [text for is_learned, text in stretches(row, tokenizer) if is_learned]
    assert [text.removeprefix(" ") for text in learned] == expected
    assert row.ids.tolist().count(tokenizer.bos_token_id) <= 1


@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_the_prompt_is_what_the_template_invites_the_last_answer_with(tmp_path, name):
    tokenizer = chats.chat_tokenizer(chats.TEMPLATES[name])
    row = examples_of(tmp_path, [{"messages": TALK}], tokenizer).row(0)
    prompt = tokenizer.apply_chat_template(TALK[:3], add_generation_prompt=True, return_dict=False)
    assert row.ids[: row.answer.start].tolist() == prompt


def test_the_labels_are_those_of_the_templates_own_marks(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.CHATML_MARKED)
    talks = [TALK, [SYSTEM, *TALK, {"role": "user", "content": "thanks"}]]
    examples = examples_of(tmp_path, [{"messages": talk} for talk in talks], tokenizer)
    batch = collate([[examples.row(0), examples.row(1)]], 2)
    for labels, talk in zip(batch.labels.tolist(), talks, strict=True):
        stock = tokenizer.apply_chat_template(
            talk, return_dict=True, return_assistant_tokens_mask=True
        )
        expected = [
            one if is_learned else IGNORED_LABEL
            for one, is_learned in zip(stock["input_ids"], stock["assistant_masks"], strict=True)
        ]
        assert labels == expected + [IGNORED_LABEL] * (len(labels) - len(expected))


MARKED = (
    "{{ bos_token }}{% for turn in messages %}{% if turn.role == 'user' %}[INST] {{ turn.content }}"
    " [/INST]{% else %}{% generation %} {{ turn.content }} {{ eos_token }}{% endgeneration %}"
    "{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("name", ["llama-2", "roberta"])
def test_real_tokenizers_learn_every_token_of_an_answer(tmp_path, shared_data, name):
    tokenizer = AutoTokenizer.from_pretrained(shared_data / "tokenizers" / name)
    code = {"role": "assistant", "content": "def f():\n    return  6 # ünï →   😀  "}
    talk = [TALK[0], code, *TALK[2:]]
    learned = []
    for template in (MARKED, re.sub("{% (end)?generation %}", "", MARKED)):
        tokenizer.chat_template = template
        row = examples_of(tmp_path, [{"messages": talk}], tokenizer).row(0)
        learned.append(row.is_learned.tolist())
        prompt = tokenizer.apply_chat_template(talk[:3], return_dict=False)
        assert row.ids[: row.answer.start].tolist() == prompt
        assert sum(before != now for before, now in pairwise(learned[-1])) == 3  # two answers
    assert learned[0] == learned[1]
    tokenizer.chat_template = MARKED
    stock = tokenizer.apply_chat_template(talk, return_dict=True, return_assistant_tokens_mask=True)
    assert row.ids.tolist() == stock["input_ids"]
    if name == "llama-2":  # stock finds no token at a space that roberta's offsets leave out
        assert learned[0] == [bool(one) for one in stock["assistant_masks"]]


def test_a_template_with_marks_and_one_without_give_the_same_but_for_the_last_line_break(tmp_path):
    rows = [{"messages": [SYSTEM, *TALK]}]
    marked, plain = (
        examples_of(tmp_path, rows, chats.chat_tokenizer(template)).row(0)
        for template in (chats.CHATML_MARKED, chats.CHATML)
    )
    assert marked.ids.tolist() == plain.ids.tolist()
    beyond = np.flatnonzero(marked.is_learned != plain.is_learned)
    tokenizer = chats.chat_tokenizer(chats.CHATML)
    assert tokenizer.decode(plain.ids[beyond]) == "\n\n"


@pytest.mark.parametrize("name", ["llama3", "chatml-marked"])
def test_of_the_last_turn_alone(tmp_path, name):
    tokenizer = chats.chat_tokenizer(chats.TEMPLATES[name])
    row = examples_of(tmp_path, [{"messages": TALK}], tokenizer, chat_loss="last").row(0)
    learned = [text for is_learned, text in stretches(row, tokenizer) if is_learned]
    assert learned == ["6 → 😀" + ENDS[name]]


@pytest.mark.parametrize("name", ["chatml", "chatml-marked", "llama3"])
def test_what_follows_the_last_answer_is_kept_and_only_read(tmp_path, name):
    tokenizer = chats.chat_tokenizer(chats.TEMPLATES[name])
    talk = [SYSTEM, *TALK, {"role": "tool", "content": "thanks"}]
    row = examples_of(tmp_path, [{"messages": talk}], tokenizer).row(0)
    parts = stretches(row, tokenizer)
    assert [learned for learned, _ in parts] == [False, True, False, True, False]
    assert "Be brief." in parts[0][1] and "thanks" in parts[-1][1]
    assert tokenizer.decode(row.ids[row.answer]) == parts[3][1]
    assert tokenizer.decode(row.ids[: row.answer.start]) == "".join(t for _, t in parts[:3])


def test_tools_and_calls_of_them_are_kept(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.TOOLS)
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    talk = [
        {"role": "user", "content": "2+3?"},
        {"role": "assistant", "content": None, "tool_calls": [{"name": "add", "arguments": {}}]},
        {"role": "tool", "content": "5"},
        {"role": "assistant", "content": "It is 5."},
    ]
    rows = [{"messages": talk, "tools": some} for some in (tools, json.dumps(tools))]
    examples = examples_of(tmp_path, rows, tokenizer)
    first, second = examples.row(0), examples.row(1)
    assert first.ids.tolist() == second.ids.tolist()
    assert first.ids.tolist() == tokenizer.apply_chat_template(talk, tools, return_dict=False)
    learned = [text for is_learned, text in stretches(first, tokenizer) if is_learned]
    assert ["<call>" in text for text in learned] == [True, False]


@pytest.mark.parametrize("tools", ["add", "[" * 100_000])
def test_tools_that_are_text_and_no_json_are_named(tmp_path, tools):
    row = {"messages": TALK, "tools": tools}
    said = refused(tmp_path, [row], chats.chat_tokenizer(chats.TOOLS))
    assert "line 1: 'tools' is text and not JSON" in said


def test_a_system_turn_becomes_what_the_template_makes_of_it(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.GEMMA)
    row = examples_of(tmp_path, [{"messages": [SYSTEM, *TALK]}], tokenizer).row(0)
    assert "user\nBe brief.\n\nWhat is 2+3?" in tokenizer.decode(row.ids)


texts = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="<[|"), min_size=1, max_size=12
).filter(str.strip)
talks = st.lists(st.tuples(texts, texts), min_size=1, max_size=4)


@given(talks, st.sampled_from(["chatml", "chatml-marked", "llama3", "mistral", "gemma"]))
def test_the_spans_make_up_the_rendered_text_and_hold_the_answers(pairs, name):
    tokenizer = chats.chat_tokenizer(chats.TEMPLATES[name])
    template = chat.chat_template_of(config_load.validate({}).data, tokenizer)
    talk = [
        {"role": role, "content": text.strip()}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    pair = template.render(talk)
    assert pair.prompt + pair.completion == tokenizer.apply_chat_template(talk, tokenize=False)
    edges = [0, *(edge for span in pair.read for edge in span), len(pair.completion)]
    learned = [pair.completion[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True) if a < b]
    assert [text.removeprefix(" " * (name == "mistral")) for text in learned] == [
        turn["content"] + ENDS[name] for turn in talk[1::2]
    ]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1), st.integers(0, 3))
def test_a_conversation_reads_all_that_is_no_answer(steps, tail):
    answers, place = [], 0
    for gap, length in steps:
        answers.append((place + gap, place + gap + length))
        place += gap + length
    text = "x" * (place + tail)
    pair = conversation(text, answers)
    start = len(pair.prompt)
    read = {i for a, b in pair.read for i in range(a + start, b + start)} | set(range(start))
    assert pair.prompt + pair.completion == text
    assert set(range(len(text))) - read == {i for a, b in answers for i in range(a, b)}


# --- what is cut ---------------------------------------------------------------------------------


def test_truncation_moves_no_edge_and_counts_what_is_lost(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.LLAMA3)
    whole = examples_of(tmp_path, [{"messages": TALK}], tokenizer)
    row = whole.row(0)
    first = int(np.flatnonzero(row.is_learned)[0])
    for limit in range(first + 1, len(row.ids) + 1):
        cut = examples_of(tmp_path, [{"messages": TALK}], tokenizer, max_tokens=limit)
        assert cut.row(0).ids.tolist() == row.ids[:limit].tolist()
        assert cut.row(0).is_learned.tolist() == row.is_learned[:limit].tolist()
        assert cut.table.lost.tolist() == [row.is_learned[limit:].sum()]
        assert cut.table.is_cut.tolist() == [limit < len(row.ids)]


def test_rows_of_several_forms_in_one_file(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.CHATML)
    rows = [{"messages": TALK}, {"prompt": "a", "completion": "b"}, {"messages": TALK[:2]}]
    examples = examples_of(tmp_path, rows, tokenizer)
    learned = [[t for is_it, t in stretches(examples.row(i), tokenizer) if is_it] for i in range(3)]
    assert learned == [["5<|im_end|>\n", "6 → 😀<|im_end|>\n"], ["b</s>"], ["5<|im_end|>\n"]]


def test_the_digest_tells_what_is_learned_and_is_the_old_one_without_conversations(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.LLAMA3)
    rows = [{"messages": TALK}]
    every, last = (
        examples_of(tmp_path, rows, tokenizer, chat_loss=loss) for loss in ("all", "last")
    )
    assert every.digest() != last.digest()
    without = replace(every.table, gaps=None)
    assert Examples(without, every.indices).digest() != every.digest()
    plain = examples_of(tmp_path, [{"prompt": "a", "completion": "b"}], tokenizer)
    row = plain.row(0)
    expected = hashlib.blake2b(digest_size=8)
    expected.update(np.array([len(row.ids)]).tobytes())
    expected.update(np.array([row.prompt_length], dtype=np.int32).tobytes())
    expected.update(np.array([np.nan]).tobytes() + row.ids.tobytes())
    assert plain.digest() == expected.hexdigest()


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("talk", "part"),
    [
        ([], "no list of turns"),
        ("hello", "no list of turns"),
        (["hello"], "no list of turns"),
        ([{"content": "x"}], "turn 1 of 'messages' has no 'role'"),
        (
            [{"from": "function_call", "value": "x"}],
            "turn 1 of 'messages': 'from' is 'function_call'",
        ),
        ([{"from": "human"}], "turn 1 of 'messages' (user): 'content' holds null"),
        (
            [TALK[0], {"role": "assistant"}],
            "turn 2 of 'messages' (assistant): 'content' holds null",
        ),
        ([{"role": "user", "content": [{"type": "image"}]}], "has a part of type 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "has a part of type 'text'"),
        ([{"role": "user", "content": ["x"]}], "'content' holds list, not text"),
        ([{"role": "user", "content": []}], "'content' holds list, not text"),
        (TALK[:1], "no turn of 'messages' has the role assistant"),
    ],
)
def test_what_is_no_conversation_is_refused_with_its_line(tmp_path, talk, part):
    tokenizer = chats.chat_tokenizer(chats.CHATML)
    message = refused(tmp_path, [{"messages": TALK}, {"messages": talk}], tokenizer)
    assert "rows.jsonl, line 2: " in message and part in message


def test_other_spellings_of_a_conversation_give_the_same_tokens(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.CHATML)
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    sharegpt = [{"from": names[turn["role"]], "value": turn["content"]} for turn in [SYSTEM, *TALK]]
    parts = [
        {**turn, "content": [{"type": "text", "text": text} for text in turn["content"]]}
        for turn in [SYSTEM, *TALK]
    ]
    rows = [{"talk": talk} for talk in ([SYSTEM, *TALK], sharegpt, parts)]
    found = examples_of(tmp_path, rows, tokenizer, columns={"messages": "talk"})
    expected = found.row(0)
    for other in (found.row(1), found.row(2)):
        assert np.array_equal(other.ids, expected.ids)
        assert np.array_equal(other.is_learned, expected.is_learned)


def test_the_column_of_sharegpt_is_answered_with_the_key_that_reads_it(tmp_path):
    rows = [{"conversations": [{"from": "human", "value": "x"}]}]
    message = refused(tmp_path, rows, chats.chat_tokenizer(chats.CHATML))
    assert "data.columns.messages=conversations" in message


def test_what_the_template_refuses_is_refused_in_its_words(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.MISTRAL)
    message = refused(tmp_path, [{"messages": [SYSTEM, *TALK]}], tokenizer)
    assert "line 1: the chat template refuses it: roles must alternate" in message


def test_without_a_template_the_remedy_is_named(tmp_path):
    message = refused(tmp_path, [{"messages": TALK}], chats.chat_tokenizer(None))
    assert "line 1: " in message and "data.chat_template" in message


@pytest.mark.parametrize("as_file", [True, False])
def test_a_configured_template_goes_before_that_of_the_tokenizer(tmp_path, as_file):
    (tmp_path / "own.jinja").write_text(chats.LLAMA3, encoding="utf-8")
    given_one = str(tmp_path / "own.jinja") if as_file else chats.LLAMA3
    for template in (None, chats.CHATML):
        tokenizer = chats.chat_tokenizer(template)
        row = examples_of(tmp_path, [{"messages": TALK}], tokenizer, chat_template=given_one).row(0)
        assert tokenizer.decode(row.ids).startswith("<s><|start_header_id|>user")
    message = refused(tmp_path, [{"messages": TALK}], tokenizer, chat_template="gone.jinja")
    assert "data.chat_template: 'gone.jinja' cannot be read (No such file" in message


@pytest.mark.parametrize("template", ["{% for turn in messages %}", "{{ messages[0].a.b }}"])
def test_a_template_that_is_wrong_is_no_traceback(tmp_path, template):
    tokenizer = chats.chat_tokenizer(template)
    message = refused(tmp_path, [{"messages": TALK}], tokenizer)
    assert "line 1: the chat template refuses it: " in message


def test_a_template_that_changes_earlier_turns_is_refused_but_for_the_last(tmp_path):
    tokenizer = chats.chat_tokenizer(chats.REASONING)
    talk = [TALK[0], {"role": "assistant", "content": "hm</think>5"}, *TALK[2:]]
    message = refused(tmp_path, [{"messages": talk}], tokenizer)
    assert "turn 2 of 'messages'" in message and "data.chat_loss=last" in message
    row = examples_of(tmp_path, [{"messages": talk}], tokenizer, chat_loss="last").row(0)
    assert tokenizer.decode(row.ids[row.answer]) == "6 → 😀<|im_end|>\n"


ROLES_ALONE = "{% for turn in messages %}<|im_start|>{{ turn.role }}<|im_end|>{% endfor %}"
MARKED_ALONE = "{% for turn in messages %}{{ turn.content if turn.role == 'user' }}{% endfor %}"
MARKED_ALONE += "{% generation %}<|im_end|>{% endgeneration %}"


@pytest.mark.parametrize(
    ("template", "role"),
    [
        (ROLES_ALONE, "assistant"),
        ("{{ 'hello' }}", "assistant"),
        ("{{ messages[0].content }}", "assistant"),
        (MARKED_ALONE, "assistant"),
        (chats.CHATML.replace("turn.content", "turn.value"), "assistant"),
        ("{{ messages[-1].content }}{% if add_generation_prompt %}:{% endif %}", "user"),
    ],
)
def test_a_template_that_does_not_use_what_turns_say_is_refused(tmp_path, template, role):
    rows = [{"messages": TALK}]
    fact = f"writes the same whatever a turn of role '{role}' says: it does not use its 'content'"
    message = refused(tmp_path, rows, chats.chat_tokenizer(template))
    assert f"line 1: the chat template of the tokenizer {fact}" in message
    assert "set data.chat_template to the file of a template that does" in message
    own = tmp_path / "own.jinja"
    own.write_text(template, encoding="utf-8")
    tokenizer = chats.chat_tokenizer(chats.CHATML)
    message = refused(tmp_path, rows, tokenizer, chat_template=str(own))
    assert f"line 1: data.chat_template: the template {fact}" in message


def test_the_first_turn_that_says_something_shows_whether_a_template_uses_it(tmp_path):
    silent = [TALK[0], {"role": "assistant", "content": " "}]
    rows = [{"messages": silent}, {"messages": TALK}]
    message = refused(tmp_path, rows, chats.chat_tokenizer(MARKED_ALONE))
    assert "line 2: the chat template" in message and "'assistant'" in message
    found = examples_of(tmp_path, rows, chats.chat_tokenizer(chats.CHATML))
    assert (len(found), found.table.left_out) == (1, 1)


def test_a_turn_that_calls_tools_need_not_show_its_content(tmp_path):
    template = chats.TOOLS.replace("turn.content or ''", "'' if turn.tool_calls else turn.content")
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}]
    talk = [TALK[0], {"role": "assistant", "content": "calling", "tool_calls": calls}]
    row = examples_of(tmp_path, [{"messages": talk}], chats.chat_tokenizer(template)).row(0)
    assert "<call>" in chats.chat_tokenizer(template).decode(row.ids[row.answer])


def test_todays_date_is_always_the_same(tmp_path):
    template = "{{ strftime_now('%d %b %Y') }}" + chats.CHATML
    row = examples_of(tmp_path, [{"messages": TALK}], chats.chat_tokenizer(template)).row(0)
    assert chats.chat_tokenizer(None).decode(row.ids).startswith("26 Jul 2024<|im_start|>")
    template = "{% set form = '%d' %}{{ strftime_now(form) }}" + chats.CHATML
    message = refused(tmp_path, [{"messages": TALK}], chats.chat_tokenizer(template))
    assert "today's date" in message


@pytest.mark.parametrize("name", chats.TEMPLATES)
def test_the_mark_that_ends_a_turn_is_known(name):
    tokenizer = chats.chat_tokenizer(chats.TEMPLATES[name])
    mark = chat.end_mark(config_load.validate({}).data, tokenizer)
    assert tokenizer.decode([mark]) == ENDS[name].strip()
