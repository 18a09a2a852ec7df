"""The DeepSpeed configuration of a frozen backbone; DeepSpeed itself is not needed for it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from sfed.config import Config
from sfed.shape import auto_class


def deepspeed_settings(
    config: Config, model_config: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, Any]:
    """Build the DeepSpeed configuration: our defaults, then the user's raw keys over them.

    DeepSpeed's own defaults keep everything gathered for any model below a billion parameters, so
    the bounds follow the model's size: at most about three layers are gathered at a time.
    """
    with torch.device("meta"):
        model = auto_class(config).from_config(model_config)
    total = sum(parameter.numel() for parameter in model.parameters())
    layer = total // max(1, getattr(model_config, "num_hidden_layers", 1))
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": 3 * layer,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": layer,
        "stage3_param_persistence_threshold": min(100_000, total // 1000),
    }
    if config.backbone.offload == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": torch.cuda.is_available()}
    settings = {
        "train_micro_batch_size_per_gpu": 1,  # demanded by DeepSpeed, used for nothing here
        "bf16": {"enabled": dtype == torch.bfloat16},
        "zero_optimization": zero,
    }
    return _merged(settings, config.backbone.deepspeed)


def _merged(base: dict[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    both = [key for key in over if isinstance(over[key], dict) and isinstance(base.get(key), dict)]
    return {**base, **over, **{key: _merged(base[key], over[key]) for key in both}}
