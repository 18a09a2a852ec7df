"""The trainer's only file that knows PEFT: attach adapters, flat buffers, writing PEFT folders.

A client's adapter is one row of fp32 numbers: the A factors of all layers, then the B factors, both
in the sorted order of the layers' names but layers that read the same input next to each other,
then the weights of its classification head where the task has one. A row's A part is the message of
the round.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sfed.cli import UserError
from sfed.disk import save_tensors
from sfed.factors import Factors, PassRows
from sfed.heads import Head
from sfed.layers import PassContext, Siblings, StackedLoraLinear
from sfed.layout import Layout, Piece
from sfed.scaling import peft_alpha

_SUPPORTED_LAYERS = ("Linear", "Conv1D", "Linear4bit", "Linear8bitLt")


def _siblings(
    layers: Mapping[str, StackedLoraLinear], layout: Layout
) -> Iterator[tuple[Siblings, list[Piece], list[Piece]]]:
    """Layers that read the same input, with their A, which stand next to each other, and B."""
    b_pieces = {piece.layer: piece for piece in layout.pieces if piece.factor == "B"}
    for a_pieces in layout.with_the_same_input():
        siblings = Siblings(tuple(layers[piece.layer] for piece in a_pieces))
        yield siblings, a_pieces, [b_pieces[piece.layer] for piece in a_pieces]


class Adapters:
    """The adapted layers of one model and the layout of a client's row."""

    def __init__(
        self,
        layers: dict[str, StackedLoraLinear],
        layout: Layout,
        peft_config: LoraConfig,
        context: PassContext,
        head: Head | None,
        dtype: torch.dtype,
    ) -> None:
        self.layers = layers
        self.layout = layout
        self.peft_config = peft_config
        self.context = context
        self.head = head
        self._dtype = dtype
        self._siblings = list(_siblings(layers, layout))

    def bind(
        self,
        values: torch.Tensor,
        grads: torch.Tensor | None = None,
        trained: Sequence[str] = (),
    ) -> None:
        """Point all layers at the rows of ``values``.

        Args:
            values: (C, layout.size) fp32 rows of the clients of the coming passes.
            grads: same shape; backward adds to it in place. None where nothing trains.
            trained: factors that get gradients.
        """
        rows = PassRows(values, grads, self._dtype)
        for siblings, a_pieces, b_pieces in self._siblings:
            siblings.bind(Factors.of(rows, a_pieces, b_pieces, trained))
        if self.head is not None:
            self.head.layer.bind(self._head_weights(values, grads if "head" in trained else None))

    def _head_weights(
        self, values: torch.Tensor, grads: torch.Tensor | None
    ) -> dict[str, torch.Tensor]:
        """The heads' weights by their names: leaves whose gradients are views of ``grads``."""
        weights = {}
        for piece in self.layout.pieces:
            if piece.factor == "head":
                weights[piece.layer] = piece.of(values).detach()
                if grads is not None:
                    weights[piece.layer].requires_grad_()
                    weights[piece.layer].grad = piece.of(grads)
        return weights

    def initial_a(self, generator: torch.Generator) -> torch.Tensor:
        """Draw all A factors of one client as PEFT does: kaiming_uniform(a = sqrt 5).

        In the sorted order of the layers' names, wherever they stand in a row.

        Returns:
            (numbers of A,) fp32 on CPU; each A is uniform in +-1/sqrt(in).
        """
        row = torch.empty(self.layout.columns("A").stop)
        a_pieces = [piece for piece in self.layout.pieces if piece.factor == "A"]
        for piece in sorted(a_pieces, key=lambda piece: piece.layer):
            bound = 1.0 / math.sqrt(piece.shape[1])
            row[piece.start : piece.end].uniform_(-bound, bound, generator=generator)
        return row

    def initial_head(self) -> torch.Tensor:
        """The weights with which every client's head starts: (numbers of the head,) fp32."""
        if self.head is None:
            return torch.empty(0)
        names = [piece.layer for piece in self.layout.pieces if piece.factor == "head"]
        return torch.cat([self.head.initial[name].flatten() for name in names])

    def write_peft_folder(self, folder: Path, row: torch.Tensor) -> None:
        """Write one client's row as a stock PEFT adapter, whole or not at all.

        ``PeftModel.from_pretrained(base, folder)`` then computes what the trainer computed:
        the factor gamma is carried by ``lora_alpha`` and ``use_rslora``.

        Args:
            folder: of adapter_config.json and adapter_model.safetensors; parents are made.
            row: (layout.size,) of any device.
        """
        row = row.detach().cpu()
        tensors = {
            f"base_model.model.{self._peft_name(piece)}": row[piece.start : piece.end]
            .view(piece.shape)
            .clone()
            for piece in self.layout.pieces
        }
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / "adapter_model.safetensors.tmp"
        save_tensors(tensors, temporary, {"format": "pt"})
        os.replace(temporary, folder / "adapter_model.safetensors")
        settings = {**self.peft_config.to_dict(), "inference_mode": True}
        settings["target_modules"] = _plain(settings["target_modules"])
        if self.head is not None:
            settings["task_type"] = "SEQ_CLS"
            settings["modules_to_save"] = [self.head.name]
            # Otherwise a target such as "dense" would match a layer of the head too.
            settings["exclude_modules"] = rf"(.*\.)?{re.escape(self.head.name)}(\..*)?"
        text = json.dumps(settings, indent=2, sort_keys=True, default=str)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    def _peft_name(self, piece: Piece) -> str:
        if piece.factor == "head" and self.head is not None:
            return f"{self.head.name}.{piece.layer}"
        return f"{piece.layer}.lora_{piece.factor}.weight"


def attach(
    model: PreTrainedModel,
    head: Head | None = None,
    *,
    lora_rank: int,
    lora_scaling: float,
    dropout: float,
    target_modules: tuple[str, ...] | str,
    base_name: str,
) -> Adapters:
    """Let PEFT choose and name the layers, then put stacked layers in their places.

    Call it after the backbone is sharded: what DeepSpeed has not seen stays on this process.

    Args:
        model: the frozen backbone; changed in place.
        head: its classification head, where each client trains one.
        lora_rank: r.
        lora_scaling: gamma.
        dropout: probability on the adapters' input.
        target_modules: names as PEFT takes them, or "all-linear".
        base_name: written into exported adapters as the name of their base model.

    Raises:
        UserError: where a target does not exist or is not a linear layer.
    """
    request = LoraConfig(
        r=lora_rank,
        lora_alpha=peft_alpha(lora_scaling, lora_rank),
        use_rslora=True,
        lora_dropout=dropout,
        target_modules=target_modules if isinstance(target_modules, str) else list(target_modules),
        # A classifier's type would make PEFT copy the head, which is not its business here.
        task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        base_model_name_or_path=base_name,
    )
    found, peft_config = _choose_layers(model, request)
    context = PassContext()
    layers: dict[str, StackedLoraLinear] = {}
    for index, name in enumerate(sorted(found)):
        base_layer = found[name].get_base_layer()
        layers[name] = StackedLoraLinear(base_layer, lora_scaling, dropout, index, context)
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[name])
    shapes = [(name, found[name].in_features, found[name].out_features) for name in layers]
    weights = None if head is None else {n: tuple(w.shape) for n, w in head.initial.items()}
    layout = Layout.of(shapes, lora_rank, weights)
    return Adapters(layers, layout, peft_config, context, head, model.dtype)


def _choose_layers(
    model: PreTrainedModel, request: LoraConfig
) -> tuple[dict[str, LoraLayer], LoraConfig]:
    """Let PEFT put its layers into the model; returns them by name, and its final configuration.

    Raises:
        UserError: where a target does not exist or is not a linear layer.
    """
    targets = request.target_modules
    try:
        # On the meta device: the factors that train are rows of our own buffers.
        peft_model = get_peft_model(model, request, low_cpu_mem_usage=True)
    except (ValueError, re.error) as error:
        raise _wrong_targets(model, targets, str(error).splitlines()[0]) from None
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    for target in () if isinstance(targets, str) else targets:  # PEFT is content with one of them
        if not any(f".{name}".endswith(f".{target}") for name in found):
            raise _wrong_targets(model, targets, f"{target!r} is no layer of this model.")
    for name, layer in found.items():
        if not _is_linear(layer.get_base_layer()):
            kind = type(layer.get_base_layer()).__name__
            raise _wrong_targets(model, targets, f"{name} is a {kind}, not a linear layer.")
    return found, peft_model.peft_config["default"]


def _wrong_targets(model: PreTrainedModel, targets: object, reason: str) -> UserError:
    known = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if _is_linear(m)})
    return UserError(
        f"lora.target_modules = {_plain(targets)!r}: {reason} The linear layers of this model are "
        f"{', '.join(known)}"
    )


def _plain(targets: object) -> object:
    return targets if isinstance(targets, str) else sorted(targets)  # type: ignore[call-overload]


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in _SUPPORTED_LAYERS
