"""How a pair becomes tokens: prompt and completion, or one or two texts with their marks."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerFast

from sfed.tasks import Pair, Task


def encode(
    task: Task, max_tokens: int, pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids, leading tokens that are only read); no ids where nothing is to learn."""
    if task.is_classification:
        yield from _encode_texts(pairs, tokenizer, max_tokens)
        return
    for pair, (ids, prompt_length) in zip(
        pairs, _encode_completions(pairs, tokenizer), strict=True
    ):
        ids = ids[:max_tokens] if pair.completion.strip() else []
        # The first token of a row is never predicted, so it does not count as supervised.
        yield ids if len(ids) > max(prompt_length, 1) else [], prompt_length


def _encode_completions(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids with a closing eos, number of tokens that belong to the prompt alone).

    Prompt and completion are tokenised as one text, as they will be read later; a token that
    reaches into the completion belongs to it.
    """
    texts = [pair.prompt + pair.completion for pair in pairs]
    # verbose=False: rows that are too long are cut below, which is no news.
    encoded = tokenizer(
        texts, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    for pair, ids, offsets in zip(
        pairs, encoded["input_ids"], encoded["offset_mapping"], strict=True
    ):
        end_of_prompt = len(pair.prompt)
        # Up to the first token of the completion; a closing special token has no span of its own.
        beyond = (i for i, (_, end) in enumerate(offsets) if end > end_of_prompt)
        prompt_length = next(beyond, len(offsets))
        if tokenizer.eos_token_id is not None and ids[-1:] != [tokenizer.eos_token_id]:
            ids = [*ids, tokenizer.eos_token_id]
        yield ids, prompt_length


def _encode_texts(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[tuple[list[int], int]]:
    """Yield (token ids with the tokenizer's own marks, tokens before the second text).

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
        of_text = encoded.sequence_ids(number)
        yield ids, of_text.index(1) if 1 in of_text else len(ids)
