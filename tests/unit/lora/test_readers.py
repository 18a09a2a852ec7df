"""What other software makes of an exported folder by its own rules is gamma B A of each layer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from tests.support import gguf_files, tiny
from tests.support.readers import READERS, VLLM_RANKS, Refused, llama_cpp, peft, vllm

GAMMAS = [np.sqrt(8 / 4) * 2, 0.1, 16.0]
"""One is that of SFed-LoRA for N = 8, r = 4."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("base") / "model", hidden=64)


def exported(
    base: Path, folder: Path, gamma: float, rank: int = 4, targets: Any = "all-linear"
) -> tuple[Adapters, torch.Tensor]:
    """An adapter with random factors, in the folder."""
    model = AutoModelForCausalLM.from_pretrained(base).requires_grad_(False)
    attached = adapters.attach(model, LoraSpec(rank, gamma, 0.1, targets, "org/model"))
    row = torch.randn(attached.layout.size, generator=torch.Generator().manual_seed(3))
    attached.peft_form.write(folder, row)
    return attached, row


def expected(attached: Adapters, row: torch.Tensor, gamma: float) -> dict[str, torch.Tensor]:
    pieces = {
        (piece.layer, piece.factor): piece.of(row[None])[0] for piece in attached.layout.pieces
    }
    return {layer: gamma * pieces[layer, "B"] @ pieces[layer, "A"] for layer in attached.layers}


@pytest.mark.parametrize("gamma", GAMMAS)
@pytest.mark.parametrize("reader", READERS)
def test_each_reader_adds_gamma_b_a_to_each_adapted_layer(
    base: Path, tmp_path: Path, reader: str, gamma: float
):
    attached, row = exported(base, tmp_path, gamma)
    found, wanted = READERS[reader](tmp_path), expected(attached, row, gamma)
    assert found.keys() == wanted.keys()
    for layer, delta in wanted.items():
        torch.testing.assert_close(found[layer], delta, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("reader", READERS)
def test_a_pattern_of_layers_is_written_as_names(base: Path, tmp_path: Path, reader: str):
    pattern = r".*\.1\.self_attn\.[qv]_proj"
    attached, _ = exported(base, tmp_path, 2.0, targets=pattern)
    assert READERS[reader](tmp_path).keys() == attached.layers.keys()
    assert len(attached.layers) == 2


@pytest.mark.parametrize("rank", VLLM_RANKS[:4])
def test_vllm_reads_a_rank_up_to_its_own_limit_and_no_further(
    base: Path, tmp_path: Path, rank: int
):
    attached, _ = exported(base, tmp_path, 2.0, rank=rank)
    assert vllm(tmp_path, rank).keys() == attached.layers.keys()
    if rank > 1:
        with pytest.raises(Refused, match="above max_lora_rank"):
            vllm(tmp_path, rank - 1)


def test_a_reader_without_rslora_would_be_found_wrong(base: Path, tmp_path: Path):
    """The folder that the rule is for: gamma as lora_alpha / sqrt(r)."""
    gamma = 2.0
    attached, row = exported(base, tmp_path, gamma)
    path = tmp_path / "adapter_config.json"
    settings = json.loads(path.read_text()) | {"use_rslora": True, "lora_alpha": gamma * 4**0.5}
    path.write_text(json.dumps(settings))
    wanted = expected(attached, row, gamma)
    for reader, is_right in ((peft, True), (vllm, True), (llama_cpp, False)):
        found = reader(tmp_path)
        assert is_right == all(torch.allclose(found[k], wanted[k], atol=1e-5) for k in wanted)


def test_no_tensor_but_factors_is_in_the_folder_of_a_language_model(base: Path, tmp_path: Path):
    exported(base, tmp_path, 2.0)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["modules_to_save"] is None and settings["bias"] == "none"
    assert not settings["use_dora"] and not settings["use_rslora"]
    assert isinstance(settings["lora_alpha"], int)  # some readers ask for one


def test_the_order_of_rows_of_q_and_k_is_that_of_llama_cpp():
    """transformers pairs entry i of a head with i + half of it; llama.cpp pairs 2i with 2i + 1."""
    heads, width = 3, 8
    rows = np.arange(heads * width)
    moved = gguf_files.in_order_of_llama_cpp(rows[:, None], heads)[:, 0].reshape(heads, width)
    for head, entries in enumerate(moved):
        first = head * width
        for i in range(width // 2):
            assert entries[2 * i : 2 * i + 2].tolist() == [first + i, first + i + width // 2]
