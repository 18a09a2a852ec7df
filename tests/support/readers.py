"""The rules by which other software reads an adapter's folder, each as it is documented or coded.

``READERS`` maps a name to a function that returns what the software adds to the weight of each
layer, by the layer's name in transformers; it raises ``Refused`` where the software would refuse.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

Deltas = dict[str, torch.Tensor]
VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What --max-lora-rank may be."""
_LLAMA_LAYERS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "embed_tokens", "lm_head"),
}
"""The layers of LLaMA that vLLM and SGLang adapt, packed ones by their parts too."""


class Refused(Exception):  # noqa: N818  (as the software does)
    """The software does not read this adapter."""


def _read(folder: Path) -> tuple[dict[str, Any], Deltas]:
    settings = json.loads((folder / "adapter_config.json").read_text())
    return settings, load_file(folder / "adapter_model.safetensors")


def _factors(tensors: Deltas) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """A and B of each layer; other names are refused."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None:
            raise Refused(f"unexpected tensor {name}")
        layers.setdefault(match[1], {})[match[2]] = tensor
    return {name: (some["A"], some["B"]) for name, some in layers.items()}


def _deltas(tensors: Deltas, scaling: float) -> Deltas:
    return {name: scaling * (b @ a) for name, (a, b) in _factors(tensors).items()}


def peft(folder: Path) -> Deltas:
    """PEFT: lora_alpha / r, or with use_rslora lora_alpha / sqrt(r); patterns go over."""
    settings, tensors = _read(folder)
    root = math.sqrt(settings["r"]) if settings["use_rslora"] else settings["r"]
    if settings["rank_pattern"] or settings["alpha_pattern"] or settings["use_dora"]:
        raise Refused("this test knows no patterns")
    return _deltas(tensors, settings["lora_alpha"] / root)


def vllm(folder: Path, max_lora_rank: int | None = None) -> Deltas:
    """vLLM 0.32 (lora/peft_helper.py, lora/lora_model.py)."""
    settings, tensors = _read(folder)
    limit = min(rank for rank in VLLM_RANKS if rank >= settings["r"])
    limit = limit if max_lora_rank is None else max_lora_rank
    unknown = {"bias": "none", "use_dora": False, "lora_bias": False, "layer_replication": None}
    if any(settings.get(key, value) != value for key, value in unknown.items()):
        raise Refused("an unsupported feature")
    if isinstance(settings["init_lora_weights"], str):
        raise Refused("an init that changes the base model")
    kept = set(settings["modules_to_save"] or ())
    if kept - {"classifier", "score"}:
        raise Refused(f"modules_to_save {kept}")
    if settings["r"] > limit:
        raise Refused(f"rank {settings['r']} above max_lora_rank {limit}")
    layers = {n: t for n, t in tensors.items() if n.split(".")[-2] not in kept}
    for name in _factors(layers):
        if name.rpartition(".")[2] not in _LLAMA_LAYERS:
            raise Refused(f"unexpected layer {name}")
    scaling = settings["lora_alpha"] / settings["r"]
    if settings["use_rslora"]:
        scaling = settings["lora_alpha"] / math.sqrt(settings["r"])
    return _deltas(layers, scaling)


def sglang(folder: Path) -> Deltas:
    """SGLang: lora_alpha / r whatever use_rslora says; the target modules are a list of names."""
    settings, tensors = _read(folder)
    if not isinstance(settings["target_modules"], list):
        raise Refused("target_modules is no list of names")
    if unknown := {name.rpartition(".")[2] for name in settings["target_modules"]} - _LLAMA_LAYERS:
        raise Refused(f"target modules {unknown}")
    return _deltas(tensors, settings["lora_alpha"] / settings["r"])


def llama_cpp(folder: Path) -> Deltas:
    """llama.cpp's convert_lora_to_gguf.py and loader: adapter.lora.alpha / r, without rsLoRA."""
    settings, tensors = _read(folder)
    alpha, factors = float(settings["lora_alpha"]), _factors(tensors)
    deltas = {}
    for name, (a, b) in factors.items():
        if a.shape[0] != b.shape[1]:
            raise Refused(f"{name}: two ranks")
        deltas[name] = alpha / a.shape[0] * (b @ a)
    return deltas


READERS: dict[str, Callable[[Path], Deltas]] = {
    "peft": peft,
    "vllm": vllm,
    "sglang": sglang,
    "llama.cpp": llama_cpp,
}
