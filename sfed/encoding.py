"""How a pair becomes tokens: prompt and completion, or one or two texts with their marks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from sfed.tasks import Pair, Task


class Encoded(NamedTuple):
    """The tokens of a pair."""

    ids: list[int]
    """Empty where nothing is to learn."""
    prompt_length: int
    """Leading tokens that are only read."""
    is_cut: bool
    """Whether the row had more tokens than are allowed."""


def encode(
    task: Task, max_tokens: int, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[Encoded]:
    """Yield the tokens of each pair, at most ``max_tokens``."""
    if task.is_classification:
        yield from _encode_texts(pairs, tokenizer, max_tokens)
        return
    for pair, (ids, prompt_length) in zip(
        pairs, _encode_completions(pairs, tokenizer), strict=True
    ):
        is_cut = len(ids) > max_tokens
        ids = ids[:max_tokens] if pair.completion.strip() else []
        # The first token of a row is never predicted, so it does not count as supervised.
        has_some = len(ids) > max(prompt_length, 1)
        yield Encoded(ids if has_some else [], prompt_length, is_cut)


def _encode_completions(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids with a closing eos, number of tokens that belong to the prompt alone).

    Prompt and completion are tokenised as one text, as they will be read later; a token that
    reaches into the completion belongs to it. A text that holds the marks already, as one from a
    chat template does, begins with one bos and ends with one eos all the same.
    """
    texts = [pair.prompt + pair.completion for pair in pairs]
    # verbose=False: rows that are too long are cut later, which is no news.
    encoded = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for pair, ids, offsets in zip(
        pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        end_of_prompt = len(pair.prompt)
        # Up to the first token of the completion; a closing special token has no span of its own.
        beyond = (i for i, (_, end) in enumerate(offsets) if end > end_of_prompt)
        prompt_length = next(beyond, len(offsets))
        more = _repeats(ids, bos)
        ids, prompt_length = ids[more:], prompt_length - min(more, max(prompt_length - 1, 0))
        supervised = ids[prompt_length:]
        ids = ids[: len(ids) - _repeats(supervised[::-1], eos)]
        if eos is not None and ids[-1:] != [eos]:
            ids = [*ids, eos]
        yield ids, prompt_length


def _repeats(ids: list[int], mark: int | None) -> int:
    """How often a mark stands at the start of some tokens, beyond once."""
    count = next((i for i, one in enumerate(ids) if one != mark), len(ids))
    return max(count - 1, 0)


def _encode_texts(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[Encoded]:
    """Yield the tokens with the tokenizer's own marks, the second text as what is not only read.

    Tokenizers without a separator, such as LLaMA's, read both texts as one, a line each. The
    longer of two texts is cut first.
    """
    firsts = [pair.prompt for pair in pairs]
    seconds: list[str] | None = [pair.completion for pair in pairs]
    if not any(pair.completion for pair in pairs):
        seconds = None
    elif tokenizer.sep_token_id is None:
        firsts, seconds = [f"{pair.prompt}\n{pair.completion}" for pair in pairs], None
    encoded = tokenizer(
        firsts, seconds, truncation=True, max_length=max_tokens, return_attention_mask=False
    )
    for number, ids in enumerate(encoded["input_ids"]):
        ids, of_text = _without_repeated_marks(ids, encoded.sequence_ids(number))
        is_cut = bool(encoded.encodings[number].overflowing)
        yield Encoded(ids, of_text.index(1) if 1 in of_text else len(ids), is_cut)


def _without_repeated_marks(
    ids: list[int], of_text: list[int | None]
) -> tuple[list[int], list[int | None]]:
    """Take the marks out of the texts with which the tokenizer opens and closes them itself.

    Args:
        ids: of a row.
        of_text: which text each token is of; None for the tokenizer's own marks.
    """
    kept = set(range(len(ids)))
    for ahead in (range(len(ids)), range(len(ids) - 1, -1, -1)):
        first, marks = ahead[0] if ids else 0, set[int]()
        for i in ahead:
            if of_text[i] is None:  # the mark beside a text, and the outermost one
                marks = {ids[i], ids[first]} if of_text[first] is None else {ids[i]}
            elif ids[i] in marks:
                kept.discard(i)
            else:
                marks = set()
    return [ids[i] for i in sorted(kept)], [of_text[i] for i in sorted(kept)]
