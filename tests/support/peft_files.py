"""Folders of PEFT adapters with made-up tensors, written without PEFT."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

SETTINGS = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 8,
    "target_modules": ["q_proj"],
    "base_model_name_or_path": "meta/llama",
}
FACTORS = {"q_proj.lora_A.weight": (2, 5), "q_proj.lora_B.weight": (7, 2)}


def save(folder: Path, shapes=None, *, dtype=np.float32, files=None, **over) -> Path:
    """Write an adapter of one layer, of rank 2 and gamma 4."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps({**SETTINGS, **over}))
    tensors = {
        f"base_model.model.layer.{name}": np.zeros(shape, dtype)
        for name, shape in (FACTORS if shapes is None else shapes).items()
    }
    save_file(tensors, folder / "adapter_model.safetensors")
    for name, text in (files or {}).items():
        (folder / name).write_text(text)
    return folder
