"""How pairs become tokens: marks at both ends, what is learned, and where a sequence is cut."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from sfed.data.forms.pair import Pair


class Encoded(NamedTuple):
    """The tokens of a pair."""

    ids: list[int]
    """Empty where nothing is to learn."""
    prompt_length: int
    """Leading tokens that are only read."""
    gaps: list[int]
    """First token, and the one after the last, of each stretch behind the prompt that is only read
    too, one after the other."""
    whole_length: int
    """Tokens of the row before it was truncated; 0 where nothing is to learn anyway."""
    lost: int
    """Tokens to learn that truncation has taken away."""


def learned_texts(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[Encoded]:
    """Yield the tokens of pairs whose completion is learned, at most ``max_tokens`` of each."""
    of_pairs = _conversations if any(pair.is_chat for pair in pairs) else _completions
    for pair, whole in zip(pairs, of_pairs(pairs, tokenizer), strict=True):
        if not pair.completion.strip():
            yield whole._replace(ids=[], whole_length=0)
            continue
        cut = _truncated(whole, max_tokens)
        is_learned = _learned(cut) > 0
        yield cut._replace(ids=cut.ids if is_learned else [], lost=_learned(whole) - _learned(cut))


def _learned(row: Encoded) -> int:
    """Tokens that are learned; the first of a row is never predicted, so it does not count."""
    read = sum(row.gaps[1::2]) - sum(row.gaps[::2])
    return max(0, len(row.ids) - max(row.prompt_length, 1) - read)


def _truncated(row: Encoded, max_tokens: int) -> Encoded:
    gaps = [min(edge, max_tokens) for edge in row.gaps]
    edges = zip(gaps[::2], gaps[1::2], strict=True)
    kept = [edge for start, end in edges if start < end for edge in (start, end)]
    return row._replace(ids=row.ids[:max_tokens], gaps=kept)


def _conversations(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> Iterator[Encoded]:
    """As ``_completions``, for pairs of which some are conversations."""
    others = _completions([pair for pair in pairs if not pair.is_chat], tokenizer)
    encoded = tokenizer(
        [pair.prompt + pair.completion for pair in pairs if pair.is_chat],
        add_special_tokens=False,  # as the template is used for prompts
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    of_chats = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    for pair in pairs:
        if not pair.is_chat:
            yield next(others)
            continue
        ids, places = next(of_chats)
        learned = _is_learned(np.array(places).reshape(-1, 2), pair)
        prompt_length = int(learned.argmax()) if learned.any() else len(ids)
        edges = np.diff(np.concatenate([[True], learned[prompt_length:], [True]]))
        gaps = (np.flatnonzero(edges) + prompt_length).tolist()
        yield Encoded(ids, prompt_length, gaps, len(ids), 0)


def _is_learned(places: NDArray[np.int64], pair: Pair) -> NDArray[np.bool_]:
    """Which tokens reach into what is learned of a pair.

    Args:
        places: (tokens, 2) first character of each, and the one after its last.
        pair: with prompt and completion.
    """
    start = len(pair.prompt)
    characters = np.arange(start + len(pair.completion)) >= start
    for first, stop in pair.read:
        characters[start + first : start + stop] = False
    # A tokenizer that trims its offsets gives a token of nothing but space no width: the space
    # stands before that place.
    firsts, ends = places.T
    firsts = np.maximum(np.minimum(firsts, ends - 1), 0)
    before = np.concatenate([[0], np.cumsum(characters)])
    return np.asarray(before[ends] > before[firsts])


def _completions(pairs: list[Pair], tokenizer: PreTrainedTokenizerFast) -> Iterator[Encoded]:
    """Yield the tokens with a closing eos, and how many of them belong to the prompt alone.

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
        yield Encoded(ids, prompt_length, [], len(ids), 0)


def prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerFast, *, is_chat: bool) -> list[int]:
    """The tokens of a prompt that is to be answered, as they begin a row in training.

    Args:
        prompt: as it is written; empty where a text is begun.
        tokenizer: of the model.
        is_chat: whether a chat template has set all marks.

    Returns:
        Tokens without a closing mark; at least one, which is bos or eos for an empty prompt.
    """
    encoded = tokenizer(
        prompt,
        add_special_tokens=not is_chat,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    ids, offsets = list(encoded["input_ids"]), encoded["offset_mapping"]
    if not is_chat:
        last = max((i for i, (start, end) in enumerate(offsets) if end > start), default=-1)
        opening = next((i for i, (start, end) in enumerate(offsets) if end > start), len(ids))
        ids = ids[: last + 1] if prompt else ids[: min(opening, 1)]
        ids = ids[_repeats(ids, tokenizer.bos_token_id) :]
    marks = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
    return ids or [next(mark for mark in marks if mark is not None)]


def _repeats(ids: list[int], mark: int | None) -> int:
    """How often a mark stands at the start of some tokens, beyond once."""
    count = next((i for i, one in enumerate(ids) if one != mark), len(ids))
    return max(count - 1, 0)


def classified_texts(
    pairs: list[Pair], tokenizer: PreTrainedTokenizerFast, max_tokens: int
) -> Iterator[Encoded]:
    """Yield the tokens with the tokenizer's own marks, the second text as what is not only read.

    Tokenizers without a separator, such as LLaMA's, read both texts as one, a line each. The
    longer of two texts is cut first. Nothing can be learned from texts that are all empty, whether
    the tokenizer adds marks of its own or none.
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
        prompt_length, whole_length = of_text.index(1) if 1 in of_text else len(ids), len(ids)
        if encoded.encodings[number].overflowing:
            second = None if seconds is None else seconds[number]
            whole = tokenizer(firsts[number], second, return_attention_mask=False, verbose=False)
            whole_length = len(
                _without_repeated_marks(whole["input_ids"], whole.sequence_ids(0))[0]
            )
        one, pair = Encoded(ids, prompt_length, [], whole_length, 0), pairs[number]
        has_text = bool(pair.prompt.strip() or pair.completion.strip())
        yield one if has_text else one._replace(ids=[], whole_length=0)


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
