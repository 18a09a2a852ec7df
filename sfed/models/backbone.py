"""The frozen backbone: how it is loaded, and passes through it.

ZeRO-3 without an optimizer stores the frozen weights once over all processes: each keeps a share
and gathers a layer when a pass needs it. The adapters are attached afterwards, so DeepSpeed never
sees them and nothing of them is sharded, averaged or sent. The model is called directly; the
DeepSpeed engine is only kept alive for its hooks.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from sfed.config.schema import Config
from sfed.data.batches import Documents
from sfed.data.packing import UNBOUNDED, Packing
from sfed.data.tasks import task_of
from sfed.distributed.world import World
from sfed.kernels import choice
from sfed.kernels.choice import PLAIN, Kernels
from sfed.lora import packed_attention
from sfed.lora.frozen import fp8, quantized
from sfed.lora.head import Head
from sfed.lora.hf_blocks import patch_blocks
from sfed.models import heads
from sfed.models.deepspeed import gathered_whole, prepare_deepspeed, shard
from sfed.models.hf_config import (
    DTYPES,
    MetaModel,
    Sharding,
    asked_attention,
    auto_class,
    cannot_load,
    choose_sharding,
    dtype_name,
    is_of_the_machine,
)
from sfed.models.losses import TokenLosses, Traits
from sfed.utils.errors import UserError

# A token's 4 * 12 d^2 FLOPs of matrix products, and 12 d w of attention to w places, which runs at
# about half their rate under a mask, are even at w = 2 d.
_EVEN_WIDTH_OF_HIDDEN = 2
# Attention of one document after another: a call forward and backward takes a CPU as long as 17
# tokens of a layer of width 64 and 2 of one of width 512. So it is even with a mask where the width
# of the rows times the mean length of their documents is about 2,200.
_DOCUMENT_SLOTS_BY_HIDDEN = 1_100


class Backbone:
    """A frozen language model or encoder and how it is stored."""

    def __init__(
        self,
        model: PreTrainedModel,
        head: Head | None,
        sharding: Sharding,
        keep_alive: Any,
        traits: Traits | None = None,
    ) -> None:
        self.kernels = PLAIN
        """What computes the steps between its matrix products, and the optimizer."""
        self.model = model
        self.head = head
        self.sharding = sharding
        self._keep_alive = keep_alive
        self.weights_digest = ""
        """Digest of the loaded model; see ``fingerprints.of_backbone``."""
        self._losses = TokenLosses(model, traits) if head is None else None

    @cached_property
    def context_tokens(self) -> int:
        """The longest sequence that the model was made for."""
        return context_of(self.model)

    @property
    def attention(self) -> str:
        """The attention implementation of transformers that the language model uses."""
        if packed_attention.is_installed(self.model):
            return "sdpa"
        return str(self.model.config.get_text_config()._attn_implementation)

    @property
    def why_masked(self) -> str | None:
        """Why attention keeps the documents of a row apart by a mask; None where it needs none."""
        model, attention = self.model, self.attention
        if attention == "flash_attention_2" or packed_attention.is_installed(model):
            return None
        return packed_attention.why_masked(model, model.device) or f"model.attention={attention}"

    @property
    def vocabulary_size(self) -> int:
        """Rows of the embedding."""
        return int(self.model.config.get_text_config().vocab_size)

    def logits_at_a_time(self, num_words: int) -> int | None:
        """Tokens whose logits exist at once where there are so many words; None = all."""
        return None if self._losses is None else self._losses.logits_at_a_time(num_words)

    def keep_documents_in_rows_of_their_own(self) -> None:
        """Never pack: rows of several documents were found to be wrong."""
        self.packing = None

    @cached_property
    def packing(self) -> Packing | None:
        """What rows of several documents may be and cost; None where these would see each other."""
        if self._losses is None or not self._losses.keeps_documents_apart:
            return None
        hidden, each = self.model.config.get_text_config().hidden_size, math.inf
        if self.why_masked is None:
            is_loop = self.attention == "sdpa" and self.model.device.type == "cpu"
            each = _DOCUMENT_SLOTS_BY_HIDDEN / hidden if is_loop else 0.0
        # These families are known to read no more of a row than the positions of its documents, so
        # a row may be wider than the model's context; others may keep a table as wide as a row.
        is_known = packed_attention.is_installed(self.model)
        widest = UNBOUNDED if is_known else self.context_tokens
        return Packing(widest, _EVEN_WIDTH_OF_HIDDEN * hidden, each)

    def token_losses(
        self,
        input_ids: torch.Tensor,
        labels: torch.Tensor,
        positions: torch.Tensor,
        documents: Documents | None = None,
    ) -> torch.Tensor:
        """Return each row's summed cross-entropy in nats over its supervised tokens.

        Args:
            input_ids: (rows, tokens) int64, padded at the right. A causal model cannot see what
                comes later, so padding needs no mask.
            labels: (rows, tokens) int64, ``IGNORED_LABEL`` where nothing is supervised.
            positions: (supervised,) int64 places in the flattened rows from which a supervised
                token is predicted, one before it; at least one, which may be ignored.
            documents: where several lie in a row; None = a row is one document.

        Returns:
            (rows,) fp32 sums; divide by the number of supervised tokens.
        """
        assert self._losses is not None, "a classifier has no vocabulary"
        return self._losses(input_ids, labels, positions, documents)

    def outputs(
        self,
        input_ids: torch.Tensor,
        is_token: torch.Tensor,
        is_second: torch.Tensor,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the classification head's outputs.

        Args:
            input_ids: (rows, tokens) int64, padded at the right with anything.
            is_token: same shape, False on padding.
            is_second: same shape, True on the second of two texts.
            position_ids: same shape int64; None = as the model counts.

        Returns:
            (rows, outputs) fp32.
        """
        settings = self.model.config
        marks = {} if position_ids is None else {"position_ids": position_ids}
        if getattr(settings, "type_vocab_size", 0) > 1:
            marks["token_type_ids"] = is_second.long()
        logits: torch.Tensor = self.model(
            # LLaMA and RoBERTa look for the padding in the tokens themselves.
            input_ids=input_ids.masked_fill(~is_token, settings.pad_token_id),
            attention_mask=is_token.long(),
            **marks,
        ).logits
        return logits.float()

    def training(self) -> None:
        """Prepare for passes with gradients.

        A frozen backbone is used as it is, in evaluation mode: in training mode it may drop layers,
        shake routers or collect statistics, and a client's numbers would depend on chance and on
        who shares its pass. Only checkpointed layers ask for training mode, to recompute.
        """
        self.model.eval()
        for module in self.model.modules():
            if getattr(module, "gradient_checkpointing", False):
                module.training = True

    def evaluating(self) -> None:
        """Prepare for passes without gradients."""
        self.release()
        self.model.eval()

    def release(self) -> None:
        """Release weights that ZeRO-3's prefetcher left gathered. Between phases, not passes."""
        if not self.sharding.is_sharded:
            return
        _, engine = self._keep_alive
        engine.optimizer.get_param_coordinator()._clean_inflight_param_registry()
        for parameter in self.model.parameters():
            if hasattr(parameter, "ds_id") and not parameter.ds_persist:
                parameter.ds_active_sub_modules.clear()
                if parameter.ds_status.name == "AVAILABLE":
                    parameter.partition()


def context_of(model: PreTrainedModel) -> int:
    """The longest sequence that a model was made for, in tokens."""
    text = model.config.get_text_config()
    positions = int(getattr(text, "max_position_embeddings", None) or UNBOUNDED)
    positions = positions if positions > 0 else UNBOUNDED  # XLNet says -1
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            # RoBERTa counts positions from behind the one of the padding.
            return positions - (0 if module.padding_idx is None else module.padding_idx + 1)
    return positions


def device_map(
    device: torch.device, sharding: Sharding, *, quantises: bool = False
) -> dict[str, torch.device] | None:
    """Where ``from_pretrained`` puts each tensor as it reads it; None = as it does by itself.

    On a GPU a replica would otherwise lie in the memory of the host first, once for each process.
    On a CPU the weights stay in the mapped file, which all processes share. A model that is
    quantised while it is read lies whole where it is put, so one to be sharded is put on the host.
    """
    if quantises and sharding.is_sharded:
        return {"": torch.device("cpu")}
    return None if sharding.is_sharded or device.type == "cpu" else {"": device}


def _read(
    config: Config, name: str, meta: MetaModel, sharding: Sharding, world: World
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """Read the weights; returns the model, and what transformers says of loading it."""
    dtype, scheme = DTYPES[dtype_name(config, world)], config.model.quantization
    into_shards = sharding.is_sharded and scheme == "none"
    settings: dict[str, Any] = {}
    if scheme != "none":
        asked = quantized.loading_settings(meta.unquantised(), scheme, dtype)
        settings["quantization_config"] = asked
    try:
        model, loading = auto_class(config).from_pretrained(
            name,
            config=meta.config,
            dtype=dtype,
            attn_implementation=asked_attention(config),
            trust_remote_code=config.backbone.trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # of a head with other classes; see heads.detach_head
            key_mapping=heads.hide_mismatched_head(config, name) if into_shards else None,
            device_map=device_map(world.device, sharding, quantises=scheme != "none"),
            **settings,
        )
    except Exception as error:  # as of read_model_config
        if is_of_the_machine(error):
            raise
        raise UserError(cannot_load(config, name, error)) from None
    if scheme != "none":
        quantized.take_over(model, world.device)
    return model, loading


def load(
    config: Config,
    name: str,
    world: World,
    meta: MetaModel | None = None,
    sharding: Sharding | None = None,
) -> Backbone:
    """Load and freeze the backbone, sharded over the processes or as a replica. Collective.

    Args:
        config: the run's configuration.
        name: hub id or folder of the model.
        world: the processes.
        meta: the model, where its configuration has been read before.
        sharding: how it is stored, where that has been chosen before.

    Raises:
        UserError: where the model cannot be found or is not one for the task, or the device cannot
            compute as asked for.
    """
    meta = meta or MetaModel.read(config, name)
    sharding = sharding or choose_sharding(config, meta, world)
    if config.backbone.compute == "fp8":
        fp8.refuse_device(world.device, DTYPES[dtype_name(config, world)])
        fp8.chosen_layers(meta.unquantised())  # what is refused, before any weight is read
    settings, into_shards = None, None
    if sharding.is_sharded:
        settings = prepare_deepspeed(config, meta, DTYPES[dtype_name(config, world)])
        into_shards = _loading_into_shards(config, settings)
    model, loading = _read(config, name, meta, sharding, world)
    _require_output_layer(config, model)
    model.requires_grad_(False)
    kernels = kernels_of(config, world)
    patch_blocks(model, kernels)
    head = heads.detach_head(config, model, loading, gathered_whole)
    keep_alive = None
    if settings is None:
        model.to(world.device)
    else:
        keep_alive = (into_shards, shard(model, settings))
    _set_computing(config, model, world.device, kernels)
    loaded = Backbone(model, head, sharding, keep_alive)
    loaded.kernels = kernels
    loaded.release()
    return loaded


def _loading_into_shards(config: Config, settings: dict[str, Any]) -> object | None:
    """Let from_pretrained load straight into shards while the result lives; None where it cannot.

    It must outlive the model.
    """
    if config.model.quantization != "none":
        return None
    from transformers.integrations import HfDeepSpeedConfig

    kept: object = HfDeepSpeedConfig(settings)
    return kept


def _require_output_layer(config: Config, model: PreTrainedModel) -> None:
    """Refuse a language model whose output layer is not to be found.

    Raises:
        UserError: naming the model.
    """
    if not task_of(config).is_classification and model.get_output_embeddings() is None:
        raise UserError(
            f"model.name = {config.model.name!r}: {type(model).__name__} does not tell its output "
            "layer (get_output_embeddings gives None), so the losses of tokens cannot be computed; "
            "choose another model.name"
        )


def kernels_of(config: Config, world: World) -> Kernels:
    """The kernels that a run uses on this process.

    Raises:
        UserError: where they are named in the configuration and do not run here.
    """
    dtype = DTYPES[dtype_name(config, world)]
    has = {"dropout": config.lora.dropout > 0.0, "quantise": config.backbone.compute == "fp8"}
    options = tuple(name for name in choice.OPTIONS if has[name])
    return choice.choose(config.train.kernels, world.device, dtype, options)


def _set_computing(
    config: Config, model: PreTrainedModel, device: torch.device, kernels: Kernels
) -> None:
    """Set how passes compute: the products of frozen layers, recomputation, attention.

    Raises:
        UserError: where weights are not finite and their products are to be in FP8.
    """
    if config.backbone.compute == "fp8":
        fp8.convert(model, kernels.quantise)
        fp8.refuse_nonfinite(model)
    if config.backbone.gradient_checkpointing:
        recompute_layers(model)
    if config.model.attention == "auto":
        packed_attention.install(model, device)


def recompute_layers(model: PreTrainedModel) -> None:
    """Let backward passes compute the layers' activations again.

    Raises:
        UserError: where the model cannot.
    """
    if not model.supports_gradient_checkpointing:
        raise UserError(
            f"backbone.gradient_checkpointing = true: {type(model).__name__} of transformers does "
            "not support it; set it to false"
        )
    model.gradient_checkpointing_enable({"use_reentrant": False})


def hooked(model: PreTrainedModel, config: Config) -> Backbone:
    """Shard a frozen model that is in memory, as ``load`` does while it reads one. Collective.

    It is for measurements: a process has to hold the whole model first.
    """
    settings = prepare_deepspeed(config, MetaModel(config, model.config), model.dtype)
    keep_alive = (None, shard(model, settings))
    return Backbone(model, None, Sharding("zero3", "as asked for"), keep_alive)
