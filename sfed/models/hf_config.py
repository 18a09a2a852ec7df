"""The shape of the backbone before any weight is read: configuration, dtype, how it is stored."""

from __future__ import annotations

import copy
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedModel,
)

from sfed.config.schema import Config
from sfed.config.sections.backbone import BackboneSection
from sfed.data.tasks import task_of
from sfed.distributed.shutdown import is_lost_contact
from sfed.distributed.sync import gather_json
from sfed.distributed.world import World
from sfed.lora.frozen import fp8, quantized
from sfed.lora.frozen.quantized import Stored
from sfed.utils.errors import ConfigError, UserError
from sfed.utils.text import one_line, size_text

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_BF16_CAPABILITY = (8, 0)  # of Ampere, the first GPUs that compute bf16 themselves
# A replica may take this share of the memory that is free when the run starts; the rest is for
# adapters, activations and logits.
_REPLICA_SHARE = 0.5
# What transformers says where a model has no such attention, or a package for it is missing.
_OF_ATTENTION = re.compile(
    r"scaled_dot_product|attn_implementation|attention implementation|flash.?att", re.IGNORECASE
)
# Words in the names of probabilities with which a model in training mode leaves things to chance.
# Not jitter: PhiMoE's routers choose experts by it in evaluation mode, too.
_OF_CHANCE = ("dropout", "pdrop", "layerdrop", "drop_path", "stochastic_depth")


@dataclass(frozen=True)
class Sharding:
    """How the backbone is stored, and why."""

    kind: str
    reason: str

    @property
    def is_sharded(self) -> bool:
        """Whether a pass gathers weights, so that all processes must make equally many."""
        return self.kind == "zero3"


def dtype_name(config: Config, world: World) -> str:
    """Resolve ``model.dtype``: CPUs and older GPUs compute bf16 several times slower than fp32."""
    if config.model.dtype != "auto":
        return config.model.dtype
    if world.device.type != "cuda":
        return "fp32"
    is_native = torch.cuda.get_device_capability(world.device) >= _BF16_CAPABILITY
    return "bf16" if is_native else "fp32"


def precision(config: Config, world: World) -> str:
    """The dtype of the backbone, and how its weights are stored where that is another form."""
    scheme, dtype = config.model.quantization, dtype_name(config, world)
    if config.backbone.compute == "fp8":
        return f"{dtype}, frozen products in fp8"
    return dtype if scheme == "none" else f"{scheme}, computed in {dtype}"


def asked_attention(config: Config) -> str | None:
    """``model.attention`` as transformers takes it; None = sdpa if the model has it, else eager."""
    asked = config.model.attention
    return None if asked == "auto" else asked


def auto_class(config: Config) -> Any:
    """The kind of model that the task needs."""
    is_classification = task_of(config).is_classification
    return AutoModelForSequenceClassification if is_classification else AutoModelForCausalLM


def from_config(config: Config, model_config: PreTrainedConfig, **settings: Any) -> PreTrainedModel:
    """A model of this shape without its weights, on torch's present default device.

    Its attention is the one of ``settings``, not one that the model's own configuration names.
    """
    settings = {"attn_implementation": None, **settings}
    model: PreTrainedModel = auto_class(config).from_config(
        model_config, trust_remote_code=config.backbone.trust_remote_code, **settings
    )
    return model


class MetaModel:
    """A model before any weight is read: its configuration, and what can be counted of it.

    Counting builds the model on torch's meta device. That is done at most once, and not before
    somebody asks.
    """

    def __init__(self, config: Config, model_config: PreTrainedConfig) -> None:
        self.config = model_config
        """The model's own configuration."""
        self._run_config = config

    @staticmethod
    def read(config: Config, name: str) -> MetaModel:
        """Read the configuration of a model; see ``read_model_config``."""
        return MetaModel(config, read_model_config(config, name))

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model without memory for its weights, with codes in the place of quantised ones.

        Read ``num_weights`` and ``stored`` before it is changed.

        Raises:
            UserError: where its weights cannot be quantised as asked for.
        """
        model, scheme = self.unquantised(), self._run_config.model.quantization
        if scheme != "none":
            quantized.put_stand_ins(model, scheme, model.dtype)
        if self._run_config.backbone.compute == "fp8":
            fp8.convert(model)
        return model

    def unquantised(self) -> PreTrainedModel:
        """The model without memory for its weights, as transformers builds it."""
        with torch.device("meta"):
            return from_config(self._run_config, copy.deepcopy(self.config))

    @cached_property
    def num_weights(self) -> int:
        """Weights of the whole backbone; those that two layers share count once."""
        return quantized.total_weights(self.model)

    @cached_property
    def stored(self) -> Stored:
        """What the whole backbone stores."""
        return Stored.of(self.model)

    @property
    def num_layers(self) -> int:
        """Layers of the transformer; 1 where its configuration does not tell."""
        return max(1, getattr(self.config.get_text_config(), "num_hidden_layers", 1))

    @property
    def may_be_eager(self) -> bool:
        """Whether attention may keep a matrix of scores: eager, or a model without sdpa."""
        if self._run_config.model.attention != "auto":
            return self._run_config.model.attention == "eager"
        kind = auto_class(self._run_config)._model_mapping.get(type(self.config), None)
        return not getattr(kind, "_supports_sdpa", False)


def read_model_config(config: Config, name: str) -> PreTrainedConfig:
    """Read the model's own configuration, with its dropouts set to 0 and as many outputs as needed.

    A frozen backbone is used as it is: its own dropout would make a client's numbers depend on who
    shares its pass. ``lora.dropout`` regularises the adapters.

    Raises:
        UserError: where it cannot be found, its files are quantised already, or it would attend to
            blocks of long rows.
    """
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if looks_like_path and not (Path(name) / "config.json").is_file():
        raise UserError(
            f"model.name = {name!r}: there is no model folder with a config.json; give a folder "
            "or a hub id such as meta-llama/Llama-2-7b-hf"
        )
    try:
        model_config: PreTrainedConfig = AutoConfig.from_pretrained(
            name, trust_remote_code=config.backbone.trust_remote_code
        )
        model_config = fitted(config, model_config)
    except Exception as error:
        if is_of_the_machine(error):
            raise
        raise UserError(cannot_load(config, name, error)) from None
    _refuse_quantised_files(config, name, model_config)
    _refuse_block_sparse(config, name, model_config)
    return model_config


def _refuse_quantised_files(config: Config, name: str, model_config: PreTrainedConfig) -> None:
    """Refuse files that hold codes of bitsandbytes, or any codes that would be quantised again."""
    stored = getattr(model_config, "quantization_config", None)
    if stored is None:
        return
    settings = stored if isinstance(stored, dict) else stored.to_dict()
    method, scheme = str(settings.get("quant_method")), config.model.quantization
    if config.backbone.compute == "fp8":
        raise UserError(
            f"model.name = {name!r}: its files are quantised already (quant_method {method!r} in "
            "config.json), and backbone.compute=fp8 quantises weights of 16 or 32 bits; name the "
            "model that they were made from, or set backbone.compute=full"
        )
    if scheme != "none" or "bitsandbytes" in method:
        raise UserError(
            f"model.name = {name!r}: its files are quantised already (quant_method {method!r} in "
            "config.json); name the model that they were made from, and set "
            f"model.quantization={'nf4' if scheme == 'none' else scheme}"
        )


def _refuse_block_sparse(config: Config, name: str, model_config: PreTrainedConfig) -> None:
    """Refuse rows for which BigBird attends to blocks instead of the whole row.

    transformers changes such a model to full attention for good at its first shorter row, so the
    numbers of a row would depend on the rows before it.
    """
    is_decoder = model_config.model_type != "big_bird" and not task_of(config).is_classification
    if getattr(model_config, "attention_type", None) != "block_sparse" or is_decoder:
        return
    # As transformers has it: blocks of all, of neighbours, and drawn ones.
    bound = (5 + 2 * model_config.num_random_blocks) * model_config.block_size
    if config.data.max_tokens > bound:
        raise UserError(
            f"data.max_tokens = {config.data.max_tokens}: model.name = {name!r} has attention_type "
            f"'block_sparse' in config.json, which is for rows with more than {bound} tokens, and "
            "transformers changes to full attention for good at the first shorter row; set "
            f"data.max_tokens to at most {bound}, or attention_type to 'original_full' in a copy "
            "of the model, for full attention at every length"
        )


def fitted(config: Config, model_config: PreTrainedConfig) -> PreTrainedConfig:
    """Set chance to 0 and the outputs that the task needs, in place; returns it.

    Raises:
        ValueError: where sizes are missing, or the token of padding is outside of the vocabulary.
    """
    text, task = model_config.get_text_config(), task_of(config)
    for part in (model_config, text):
        for key, value in part.to_dict().items():
            if isinstance(value, float) and any(word in key for word in _OF_CHANCE):
                setattr(part, key, 0.0)
            if value is True and key.startswith("output_"):  # hidden states, losses of routers
                setattr(part, key, False)
        part.return_dict = True
    _check_sizes(text)
    for part in (model_config, text):
        _check_padding(part, text.vocab_size)
    if task.is_classification:
        model_config.num_labels = task.num_outputs
        if text.pad_token_id is None:  # LLaMA finds the end of a row by it
            text.pad_token_id = _end_token(text)
        model_config.pad_token_id = text.pad_token_id
    return model_config


def _check_sizes(text: PreTrainedConfig) -> None:
    for key in ("vocab_size", "hidden_size"):
        if getattr(text, key, None) is None:
            raise ValueError(
                f"its configuration ({type(text).__name__}) does not tell {key}; a configuration "
                "with other names can give it in attribute_map"
            )


def _check_padding(part: PreTrainedConfig, num_words: int) -> None:
    """Read a token below 0, such as -1, as none.

    Raises:
        ValueError: where it is none of the vocabulary.
    """
    pad = getattr(part, "pad_token_id", None)
    if pad is not None and pad >= num_words:
        raise ValueError(
            f"its config.json says pad_token_id = {pad}, and its vocabulary has {num_words} "
            "tokens; set it to one of these or to null"
        )
    if pad is not None and pad < 0:
        part.pad_token_id = None


def _end_token(text: PreTrainedConfig) -> int:
    """The first eos that is a token of the vocabulary, or token 0."""
    eos = getattr(text, "eos_token_id", None)
    named = eos if isinstance(eos, list) else [eos]
    return next((one for one in named if one is not None and 0 <= one < text.vocab_size), 0)


def classes_of_checkpoint(config: Config, name: str) -> int:
    """Outputs of the head that a checkpoint may have come with, by its config.json."""
    remote = config.backbone.trust_remote_code
    return int(AutoConfig.from_pretrained(name, trust_remote_code=remote).num_labels)


def is_of_the_machine(error: Exception) -> bool:
    """Whether loading failed for want of memory, a device or another process, not for the model."""
    if isinstance(error, torch.OutOfMemoryError | torch.AcceleratorError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and is_lost_contact(error)


def told_by(error: Exception) -> str:
    """What a library says, on one line; with the error's name, where that is no sentence."""
    logging.getLogger(__name__).debug("the error of the library", exc_info=error)
    text = one_line(error)
    return text if len(text.split()) > 2 else f"{type(error).__name__}: {text}".rstrip(": ")


def cannot_load(config: Config, name: str, error: Exception) -> str:
    """The message of a model that transformers refuses, with its reason on one line."""
    reason, attention = told_by(error), config.model.attention
    if attention != "auto" and _OF_ATTENTION.search(str(error)):
        return (
            f"model.attention = {attention!r} cannot be used for model.name = {name!r}; set "
            "model.attention=auto, which takes one that the model supports. transformers says: "
            f"{reason}"
        )
    if "Unrecognized configuration class" in str(error):
        reason = f"transformers has no {_kind_of_model(config)} of this architecture"
    if "trust_remote_code" in str(error):
        reason = (
            "it comes with Python code of its own, which is not run unless "
            "backbone.trust_remote_code=true; set it only if you trust the author"
        )
    if isinstance(error, UnpicklingError):
        reason = "its weights are a pickle that holds more than tensors; convert it to safetensors"
    return f"model.name = {name!r} cannot be loaded for this task: {reason}"


def _kind_of_model(config: Config) -> str:
    is_classification = task_of(config).is_classification
    return "sequence classifier" if is_classification else "causal language model"


def choose_sharding(config: Config, meta: MetaModel, world: World) -> Sharding:
    """Resolve ``backbone.sharding`` and say why. Collective: every process decides the same.

    Raises:
        ConfigError: where sharding is asked for and processes share a GPU.
    """
    if world.device.type == "cuda":
        most = max(gather_json(world, "processes on a GPU", world.processes_per_device))
        if most > 1:
            return _on_shared_gpus(config.backbone, most)

    def sizes() -> tuple[int, int]:
        share = free_bytes(world.device) // world.processes_per_device
        free = min(gather_json(world, "free memory", share))
        return meta.stored.bytes(DTYPES[dtype_name(config, world)]), free

    return resolve_sharding(config.backbone, world.size, sizes)


def _on_shared_gpus(section: BackboneSection, processes: int) -> Sharding:
    """A replica each: NCCL refuses such processes, and gloo would gather through host memory."""
    for key, value in (("sharding", "zero3"), ("offload", "cpu")):
        if getattr(section, key) == value:
            raise ConfigError(
                f"backbone.{key} = {value!r}: {processes} processes share a GPU, and ZeRO-3 would "
                "gather every layer through host memory; start one process per GPU, each with "
                "several clients (federated.num_clients), or set backbone.sharding=none"
            )
    return Sharding("none", f"a replica each, since {processes} processes share a GPU")


def resolve_sharding(
    section: BackboneSection, num_processes: int, sizes: Callable[[], tuple[int, int]]
) -> Sharding:
    """Resolve ``backbone.sharding`` and say why.

    A replica makes local steps free of communication, so ``auto`` picks it wherever it fits.

    Args:
        section: of the configuration.
        num_processes: of the run.
        sizes: tells the bytes of a replica and those that are free for each process; not asked
            where the answer does not depend on them.
    """
    if section.sharding != "auto":
        return Sharding(section.sharding, "as configured")
    if section.compute == "fp8":
        return Sharding("none", "a replica each, since backbone.compute=fp8 is not sharded")
    if section.offload == "cpu":
        return Sharding("zero3", "backbone.offload=cpu keeps shards in host memory")
    if num_processes == 1:
        return Sharding("none", "one process has nobody to share with")
    needed, free = sizes()
    allowed = int(_REPLICA_SHARE * free)
    told = f"{size_text(needed)} of weights, {size_text(allowed)} free for them on each process"
    if needed <= allowed:
        return Sharding("none", f"a replica each, since it fits: {told}")
    return Sharding("zero3", f"stored once over all processes, since a replica is too much: {told}")


def free_bytes(device: torch.device) -> int:
    """Memory of a device that nobody uses."""
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what torch itself keeps for later is free
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
