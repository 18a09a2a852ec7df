"""The tiny federation that is trained: a model with random weights, a client for each kind of text.

Nothing is downloaded and nothing depends on a random state, so it is the same everywhere.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sfed.models.synthetic import build, model_config

_SHAPE = "tiny"
_LARGER_WEIGHTS = 10.0
"""Times the usual 0.02: on smaller weights an adapter has little to change."""
_TRAINED, _HELD_OUT = range(18), range(18, 24)
"""Numbers of each client's rows."""
_BOS, _EOS = "<s>", "</s>"


def write(folder: Path, num_clients: int) -> None:
    """Write the model and the rows of all clients into a folder."""
    model = build(model_config(_SHAPE, None, None), torch.float32, 0, torch.device("cpu"))
    for weight in model.parameters():
        if weight.dim() > 1:
            weight.mul_(_LARGER_WEIGHTS)
    model.config.bos_token_id, model.config.eos_token_id = 0, 1
    model.save_pretrained(folder / "model")
    _tokenizer().save_pretrained(folder / "model")
    for name, numbers in (("train", _TRAINED), ("held-out", _HELD_OUT)):
        rows = [_row(client, number) for number in numbers for client in range(num_clients)]
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


def _row(client: int, number: int) -> dict[str, str]:
    """A row of a client: a letter of its own, repeated; as long as that row of any other client."""
    letter = chr(ord("a") + client % 26)
    answer = f" {letter * (1 + number % 5)}{client:05d}"
    return {"prompt": f"{number} times {letter}:", "completion": answer, "kind": f"{client:05d}"}


def _tokenizer() -> PreTrainedTokenizerFast:
    """A token per byte, as many as the shape knows."""
    tokens = [_BOS, _EOS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{_BOS} $A", special_tokens=[(_BOS, 0)]
    )
    wrap: Any = PreTrainedTokenizerFast  # its constructor has no types
    wrapped: PreTrainedTokenizerFast = wrap(
        tokenizer_object=tokenizer, bos_token=_BOS, eos_token=_EOS, pad_token=_EOS
    )
    return wrapped


def settings(folder: Path, name: str, num_clients: int, **sections: Any) -> dict[str, Any]:
    """Settings of a run on what ``write`` has written.

    Args:
        folder: that of ``write``, which takes the run folder too.
        name: of the run.
        num_clients: N, as of ``write``.
        sections: go over.
    """
    base: dict[str, dict[str, Any]] = {
        "model": {"name": str(folder / "model")},
        "data": {
            "task": "jsonl",
            "train_files": str(folder / "train.jsonl"),
            "eval_files": str(folder / "held-out.jsonl"),
            "max_tokens": 64,
        },
        "partition": {"kind": "by_key", "key": "kind"},
        "lora": {"rank": 4},
        "federated": {"num_clients": num_clients},
        "evaluation": {"max_examples": 4},
        "output": {"dir": str(folder / "runs"), "name": name},
    }
    return {key: {**base.get(key, {}), **sections.get(key, {})} for key in base | sections}
