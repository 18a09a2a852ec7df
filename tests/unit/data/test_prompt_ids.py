"""Tests of the tokens of a prompt that is to be answered: those with which a row of it begins."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import processors
from transformers import PreTrainedTokenizerFast

from sfed.data.forms import encode
from sfed.data.forms.pair import Pair
from tests.support import chats
from tests.support.tiny import ALPHABET, byte_tokenizer

MARKS = {"none": "$A", "bos": "<s> $A", "bos and eos": "<s> $A </s>", "eos": "$A </s>"}


def tokenizer(marks: str) -> PreTrainedTokenizerFast:
    inner = byte_tokenizer(["<s>", "</s>", *ALPHABET])
    inner.post_processor = processors.TemplateProcessing(
        single=MARKS[marks], special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")


TOKENIZERS = {marks: tokenizer(marks) for marks in MARKS}


@pytest.mark.parametrize("marks", MARKS)
@given(prompt=st.text(min_size=1), completion=st.text(min_size=1).filter(str.strip))
def test_a_prompt_has_the_tokens_with_which_its_row_begins(
    marks: str, prompt: str, completion: str
):
    [row] = encode.learned_texts([Pair(prompt, completion)], TOKENIZERS[marks], 10_000)
    found = encode.prompt_ids(prompt, TOKENIZERS[marks], is_chat=False)
    assert found == row.ids[: row.prompt_length]


@pytest.mark.parametrize("marks", MARKS)
def test_a_text_that_is_begun_starts_with_one_mark(marks: str):
    [first] = encode.prompt_ids("", TOKENIZERS[marks], is_chat=False)
    assert first == (1 if marks == "eos" else 0)


def test_marks_that_a_text_holds_already_are_not_doubled():
    ids = encode.prompt_ids("<s>a", TOKENIZERS["bos"], is_chat=False)
    assert ids.count(0) == 1 and len(ids) == 2


def test_a_template_has_set_all_marks():
    talker = chats.chat_tokenizer(chats.LLAMA3)
    turns = [{"role": "user", "content": "a"}]
    text = talker.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
    ids = talker.apply_chat_template(turns, add_generation_prompt=True, return_dict=True)
    assert encode.prompt_ids(text, talker, is_chat=True) == ids["input_ids"]
