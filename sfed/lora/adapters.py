"""The trainer's only file that imports PEFT: attach adapters, point them at rows, merge them.

A client's adapter is one row of fp32 numbers: the A factors of all layers, then the B factors, both
in the sorted order of the layers' names but layers that read the same input next to each other,
then the weights of its classification head where the task has one. A row's A part is the message of
the round.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import PreTrainedModel

from sfed.lora import targets
from sfed.lora.factors import Factors, PassRows
from sfed.lora.frozen.quantized import CodedLinear
from sfed.lora.head import Head
from sfed.lora.layout import Layout, Piece
from sfed.lora.linear import PassContext, Siblings, StackedLoraLinear
from sfed.lora.peft_form import PREFIX, PeftForm, peft_alpha
from sfed.utils.errors import UserError
from sfed.utils.text import one_line


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
        context: PassContext,
        head: Head | None,
        peft_form: PeftForm,
    ) -> None:
        self.layers = layers
        self.layout = layout
        self.context = context
        self.head = head
        self.peft_form = peft_form
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


@dataclass(frozen=True)
class LoraSpec:
    """Which layers are adapted, and how."""

    lora_rank: int
    """r, the largest where they differ."""
    lora_scaling: float
    """gamma; 1 where the ranks of the clients differ, who have each their own then."""
    dropout: float
    """Probability on the adapters' input."""
    target_modules: targets.Targets
    """Names as PEFT takes them, or "all-linear"."""
    base_name: str
    """Written into exported adapters as the name of their base model."""
    client_ranks: tuple[int, ...] = ()
    """(N,) r of each client; empty where all are the same."""
    client_gammas: tuple[float, ...] = ()
    """(N,) gamma of each client; empty where all ranks are the same."""
    b_scales: tuple[float, ...] = ()
    """(N,) as of ``Layout``."""

    def for_peft(self, model: PreTrainedModel) -> LoraConfig:
        """Return the equivalent PEFT configuration."""
        names = self.target_modules
        return LoraConfig(
            r=self.lora_rank,
            lora_alpha=peft_alpha(self.lora_scaling, self.lora_rank),
            lora_dropout=self.dropout,
            target_modules=names if isinstance(names, str) else list(names),
            # A classifier's type would make PEFT copy the head, which is not its business here.
            task_type="CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        )


def attach(model: PreTrainedModel, spec: LoraSpec, head: Head | None = None) -> Adapters:
    """Replace the layers that are asked for by stacked LoRA layers.

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
    found, changed = _wrapped(model, spec.target_modules, request)
    if head is not None:
        module_names += head.module_names()
    # Not as PEFT changed it: it names the model and rewrites the targets of mixtures of experts.
    peft_config = dataclasses.replace(
        request,
        target_modules=targets.shortened(found, set(module_names).difference(found)),
        fan_in_fan_out=changed.fan_in_fan_out or _were_transposed(found),
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
    layout = dataclasses.replace(layout, ranks=spec.client_ranks, b_scales=spec.b_scales)
    settings = {**peft_config.to_dict(), "inference_mode": True}
    peft_form = PeftForm(layout, head, settings, spec.client_gammas)
    return Adapters(layers, layout, context, head, peft_form)


def _wrapped(
    model: PreTrainedModel, asked: targets.Targets, request: LoraConfig
) -> tuple[dict[str, LoraLayer], LoraConfig]:
    """Let PEFT wrap the layers that are asked for; returns them by name, and what PEFT was asked.

    Raises:
        UserError: where a target is no linear layer, or PEFT would not adapt these layers alone.
    """
    names, known = targets.chosen(model, asked), targets.linear_layers(model)
    is_transposed = all(targets.is_transposed(model.get_submodule(name)) for name in names)
    own = dataclasses.replace(request, target_modules=names, fan_in_fan_out=is_transposed)
    try:
        # On the meta device: the factors that train are rows of our own buffers.
        get_peft_model(model, own, low_cpu_mem_usage=True)
    except ValueError as error:
        left = {name for name in known if repr(name.rpartition(".")[2]) not in str(error)}
        raise targets.wrong(
            asked, f"PEFT refuses it ({one_line(error).rstrip('.')})", left
        ) from None
    found = {n: m for n, m in model.named_modules() if isinstance(m, LoraLayer)}
    if less := targets.last_parts(set(names).difference(found)):
        reason = f"PEFT reads {', '.join(sorted(less))} as names of fused experts"
        left = {name for name in known if name.rpartition(".")[2] not in less}
        raise targets.wrong(asked, reason, left)
    if more := sorted(found.keys() - names):
        raise targets.wrong(asked, f"PEFT would adapt {more[0]} too", known)
    for name, layer in found.items():
        if (layer.r["default"], layer.scaling["default"]) != _rank_and_scaling(request):
            raise AssertionError(f"PEFT gives {name} a rank or a scaling of its own")
    return found, own


def _were_transposed(found: Mapping[str, LoraLayer]) -> bool:
    """Whether quantised layers, which PEFT has seen, are Conv1D in the model that users load."""
    layers = (layer.get_base_layer() for layer in found.values())
    return any(isinstance(layer, CodedLinear) and layer.was_transposed for layer in layers)


def _rank_and_scaling(request: LoraConfig) -> tuple[int, float]:
    return request.r, request.lora_alpha / request.r


def merged(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """Add an adapter to the weights of its base model, layer by layer, through stock PEFT.

    No second model is made: beside the model there is the change of one layer at a time, computed
    in fp32 and rounded to the dtype of the weights. A head in the folder takes the place of the
    model's.

    Args:
        model: the base model; changed in place.
        folder: of an adapter that ``PeftForm.write`` wrote.

    Returns:
        The model without PEFT's wrappers.

    Raises:
        UserError: where a weight is stored quantised, or is the weight of another layer too.
    """
    wrapped = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
    adapted = {n: m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in adapted.items():
        _refuse_unmergeable(wrapped, name.removeprefix(PREFIX), layer)
    plain: PreTrainedModel = wrapped.merge_and_unload()
    return plain


def _refuse_unmergeable(model: nn.Module, name: str, layer: LoraLayer) -> None:
    weight = layer.get_base_layer().weight
    if not weight.is_floating_point():
        raise UserError(
            f"--merge: {name} is stored as {weight.dtype}; an adapter is merged into weights of "
            "16 or 32 bits only. Load the adapter beside its base model instead"
        )
    holders = [n for n, one in model.named_parameters(remove_duplicate=False) if one is weight]
    if len(holders) > 1:
        raise UserError(
            f"--merge: the weight of {name} is that of the embedding too (tie_word_embeddings), so "
            "it cannot be changed alone. Load the adapter beside its base model instead"
        )
