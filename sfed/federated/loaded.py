"""Adapters from their folders on their base model, in one process: to score them and to use them.

They run through the trainer's own layers, so what is computed is what was trained.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.distributed import world as distributed
from sfed.distributed.world import World
from sfed.files import peft_folders
from sfed.files.names import ADAPTER_CONFIG
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.models import backbone
from sfed.models.backbone import Backbone
from sfed.models.hf_config import MetaModel, choose_sharding
from sfed.models.tokenizer import load_tokenizer
from sfed.observability.third_party import quieten
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch


@dataclass(frozen=True)
class Loaded:
    """Adapters that are ready to compute."""

    config: Config
    world: World
    tokenizer: PreTrainedTokenizerFast
    backbone: Backbone
    adapters: Adapters
    gamma: float
    rows: Sequence[torch.Tensor]
    """(layout.size,) fp32 on the CPU for each folder."""

    def base_row(self) -> torch.Tensor:
        """The base model itself, (layout.size,): B = 0, and the head with which training began."""
        row = torch.zeros(self.adapters.layout.size)
        row[self.adapters.layout.columns("head")] = self.adapters.initial_head()
        return row


def spec_of(folder: Path) -> LoraSpec:
    """How an adapter is attached to its base model, without dropout.

    The layers are those of which the file holds factors, by their full names.

    Args:
        folder: of adapter_config.json and adapter_model.safetensors.

    Raises:
        UserError: where a file cannot be read, or the adapter is no plain LoRA adapter.
    """
    found = peft_folders.read(folder)
    if not found.base_name:
        raise UserError(
            f"the adapter {folder}: {ADAPTER_CONFIG} does not name the base model; set "
            "base_model_name_or_path there"
        )
    return LoraSpec(found.lora_rank, found.gamma, 0.0, found.layers, found.base_name)


def same_spec(folders: Sequence[Path], specs: Sequence[LoraSpec]) -> LoraSpec:
    """The one way in which several adapters are attached.

    Raises:
        UserError: where they differ in base model, rank, gamma or layers.
    """
    for folder, spec in zip(folders, specs, strict=True):
        if spec != specs[0]:
            names = [field.name for field in dataclasses.fields(spec)]
            other = next(n for n in names if getattr(spec, n) != getattr(specs[0], n))
            raise UserError(
                f"{folder} and {folders[0]} differ in {other}, so they cannot share one base "
                "model; name them one at a time"
            )
    return specs[0]


@contextmanager
def on_backbone(config: Config, spec: LoraSpec, folders: Sequence[Path]) -> Iterator[Loaded]:
    """Load the base model and the adapters of some folders; leave the process group at the end.

    Args:
        config: how rows are read, and how the base model is stored.
        spec: how the adapters are attached.
        folders: of the adapters.

    Raises:
        UserError: where the base model or an adapter cannot be loaded, or several processes were
            started.
    """
    if launch().size > 1:
        raise UserError("this command runs as one process; start it without torchrun")
    world = distributed.start(config.federated.deadline_seconds)
    quieten(0, world.device.type, to_stderr=True)
    world.watch.leave()  # nobody waits for this process, and a person may think for an hour
    try:
        yield _load(config, spec, folders, world)
    finally:
        distributed.stop(world)


def _load(config: Config, spec: LoraSpec, folders: Sequence[Path], world: World) -> Loaded:
    name = config.model.name
    tokenizer, _ = load_tokenizer(config, name)
    meta = MetaModel.read(config, name)
    frozen = backbone.load(config, name, world, meta, choose_sharding(config, meta, world))
    attached = adapters.attach(frozen.model, spec, frozen.head)
    rows = [attached.peft_form.read(folder) for folder in folders]
    frozen.keep_documents_in_rows_of_their_own()  # whether they may share rows is not tried here
    frozen.evaluating()
    attached.context.token_keys = None
    return Loaded(config, world, tokenizer, frozen, attached, spec.lora_scaling, rows)
