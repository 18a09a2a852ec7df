"""Autograd and whole runs on kernels of Triton, interpreted, beside operations of torch."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from sfed.kernels.choice import PLAIN, Kernels, choose
from sfed.lora import ops
from sfed.lora.hf_blocks import patch_blocks
from tests.support import interpreter, runs, tiny

interpreter.require()

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "num_hidden_layers": 2,
    "vocab_size": 30,
}


@pytest.fixture(scope="module")
def fused() -> Kernels:
    return choose("triton", CPU, torch.float32)


def leaves(*shapes: tuple[int, ...]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator).requires_grad_() for shape in shapes]


def test_the_gradients_of_swiglu_are_those_of_autograd(fused: Kernels) -> None:
    gate, up = leaves((2, 5, 7), (2, 5, 7))
    for kernels in (fused, PLAIN):
        product = ops.swiglu(gate, up, kernels)
        recipe = ops.recipe_of(product)
        assert recipe is not None
        assert torch.equal(recipe.make(*recipe.inputs), product)
        found = torch.autograd.grad(product.square().sum(), (gate, up))
        plain = torch.nn.functional.silu(gate) * up
        expected = torch.autograd.grad(plain.square().sum(), (gate, up))
        torch.testing.assert_close(product, plain)
        torch.testing.assert_close(found, expected)


def test_the_gradients_of_the_rotary_embedding_are_those_of_autograd(fused: Kernels) -> None:
    q, k, angles = leaves((2, 5, 3, 8), (2, 5, 1, 8), (2, 5, 4))
    cos, sin = (of(angles.detach()).repeat(1, 1, 2) for of in (torch.cos, torch.sin))
    weights = torch.randn(2, 3, 5, 8)  # heads before tokens, as attention has them

    def plain(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.chunk(2, dim=-1)
        return x * cos.unsqueeze(2) + torch.cat((-x2, x1), dim=-1) * sin.unsqueeze(2)

    for kernels in (fused, PLAIN):
        for one, other in zip(ops.rotate(q, k, cos, sin, kernels), map(plain, (q, k)), strict=True):
            torch.testing.assert_close(one, other)
            of = q if other.shape == q.shape else k
            pair = [
                torch.autograd.grad((t.transpose(1, 2) * weights).sum(), of) for t in (one, other)
            ]
            torch.testing.assert_close(*pair)


@pytest.mark.parametrize("family", [LlamaForCausalLM, Qwen3ForCausalLM])
def test_a_model_gives_the_losses_and_gradients_of_its_own_modules(
    family: type, fused: Kernels
) -> None:
    torch.manual_seed(0)
    config = {LlamaForCausalLM: LlamaConfig, Qwen3ForCausalLM: Qwen3Config}[family](**SIZES)
    model = family(config).eval()
    patched = copy.deepcopy(model)
    patch_blocks(patched, fused)
    ids = torch.randint(0, 30, (3, 6))
    embedded = [
        one.get_input_embeddings()(ids).detach().requires_grad_() for one in (model, patched)
    ]
    losses = [
        one.requires_grad_(False)(inputs_embeds=x, labels=ids).loss
        for one, x in zip((model, patched), embedded, strict=True)
    ]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    torch.testing.assert_close(embedded[1].grad, embedded[0].grad, rtol=1e-4, atol=1e-6)


def settings(folder: Path, out: Path, kernels: str, **train: Any) -> dict[str, Any]:
    return tiny.settings(
        folder,
        federated={"num_clients": 2, "num_rounds": 2, "clients_per_pass": 2},
        train={"local_steps": 2, "batch_size": 1, "lr": 1e-2, "kernels": kernels, **train},
        lora={"rank": 4, "dropout": 0.2},
        evaluation={"every_rounds": 2, "max_examples": 1},
        output={"dir": str(out), "name": kernels, "report": False},
    )


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_on_kernels_of_triton_has_the_losses_of_torch(
    tiny_folder: Path, tmp_path: Path
) -> None:
    """With weight decay, LoRA+, clipping and dropout; two rounds, so that moments count."""
    train = {"weight_decay": 0.1, "loraplus_ratio": 4.0, "max_grad_norm": 0.5}
    found = [
        runs.run(1, settings(tiny_folder, tmp_path, kernels, **train))
        for kernels in ("torch", "triton")
    ]
    by_torch, by_triton = map(runs.rounds, found)
    for one, other in zip(by_torch, by_triton, strict=True):
        for key in ("eval/loss", "eval/personal_loss", "eval/global_loss", "train/loss"):
            if one.get(key) is not None:
                assert other[key] == pytest.approx(one[key], abs=1e-5), key
    assert by_torch[-1]["eval/personal_loss"] < by_torch[0]["eval/personal_loss"] - 0.01
    difference = runs.relative_difference(*map(runs.adapters, found))
    assert 0.0 < difference < 1e-4
    resolved = [json.loads((one / "config.json").read_text())["resolved"] for one in found]
    assert set(resolved[0]["kernels"].values()) == {"torch"}
    assert set(resolved[1]["kernels"].values()) == {"triton"}
