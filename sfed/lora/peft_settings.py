"""Reads what ``adapter_config.json`` of a PEFT folder says, of sfed or of stock PEFT."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from sfed.lora.adapters import ADAPTER_SETTINGS, ADAPTER_WEIGHTS, LoraSpec
from sfed.utils import json_text
from sfed.utils.errors import UserError
from sfed.utils.text import one_line, shown

_PREFIX, _OF_A = "base_model.model.", ".lora_A.weight"
# What changes the meaning of the factors, or of the base model, and is not computed here.
_NOT_PLAIN = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "megatron_config",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
)
# These change the weights of the base model when PEFT loads an adapter.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq")


def spec_of(folder: Path) -> LoraSpec:
    """How an adapter is attached to its base model, without dropout.

    The layers are those of which the file holds factors, by their full names.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: where a file cannot be read, or the adapter is no plain LoRA adapter.
    """
    path = folder / ADAPTER_SETTINGS
    try:
        settings = json_text.read(path)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{path} holds {type(settings).__name__}, not an object")
    if problem := _not_plain(settings):
        raise UserError(f"{path}: {problem}; sfed reads plain LoRA adapters")
    rank, alpha = _number(settings, "r", path), _number(settings, "lora_alpha", path)
    if not rank.is_integer():
        raise UserError(f"{path}: r is {shown(settings['r'])}, not a whole number")
    divisor = math.sqrt(rank) if settings.get("use_rslora") else rank
    base = settings.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise UserError(f"{path}: base_model_name_or_path is {shown(base)}; name the base model")
    layers = _layers(folder / ADAPTER_WEIGHTS, int(rank))
    return LoraSpec(int(rank), alpha / divisor, 0.0, layers, base)


def _not_plain(settings: Mapping[str, Any]) -> str:
    kind, bias = settings.get("peft_type", "LORA"), settings.get("bias", "none")
    if kind != "LORA":
        return f"peft_type is {shown(kind)}"
    if bias != "none":
        return f"bias is {shown(bias)}"
    for key in _NOT_PLAIN:
        if settings.get(key):
            return f"{key} is {shown(settings[key])}"
    init = settings.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_CHANGES_BASE):
        return f"init_lora_weights is {shown(init)}, which changes the base model"
    return ""


def _number(settings: Mapping[str, Any], key: str, path: Path) -> float:
    value = settings.get(key)
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 < float(value or 0) < 1e9:
        raise UserError(f"{path}: {key} is {shown(value)}, not a number above 0")
    return float(value or 0)


def _layers(file: Path, rank: int) -> tuple[str, ...]:
    """The layers of which a file holds factors, all of one rank."""
    try:
        with safe_open(file, framework="pt") as opened:
            shapes = {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise UserError(f"{file} cannot be read ({one_line(error)})") from None
    of_a = {n: s for n, s in shapes.items() if n.startswith(_PREFIX) and n.endswith(_OF_A)}
    if not of_a:
        raise UserError(f"{file} holds no factors of linear layers")
    for name, shape in of_a.items():
        if shape[:1] != [rank]:
            raise UserError(f"{file}: {name} has the shape {shape} and r is {rank}")
    return tuple(sorted(name.removeprefix(_PREFIX).removesuffix(_OF_A) for name in of_a))
