"""Tests of reading PEFT folders: what is no plain LoRA adapter is refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sfed.federated.loaded import spec_of
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.layout import Piece
from sfed.utils.errors import UserError
from tests.support import tiny


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base") / "model")


def attached(base: Path, spec: LoraSpec) -> Adapters:
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    return adapters.attach(model, spec)


@pytest.fixture
def folder(base: Path, tmp_path: Path) -> Path:
    own = attached(base, LoraSpec(4, 1.5, 0.1, ("q_proj", "layers.1.mlp.down_proj"), str(base)))
    own.peft_form.write(tmp_path, torch.arange(float(own.layout.size)))
    return tmp_path


def change(folder: Path, **settings: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


def test_what_was_written_is_read_back_bit_by_bit(base: Path, folder: Path):
    spec = spec_of(folder)
    assert (spec.lora_rank, spec.lora_scaling, spec.dropout) == (4, 1.5, 0.0)
    assert spec.base_name == str(base)
    own = attached(base, spec)
    assert len(own.layers) == 3
    assert torch.equal(own.peft_form.read(folder), torch.arange(float(own.layout.size)))


def test_a_smaller_rank_of_a_layer_ends_in_zeros(base: Path, folder: Path):
    """In the last rows of A and the last columns of B of that layer alone."""
    before, file = spec_of(folder), folder / "adapter_model.safetensors"
    own, tensors = attached(base, before), load_file(file)
    small = "model.layers.1.mlp.down_proj"
    for name, tensor in tensors.items():
        if small in name:
            tensors[name] = (tensor[:3] if "lora_A" in name else tensor[:, :3]).contiguous()
    save_file(tensors, file)
    with pytest.raises(UserError, match=r"and r is 4"):
        spec_of(folder)
    change(folder, rank_pattern={small: 3}, alpha_pattern={small: 4.5})
    assert spec_of(folder) == before
    found, whole = own.peft_form.read(folder), torch.arange(float(own.layout.size))
    for piece in own.layout.pieces:
        factor, expected = piece.of(found[None])[0], piece.of(whole[None])[0].clone()
        if piece.layer == small:
            (expected[3:] if piece.factor == "A" else expected[:, 3:]).zero_()
        assert torch.equal(factor, expected)


def test_nothing_but_the_rank_of_a_factor_may_be_smaller():
    shapes = {"A": (4, 6), "B": (6, 4), "head": (4, 6)}
    pieces = {factor: Piece("x", factor, shape, 0) for factor, shape in shapes.items()}
    asked = [(4, 6), (3, 6), (4, 5), (6, 4), (6, 3), (5, 4), (5, 6), (6, 5), (4,), (4, 6, 1)]
    taken = {key: [s for s in asked if piece.has_room_for(s)] for key, piece in pieces.items()}
    assert taken == {"A": [(4, 6), (3, 6)], "B": [(6, 4), (6, 3)], "head": [(4, 6)]}


def test_gamma_follows_rslora(folder: Path):
    change(folder, use_rslora=True)
    assert spec_of(folder).lora_scaling == 6.0 / 2.0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"bias": "all"}, "bias = 'all' is not supported"),
        ({"use_dora": True}, "use_dora = True is not supported"),
        ({"r": 0}, "r = 0 is no rank"),
        ({"r": 999_999_999}, r"has the shape \[4, 32\] and r is 999999999"),
        ({"base_model_name_or_path": None}, "does not name the base model"),
    ],
)
def test_an_adapter_that_is_not_plain_is_refused_by_name(
    folder: Path, settings: dict[str, object], message: str
):
    change(folder, **settings)
    with pytest.raises(UserError, match=message):
        spec_of(folder)


@pytest.mark.parametrize("name", ["adapter_config.json", "adapter_model.safetensors"])
@pytest.mark.parametrize("content", [None, b"", b"[1]"])
def test_a_file_that_is_none_is_refused(folder: Path, name: str, content: bytes | None):
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        spec_of(folder)


def test_tensors_that_have_no_place_are_refused(base: Path, folder: Path):
    own, file = attached(base, spec_of(folder)), folder / "adapter_model.safetensors"
    tensors = load_file(file)
    first = next(iter(tensors))
    for changed, message in [
        ({**tensors, first: torch.zeros(2, 2)}, r"is of shape \(2, 2\); on this base model"),
        ({**tensors, first: torch.zeros(5, 32)}, r"is of shape \(5, 32\); on this base model"),
        ({**tensors, first: torch.zeros(4, 31)}, r"is of shape \(4, 31\); on this base model"),
        ({k: v for k, v in tensors.items() if k != first}, "is missing"),
        (
            {**tensors, "base_model.model.lm_head.lora_A.weight": torch.zeros(4, 32)},
            "have no place",
        ),
    ]:
        save_file(changed, file)
        with pytest.raises(UserError, match=message):
            own.peft_form.read(folder)


def test_a_weight_that_two_layers_share_is_not_merged(tmp_path: Path):
    base = tiny.save_model(tmp_path / "tied")
    own = attached(base, LoraSpec(4, 1.5, 0.0, ("lm_head",), str(base)))
    own.peft_form.write(tmp_path / "adapter", torch.ones(own.layout.size))
    model = AutoModelForCausalLM.from_pretrained(base)
    with pytest.raises(UserError, match=r"--merge: the weight of lm_head is .*tie_word_embeddings"):
        adapters.merged(model, tmp_path / "adapter")
