"""What the tokens of a text depend on in a tokenizer; calls that leave it as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from transformers import PreTrainedTokenizerFast

# Settings of the latest call, not of the vocabulary: every call sets them anew.
_CALL_SETTINGS = {"truncation": None, "padding": None}
_MARKS = ("bos_token_id", "eos_token_id", "sep_token_id", "cls_token_id", "pad_token_id")


def identity_of(tokenizer: PreTrainedTokenizerFast) -> str:
    """All of a tokenizer that the tokens of a text depend on, as JSON.

    What earlier calls have set does not count, because every call sets it anew.
    """
    backend = {**json.loads(tokenizer.backend_tokenizer.to_str()), **_CALL_SETTINGS}
    facts = {
        "backend": backend,
        "class": type(tokenizer).__qualname__,
        "marks": [getattr(tokenizer, name) for name in _MARKS],
        "truncation_side": tokenizer.truncation_side,
        "split_special_tokens": tokenizer.split_special_tokens,
        "versions": [version("tokenizers"), version("transformers")],
    }
    return json.dumps(facts, sort_keys=True)


@contextmanager
def unchanged(tokenizer: PreTrainedTokenizerFast) -> Iterator[None]:
    """Give a tokenizer back the settings of its backend that calls within change."""
    backend = tokenizer.backend_tokenizer
    truncation, padding = backend.truncation, backend.padding
    try:
        yield
    finally:
        if truncation is None:
            backend.no_truncation()
        else:
            backend.enable_truncation(**truncation)
        if padding is None:
            backend.no_padding()
        else:
            backend.enable_padding(**padding)
