"""The trainer's only file that knows PEFT: attach adapters, flat buffers, writing PEFT folders.

A client's adapter is one row of fp32 numbers: the A factors of all layers, then the B factors, both
in the sorted order of the layers' names but layers that read the same input next to each other,
then the weights of its classification head where the task has one. A row's A part is the message of
the round.
"""

from __future__ import annotations

import dataclasses
import enum
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sfed.lora.factors import Factors, PassRows
from sfed.lora.head import Head
from sfed.lora.layout import Layout, Piece
from sfed.lora.linear import PassContext, Siblings, StackedLoraLinear
from sfed.lora.tensor_files import save_tensors
from sfed.utils.errors import UserError
from sfed.utils.files import replacing

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
    ) -> None:
        self.layers = layers
        self.layout = layout
        self.peft_config = peft_config
        self.context = context
        self.head = head
        self._siblings = list(_siblings(layers, layout))

    def bind(
        self,
        values: torch.Tensor,
        grads: torch.Tensor | None = None,
        trained: Sequence[str] = (),
        gammas: Sequence[float] | None = None,
    ) -> None:
        """Point all layers at the rows of ``values``.

        Args:
            values: (C, layout.size) fp32 rows of the clients of the coming passes.
            grads: same shape; backward adds to it in place. None where nothing trains.
            trained: factors that get gradients.
            gammas: (C,) of each client, where their LoRA ranks differ; None = the one of all.
        """
        rows = PassRows(values, grads, self.context.dtype, gammas)
        for siblings, a_pieces, b_pieces in self._siblings:
            siblings.bind(Factors.of(rows, a_pieces, b_pieces, trained))
        if self.head is not None:
            self.head.bind(self._head_weights(values, grads if "head" in trained else None))

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

    def initial_a(self, generator: torch.Generator, lora_rank: int | None = None) -> torch.Tensor:
        """Draw all A factors of one client as PEFT does: kaiming_uniform(a = sqrt 5).

        In the sorted order of the layers' names, wherever they stand in a row.

        Args:
            generator: on CPU.
            lora_rank: of the client; None = the largest. The draw is that of a run of this rank.

        Returns:
            (parameters of A,) fp32 on CPU; each A is uniform in +-1/sqrt(in), and 0 in the rows
            beyond the rank.
        """
        row = torch.zeros(self.layout.columns("A").stop)
        a_pieces = [piece for piece in self.layout.pieces if piece.factor == "A"]
        for piece in sorted(a_pieces, key=lambda piece: piece.layer):
            largest, in_features = piece.shape
            bound = 1.0 / math.sqrt(in_features)
            end = piece.start + (lora_rank or largest) * in_features
            row[piece.start : end].uniform_(-bound, bound, generator=generator)
        return row

    def initial_head(self) -> torch.Tensor:
        """The weights with which every client's head starts: (parameters of the head,) fp32."""
        if self.head is None:
            return torch.empty(0)
        names = [piece.layer for piece in self.layout.pieces if piece.factor == "head"]
        return torch.cat([self.head.initial[name].flatten() for name in names])

    def write_peft_folder(
        self,
        folder: Path,
        row: torch.Tensor,
        lora_rank: int | None = None,
        gamma: float | None = None,
    ) -> None:
        """Write one client's row as a stock PEFT adapter, whole or not at all.

        ``PeftModel.from_pretrained(base, folder)`` then computes what the trainer computed, and so
        does other software: ``lora_alpha / r`` is gamma, without rsLoRA's flag, which some ignore.

        Args:
            folder: of adapter_config.json and adapter_model.safetensors; parents are made.
            row: (layout.size,) of any device.
            lora_rank: of the adapter, without the zeros beyond it; None = the largest.
            gamma: of the adapter; None = the one of all.

        Raises:
            OSError, SafetensorError: where a file cannot be written.
        """
        row, kept = row.detach().cpu(), slice(lora_rank)
        places = {"A": (kept, slice(None)), "B": (slice(None), kept)}
        tensors = {
            f"base_model.model.{self._peft_name(piece)}": row[piece.start : piece.end]
            .view(piece.shape)[places.get(piece.factor, ...)]
            .clone(memory_format=torch.contiguous_format)
            for piece in self.layout.pieces
        }
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "adapter_model.safetensors") as temporary:
            save_tensors(tensors, temporary, {"format": "pt"})
        settings = {**self.peft_config.to_dict(), "inference_mode": True}
        if lora_rank is not None and gamma is not None:
            settings |= {"r": lora_rank, "lora_alpha": peft_alpha(gamma, lora_rank)}
        if self.head is not None:
            settings["task_type"] = "SEQ_CLS"
            settings["modules_to_save"] = self.head.modules
        if float(settings["lora_alpha"]).is_integer():  # PEFT calls it an int; so may a reader
            settings["lora_alpha"] = int(settings["lora_alpha"])
        plain = {key: plain_json(key, value) for key, value in settings.items()}
        text = json.dumps(plain, indent=2, sort_keys=True, allow_nan=False)
        (folder / "adapter_config.json").write_text(text + "\n", encoding="utf-8")

    def _peft_name(self, piece: Piece) -> str:
        if piece.factor == "head" and self.head is not None:
            return self.head.full_name(piece.layer)
        return f"{piece.layer}.lora_{piece.factor}.weight"


@dataclass(frozen=True)
class LoraSpec:
    """Which layers are adapted, and how."""

    lora_rank: int
    """r, the largest where they differ."""
    lora_scaling: float
    """gamma; 1 where the ranks of the clients differ, who have each their own then."""
    dropout: float
    """Probability on the adapters' input."""
    target_modules: tuple[str, ...] | str
    """Names as PEFT takes them, or "all-linear"."""
    base_name: str
    """Written into exported adapters as the name of their base model."""
    client_ranks: tuple[int, ...] = ()
    """(N,) r of each client; empty where all are the same."""

    def for_peft(self, model: PreTrainedModel) -> LoraConfig:
        """Return the equivalent PEFT configuration."""
        targets = self.target_modules
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=peft_alpha(self.lora_scaling, self.lora_rank),
            lora_dropout=self.dropout,
            target_modules=targets if isinstance(targets, str) else list(targets),
            # A classifier's type would make PEFT copy the head, which is not its business here.
            task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        )


def attach(model: PreTrainedModel, spec: LoraSpec, head: Head | None = None) -> Adapters:
    """Replace the layers that PEFT chooses by stacked LoRA layers.

    Call it after the backbone is sharded: what DeepSpeed has not seen stays on this process.

    Args:
        model: the frozen backbone; changed in place.
        spec: which layers are adapted, and how.
        head: its classification head, where each client trains one.

    Raises:
        UserError: where a target does not exist or is not a linear layer.
    """
    request = spec.for_peft(model)
    module_names = [name for name, _ in model.named_modules()]
    found, changed = _choose_layers(model, request)
    if head is not None:
        module_names += head.module_names()
    # Not as PEFT changed it: it names the model and rewrites the targets of mixtures of experts.
    peft_config = dataclasses.replace(
        request,
        target_modules=_short_names(found, set(module_names).difference(found)),
        fan_in_fan_out=changed.fan_in_fan_out,
        base_model_name_or_path=spec.base_name,
    )
    context = PassContext(dtype=model.dtype)
    layers: dict[str, StackedLoraLinear] = {}
    for index, name in enumerate(sorted(found)):
        base_layer = found[name].get_base_layer()
        layers[name] = StackedLoraLinear(
            base_layer, spec.lora_scaling, spec.dropout, index, context
        )
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layers[name])
    shapes = [(name, found[name].in_features, found[name].out_features) for name in layers]
    weights = None if head is None else {n: tuple(w.shape) for n, w in head.initial.items()}
    layout = Layout.of(shapes, spec.lora_rank, weights)
    layout = dataclasses.replace(layout, ranks=spec.client_ranks)
    return Adapters(layers, layout, peft_config, context, head)


def _choose_layers(
    model: PreTrainedModel, request: LoraConfig
) -> tuple[dict[str, LoraLayer], LoraConfig]:
    """Insert PEFT's layers; returns them by name, and the request as PEFT changed it.

    Raises:
        UserError: where a target does not exist or is not a linear layer.
    """
    targets = request.target_modules
    try:
        matched = _matched(model, targets)
        own = dataclasses.replace(request, target_modules=sorted(matched) or targets)
        # On the meta device: the factors that train are rows of our own buffers.
        get_peft_model(model, own, low_cpu_mem_usage=True)
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
        if matched and name not in matched:
            raise _wrong_targets(model, targets, f"PEFT would adapt {name} too.")
        if (layer.r["default"], layer.scaling["default"]) != _rank_and_scaling(request):
            raise AssertionError(f"PEFT gives {name} a rank or a scaling of its own")
    return found, own


def _matched(model: PreTrainedModel, targets: object) -> set[str]:
    """The modules that a pattern names; none where the targets are no pattern.

    PEFT itself keeps only the last parts of what a pattern matches in a mixture of experts, and so
    would adapt the layers of that name in all blocks.
    """
    if not isinstance(targets, str) or targets.lower() == "all-linear":
        return set()
    return {name for name, _ in model.named_modules() if re.fullmatch(targets, name)}


def _rank_and_scaling(request: LoraConfig) -> tuple[int, float]:
    return request.r, request.lora_alpha / request.r


def _short_names(found: Iterable[str], others: Iterable[str]) -> list[str]:
    """Names with which PEFT finds these layers and no others: last parts where those suffice."""
    elsewhere = {name.rpartition(".")[2] for name in others}
    last_parts = {name: name.rpartition(".")[2] for name in found}
    return sorted({name if last in elsewhere else last for name, last in last_parts.items()})


def plain_json(key: str, value: Any) -> Any:
    """Return a value of a configuration as JSON has it; sets become sorted lists.

    Args:
        key: for the error.
        value: null, bool, number, text, list, tuple, set or mapping, also within each other.

    Raises:
        TypeError: where it is anything else, whose printed form no reader could take back.
    """
    if isinstance(value, enum.Enum):
        value = value.value
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    if isinstance(value, (list, tuple)):
        return [plain_json(key, item) for item in value]
    if isinstance(value, (set, frozenset)):
        return sorted(plain_json(key, item) for item in value)
    if isinstance(value, Mapping) and all(isinstance(name, str) for name in value):
        return {name: plain_json(f"{key}.{name}", item) for name, item in value.items()}
    raise TypeError(f"{key} = {value!r} of an adapter's configuration has no form in JSON")


def _wrong_targets(model: PreTrainedModel, targets: object, reason: str) -> UserError:
    known = sorted(_names_of_linear(model))
    return UserError(
        f"lora.target_modules = {_plain(targets)!r}: {reason} The linear layers of this model are "
        f"{', '.join(known)}; name some of them, or choose another model.name"
    )


def _names_of_linear(model: PreTrainedModel) -> set[str]:
    """The last parts of the names of linear layers, as the model has them without PEFT."""
    wrapped = [name for name, module in model.named_modules() if isinstance(module, LoraLayer)]
    kept = {
        name
        for name, module in model.named_modules()
        if _is_linear(module) and not any(name.startswith(f"{one}.") for one in wrapped)
    }
    inside = {name for name in wrapped if _is_linear(model.get_submodule(name).get_base_layer())}
    return {name.rpartition(".")[2] for name in kept - set(wrapped) | inside}


def _plain(targets: object) -> object:
    return targets if isinstance(targets, str) else sorted(targets)  # type: ignore[call-overload]


def _is_linear(module: nn.Module) -> bool:
    return type(module).__name__ in _SUPPORTED_LAYERS


def peft_alpha(gamma: float, lora_rank: int) -> float:
    """Return the ``lora_alpha`` with which LoRA's own rule gives gamma.

    ``alpha / r`` is the one rule that all readers of PEFT folders know; some ignore ``use_rslora``.

    Args:
        gamma: the scaling factor, > 0.
        lora_rank: r, >= 1.

    Returns:
        The alpha for which the fp64 quotient alpha / r is gamma bit by bit; where there is no such
        alpha, the one whose quotient is next to gamma.
    """
    product = gamma * lora_rank
    near = (product, math.nextafter(product, 0.0), math.nextafter(product, math.inf))
    return min(near, key=lambda alpha: abs(alpha / lora_rank - gamma))
