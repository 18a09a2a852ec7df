"""What the header of a run says of its model."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from sfed.federated.log import header


class OtherForCausalLM:
    """A model of some class."""


@pytest.mark.parametrize(
    ("asked", "used", "said"),
    [
        ("auto", "sdpa", "sdpa"),
        ("auto", "eager", "eager (OtherForCausalLM has no sdpa in transformers)"),
        ("eager", "eager", "eager"),
        ("flash_attention_2", "flash_attention_2", "flash_attention_2"),
    ],
)
def test_the_attention_is_stated_and_why_it_is_not_the_usual_one(
    asked: str, used: str, said: str
) -> None:
    run: Any = SimpleNamespace(
        config=SimpleNamespace(model=SimpleNamespace(attention=asked)),
        backbone=SimpleNamespace(attention=used, model=OtherForCausalLM()),
    )
    assert header._attention(run) == said


def test_the_adapted_layers_are_stated() -> None:
    layers = {f"model.layers.{i}.attn.{name}": None for i in range(2) for name in ("v", "q")}
    run: Any = SimpleNamespace(adapters=SimpleNamespace(layers=layers))
    assert header._adapted(run) == "4 layers (q, v)"
