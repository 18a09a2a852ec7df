"""DeepSpeed's ZeRO-3 for a frozen backbone: settings, hooks, gathering. Only here is it used."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from sfed.config.schema import Config
from sfed.lora.frozen.linear import keep_weights_alone
from sfed.lora.frozen.quantized import Stored
from sfed.lora.targets import num_weights, transformer_layers
from sfed.models.hf_config import MetaModel
from sfed.utils.errors import UserError
from sfed.utils.text import one_line

# Numbers of a weight, by measurement; see docs/decisions.md.
_LARGE_WEIGHT = 100_000


def deepspeed_settings(config: Config, meta: MetaModel, dtype: torch.dtype) -> dict[str, Any]:
    """Build the DeepSpeed configuration: our defaults, then the user's raw keys over them.

    DeepSpeed's own defaults keep everything gathered for any model below a billion parameters, so
    the bounds follow the model's size. The layer in use and the one that is gathered ahead are
    live, and DeepSpeed's count may miss one more; see ``most_gathered``.
    """
    layers = transformer_layers(meta.model)
    total = num_weights(meta.model)
    layer = max(map(num_weights, layers), default=total // meta.num_layers)
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_max_live_parameters": layer + max(layer, _largest_outside(meta.model, layers)),
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": layer,
        "stage3_allgather_sequential": _has_large_weights(layers),
        "stage3_param_persistence_threshold": min(100_000, total // 1000),
        "memory_efficient_linear": False,  # for all of torch, and keeps inputs; see shard
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


def most_gathered(settings: Mapping[str, Any]) -> int:
    """The most numbers that are gathered at a time under these settings; nf4 has two in one."""
    zero = settings["zero_optimization"]
    return int(zero["stage3_max_live_parameters"]) + int(zero["stage3_prefetch_bucket_size"])


def most_gathered_bytes(
    settings: Mapping[str, Any], model: PreTrainedModel, dtype: torch.dtype
) -> int:
    """The most bytes that are gathered at a time.

    One of the weights is the largest outside of the layers, and the others are those of layers.
    """
    layers = transformer_layers(model)
    count = most_gathered(settings)
    outside = min(count, _largest_outside(model, layers))
    bytes_per_number = max(
        (Stored.of(layer).sharded_bytes(dtype) / num_weights(layer) for layer in layers),
        default=dtype.itemsize,
    )
    return round(outside * dtype.itemsize + (count - outside) * bytes_per_number)


def _largest_outside(model: nn.Module, layers: list[nn.Module]) -> int:
    """Weights of the largest module outside of the layers: as a rule the vocabulary's."""
    inside = {module for layer in layers for module in layer.modules()}
    return max(
        sum(weight.numel() for weight in module.parameters(recurse=False))
        for module in model.modules()
        if module not in inside
    )


def _has_large_weights(layers: list[nn.Module]) -> bool:
    """Whether a gather for each weight costs less than the copies of one gather for all."""
    sizes = [weight.numel() for layer in layers for weight in layer.parameters()]
    return sum(sizes) >= _LARGE_WEIGHT * max(1, len(sizes))


def own_share(parameter: nn.Parameter, rank: int) -> torch.Tensor | None:
    """What a process holds of a sharded weight, flat; None of a weight that is not sharded.

    The last share is filled up with anything, which is left out.
    """
    share = getattr(parameter, "ds_tensor", None)
    if share is None:
        return None
    of_weight = max(0, parameter.ds_numel - rank * share.ds_numel)  # type: ignore[attr-defined]
    flat: torch.Tensor = share.view(-1)[:of_weight]
    return flat


def gathered_whole(parameters: list[nn.Parameter]) -> AbstractContextManager[None]:
    """Gather parameters that ``from_pretrained`` has loaded into shards. Collective where so."""
    if not any(hasattr(parameter, "ds_id") for parameter in parameters):
        return nullcontext()
    import deepspeed

    gathered: AbstractContextManager[None] = deepspeed.zero.GatheredParameters(parameters)
    return gathered


def whole_shape(weight: nn.Parameter) -> tuple[int, ...]:
    """Shape of a weight, sharded or not."""
    return tuple(getattr(weight, "ds_shape", weight.shape))


def held_share(weight: Any) -> tuple[torch.Tensor, int]:
    """Return this process's share of a weight, flat, and the position of its first number.

    Of a replica it is the whole weight.
    """
    if not hasattr(weight, "ds_id"):
        return weight.detach().flatten(), 0
    size, total = weight.ds_tensor.ds_numel, weight.ds_numel
    start = min(total, size * dist.get_rank(weight.ds_process_group))
    share: torch.Tensor = weight.ds_tensor.detach()[: min(size, total - start)]
    return share, start


def set_share(weight: Any, values: torch.Tensor) -> None:
    """Set what ``held_share`` returns, between passes; a replica gets the tensor itself.

    Numbers that ZeRO-3 keeps gathered from an earlier pass are released.
    """
    if not hasattr(weight, "ds_id"):
        weight.data = values.view(weight.shape)
        return
    if weight.ds_status.name == "AVAILABLE":  # a small weight stays gathered between passes
        weight.ds_active_sub_modules.clear()
        weight.partition()
    weight.ds_tensor.data[: len(values)].copy_(values)


def prepare_deepspeed(config: Config, meta: MetaModel, dtype: torch.dtype) -> dict[str, Any]:
    """Initialise DeepSpeed in the existing process group; returns its checked settings."""
    import deepspeed  # heavy, and only needed here

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    if torch.cuda.is_available():
        # DeepSpeed takes the GPU of this number, and the launcher's may be one nobody sees here.
        os.environ["LOCAL_RANK"] = str(torch.cuda.current_device())
    else:
        import deepspeed.ops

        # Otherwise the first start on a CPU compiles a C++ extension for most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # What a launcher would have set; DeepSpeed reads it even where the group exists.
        os.environ.setdefault("LOCAL_RANK", "0")
    deepspeed.init_distributed(dist.get_backend())  # adopts the group that exists
    settings = deepspeed_settings(config, meta, dtype)
    try:
        deepspeed.DeepSpeedConfig(settings)
    except (
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        AssertionError,
        deepspeed.DeepSpeedConfigError,
    ) as error:
        reason = one_line(error)
        raise UserError(f"backbone.deepspeed is refused by DeepSpeed: {reason}") from None
    _prepare_secondary_partition(settings)
    return settings


def _prepare_secondary_partition(settings: dict[str, Any]) -> None:
    """Check the secondary partition (hpZ): a second copy of the shards for the processes of a node.

    DeepSpeed makes its groups while it loads a model. It would take those of an earlier run in the
    same process, whose process group has gone.

    Raises:
        UserError: where the processes do not divide into such groups.
    """
    from deepspeed.utils import groups

    groups._ZERO_PARAM_INTRA_PARALLEL_GROUP = None
    zero = settings["zero_optimization"]
    size, processes = int(zero.get("zero_hpz_partition_size", 1)), dist.get_world_size()
    if processes % max(1, min(size, processes)):
        raise UserError(
            f"backbone.deepspeed.zero_optimization.zero_hpz_partition_size = {size} does not "
            f"divide the {processes} processes; set it to the processes of a node, or leave it out"
        )


def shard(model: PreTrainedModel, settings: dict[str, Any]) -> Any:
    """Install ZeRO-3's gather hooks; returns the engine, which must outlive the model.

    A layer of the transformer is gathered as a whole. Otherwise DeepSpeed hooks into each module of
    it, which costs several times the host's time. It cannot where a module below has parameters
    that it does not know; adapters are none, and are attached later.
    """
    import deepspeed
    from deepspeed.utils import groups, set_z3_leaf_modules

    size = settings["zero_optimization"].get("zero_hpz_partition_size", 1)
    # DeepSpeed 0.19 makes the groups while it loads a model, and fails for one in memory.
    if size > 1 and groups._get_zero_param_intra_parallel_group() is None:
        groups._create_zero_param_parallel_group(size)
    if kinds := {type(layer) for layer in transformer_layers(model)}:
        set_z3_leaf_modules(model, sorted(kinds, key=lambda kind: kind.__qualname__))
    engine, *_ = deepspeed.initialize(model=model, config=settings)
    keep_weights_alone(model)

    def release_leftovers(*_: Any) -> None:
        engine.optimizer.release_backward_leftovers()

    # DeepSpeed releases a layer when its input has a gradient, and that of the first has none.
    model.register_forward_pre_hook(release_leftovers, prepend=True)
    return engine
