"""The sections ``model`` and ``backbone``: which frozen model, how it is stored and computed."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from sfed.config.fields import Location, Section, no_fp16

# Keys of a DeepSpeed section that would silently do nothing here (the engine has no optimizer),
# and the key of ours that does what they ask for.
DEAD_DEEPSPEED_KEYS = {
    "optimizer": "train.optimizer, train.lr and train.weight_decay",
    "scheduler": "train.schedule and train.warmup_rounds",
    "gradient_clipping": "train.max_grad_norm",
    "train_batch_size": "train.batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.batch_size and train.micro_batch_size",
    "bf16": "model.dtype",
    "fp16": "model.dtype",
    "activation_checkpointing": "backbone.gradient_checkpointing",
}


class ModelSection(Section):
    """The frozen backbone."""

    name: Location = "demo"
    """Hub id or folder of the language model or encoder. demo = a small model that comes
    with sfed; the default with data.task=demo."""
    dtype: Annotated[Literal["auto", "bf16", "fp32"], BeforeValidator(no_fp16)] = "auto"
    """Data type of the backbone; auto = bf16 on GPUs, fp32 on CPUs. Adapters are always fp32."""
    quantization: Literal["none", "nf4", "int8"] = "none"
    """Storage of the weights of the linear layers within the transformer: nf4 = codes of 4 bits
    with a scale per 64 weights; int8 = codes of 8 bits with a scale per row; none = model.dtype.
    Products are computed in model.dtype with the dequantised weight. nf4 and int8 need pip install
    'sfed[quantization]'."""
    attention: Literal["auto", "sdpa", "flash_attention_2", "eager"] = "auto"
    """Attention implementation of transformers. auto = sdpa where the model supports it, else
    eager, and packed rows without a mask where that is possible; sdpa = with a mask;
    flash_attention_2 is used only where it is named. May change on resume."""


class BackboneSection(Section):
    """Storage and arithmetic of the frozen backbone."""

    compute: Literal["full", "fp8"] = "full"
    """Products of the frozen linear layers within the transformer: full = in model.dtype; fp8 =
    inputs, gradients and weights are rounded to FP8 (e4m3) with a scale per row, in training and
    evaluation. fp8 needs a GPU of compute capability 8.9 with bf16, or a CPU, where it is not
    faster; it keeps a replica on each process."""
    sharding: Literal["auto", "zero3", "none"] = "auto"
    """Storage of the frozen backbone: zero3 = one copy, sharded over all processes; none = a
    replica on each process; auto = none if a replica fits into memory, else zero3."""
    offload: Literal["none", "cpu"] = "none"
    """cpu = keep the shards of the backbone in host memory; needs sharding=zero3."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    trust_remote_code: bool = False
    """Execute Python code that is stored with the model. Set it only if you trust the author."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Raw DeepSpeed keys, which override those that sfed sets, such as {zero_optimization:
    {stage3_max_live_parameters: 1e8}}."""

    @model_validator(mode="after")
    def _refuse_dead_keys(self) -> BackboneSection:
        for key in self.deepspeed:
            if key in DEAD_DEEPSPEED_KEYS:
                raise ValueError(
                    f"deepspeed.{key} has no effect here, because DeepSpeed only stores the frozen "
                    f"backbone; use {DEAD_DEEPSPEED_KEYS[key]} instead"
                )
        zero = self.deepspeed.get("zero_optimization", {})
        if not isinstance(zero, dict):
            raise ValueError(  # noqa: TRY004  (pydantic collects ValueErrors)
                f"deepspeed.zero_optimization is a mapping of keys, not {zero!r}"
            )
        if zero.get("stage", 3) != 3:
            raise ValueError(
                f"deepspeed.zero_optimization.stage is {zero['stage']!r}; a frozen backbone has "
                "nothing to shard below stage 3: use sharding=none for a replica per process"
            )
        if self.compute == "fp8":
            self._refuse_shards_of_fp8()
        if self.offload == "cpu" and self.sharding == "none":
            raise ValueError("offload=cpu needs sharding=zero3 (none keeps a replica per process)")
        return self

    def _refuse_shards_of_fp8(self) -> None:
        for key, value in (("sharding", "zero3"), ("offload", "cpu")):
            if getattr(self, key) == value:
                raise ValueError(
                    f"compute=fp8 and {key}={value} exclude each other: FP8 codes are kept as a "
                    "replica on each process; set backbone.sharding=none and backbone.offload=none,"
                    " or backbone.compute=full"
                )
