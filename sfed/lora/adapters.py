"""The trainer's only file that knows PEFT: attach adapters, flat buffers, writing PEFT folders.

A client's adapter is one row of fp32 numbers: the A factors of all layers, then the B factors, both
in the sorted order of the layers' names but layers that read the same input next to each other,
then the weights of its classification head where the task has one. A row's A part is the message of
the round.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from sfed.lora import targets
from sfed.lora.factors import Factors, PassRows
from sfed.lora.frozen.quantized import CodedLinear
from sfed.lora.head import Head
from sfed.lora.layout import Layout, Piece
from sfed.lora.linear import PassContext, Siblings, StackedLoraLinear
from sfed.lora.tensor_files import write_tensors
from sfed.utils.errors import UserError
from sfed.utils.files import write_changed
from sfed.utils.json_text import plain_json
from sfed.utils.text import counted, one_line

_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."


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
        gammas: Sequence[float] = (),
    ) -> None:
        self.layers = layers
        self.layout = layout
        self.gammas = tuple(gammas)
        """(N,) of each client; empty where all have the same."""
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

    def tensor_shapes(self, factors: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of some factors, by its name in PEFT's files without prefix."""
        return {self._peft_name(p): p.shape for p in self.layout.pieces if p.factor in factors}

    def read_factors(self, folder: Path, factors: Sequence[str]) -> dict[str, torch.Tensor]:
        """Read some factors of a stock PEFT adapter.

        Args:
            folder: of adapter_model.safetensors, with tensors of the shapes of ``tensor_shapes``.
            factors: some of A, B and head.

        Returns:
            (parameters of the factor,) fp32 on CPU by factor.

        Raises:
            OSError, SafetensorError: where it cannot be read.
            ValueError: where it holds no finite numbers.
        """
        tensors = load_file(folder / _WEIGHTS)
        found: dict[str, torch.Tensor] = {}
        for factor in factors:
            names = [self._peft_name(p) for p in self.layout.pieces if p.factor == factor]
            flat = [tensors[f"{_PREFIX}{name}"].float().flatten() for name in names]
            found[factor] = torch.cat(flat)
            if not torch.isfinite(found[factor]).all():
                raise ValueError(f"{factor} holds numbers that are not finite")
        return found

    def rank_and_gamma(self, client: int | None) -> tuple[int, float]:
        """LoRA rank and gamma of a client's adapter; None = of the global one."""
        if client is not None and self.gammas:
            return self.layout.rank_of(client), self.gammas[client]
        return self.layout.lora_rank, self.peft_config.lora_alpha / self.peft_config.r

    def write_peft_folder(
        self,
        folder: Path,
        row: torch.Tensor,
        changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]] | None = None,
        client: int | None = None,
    ) -> None:
        """Write one client's row as a stock PEFT adapter, whole or not at all.

        Files that hold this adapter already are left alone.

        ``PeftModel.from_pretrained(base, folder)`` then computes what the trainer computed, and so
        does other software: ``lora_alpha / r`` is gamma, without rsLoRA's flag, which some ignore.

        Args:
            folder: of adapter_config.json and adapter_model.safetensors; parents are made.
            row: (layout.size,) of any device.
            changes: U (out, q) and V (q, in) by layer, where U V was added to a frozen weight. The
                adapter then is [gamma B | U] and [A; V] with the factor 1, of a rank of its own in
                each layer, for the weights as they were loaded.
            client: whose it is: of its LoRA rank, without the zeros beyond it, and with its gamma;
                None = the global adapter, of the largest rank.

        Raises:
            OSError, SafetensorError: where a file cannot be written.
        """
        lora_rank, gamma = self.rank_and_gamma(client)
        settings = dict(self._peft_settings)
        if client is not None and self.gammas:
            settings |= {"r": lora_rank, "lora_alpha": peft_alpha(gamma, lora_rank)}
        by_piece = _cut(self.layout, row.detach().cpu(), lora_rank)
        if changes:
            by_piece, ranks = _with_changes(by_piece, gamma, changes)
            settings |= _patterns(ranks)
        tensors = {
            f"base_model.model.{self._peft_name(piece)}": values
            for piece, values in by_piece.items()
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(tensors, folder / _WEIGHTS, {"format": "pt"})
        if self.head is not None:
            settings["task_type"] = "SEQ_CLS"
            settings["modules_to_save"] = self.head.modules
        if float(settings["lora_alpha"]).is_integer():  # PEFT calls it an int; so may a reader
            settings["lora_alpha"] = int(settings["lora_alpha"])
        plain = {key: plain_json(key, value) for key, value in settings.items()}
        text = json.dumps(plain, indent=2, sort_keys=True, allow_nan=False)
        write_changed(folder / _SETTINGS, text + "\n")

    @cached_property
    def _peft_settings(self) -> dict[str, Any]:
        """PEFT's settings of all adapters: it takes long to list them."""
        return {**self.peft_config.to_dict(), "inference_mode": True}

    def read_peft_folder(self, folder: Path) -> torch.Tensor:
        """Read a row from a folder that ``write_peft_folder`` wrote, or stock PEFT.

        Args:
            folder: of adapter_model.safetensors.

        Returns:
            (layout.size,) fp32 on the CPU; zeros beyond the rank of a layer with a smaller one.

        Raises:
            UserError: where the file cannot be read, or holds other tensors than the adapted layers
                of this model have.
        """
        file = folder / _WEIGHTS
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{file} cannot be read ({one_line(error)})") from None
        row = torch.zeros(self.layout.size)
        for piece in self.layout.pieces:
            name = f"{_PREFIX}{self._peft_name(piece)}"
            tensor = tensors.pop(name, None)
            if tensor is None or not piece.has_room_for(tensor.shape):
                found = "missing" if tensor is None else f"of shape {tuple(tensor.shape)}"
                raise UserError(
                    f"{file}: the tensor {name} is {found}; on this base model it has the shape "
                    f"{piece.shape}. The adapter belongs to another base model, or is of a kind "
                    "that sfed does not know"
                )
            piece.of(row[None])[0][tuple(map(slice, tensor.shape))] = tensor
        if tensors:
            raise UserError(
                f"{file}: {counted(len(tensors), 'tensor')}, such as {next(iter(tensors))}, "
                "have no place on this base model"
            )
        return row

    def _peft_name(self, piece: Piece) -> str:
        if piece.factor == "head" and self.head is not None:
            return self.head.full_name(piece.layer)
        return f"{piece.layer}.lora_{piece.factor}.weight"


def _cut(layout: Layout, row: torch.Tensor, lora_rank: int) -> dict[Piece, torch.Tensor]:
    """The factors of a row as a client of this rank has them: new tensors, contiguous."""
    by_piece = {piece: row[piece.start : piece.end].view(piece.shape) for piece in layout.pieces}
    cuts = {"A": (slice(lora_rank),), "B": (slice(None), slice(lora_rank)), "head": (...,)}
    return {
        piece: values[cuts[piece.factor]].clone(memory_format=torch.contiguous_format)
        for piece, values in by_piece.items()
    }


def _with_changes(
    by_piece: Mapping[Piece, torch.Tensor],
    gamma: float,
    changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]],
) -> tuple[dict[Piece, torch.Tensor], dict[str, int]]:
    """Factors with the factor 1 that hold changes of the weights too, and each layer's rank.

    Where B is zero, as after a round of FLoRA, only the change is left.
    """
    unused = {
        piece.layer
        for piece, values in by_piece.items()
        if piece.factor == "B" and piece.layer in changes and not values.any()
    }
    become: dict[Piece, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    for piece, values in by_piece.items():
        if piece.factor in ("A", "B"):
            is_a, parts = piece.factor == "A", []
            if piece.layer not in unused:
                parts.append(values if is_a else gamma * values)
            if piece.layer in changes:
                parts.append(changes[piece.layer][1 if is_a else 0])
            values = torch.cat(parts, dim=0 if is_a else 1).contiguous()
            ranks[piece.layer] = values.shape[0 if is_a else 1]
        become[piece] = values
    return become, ranks


def _patterns(ranks: Mapping[str, int]) -> dict[str, Any]:
    """PEFT's settings of layers with ranks of their own and the factor 1.

    ``lora_alpha / r`` is 1 as well, for readers that do not know patterns.
    """
    largest = max(ranks.values())
    others = {layer: lora_rank for layer, lora_rank in ranks.items() if lora_rank != largest}
    return {
        "r": largest,
        "lora_alpha": largest,
        "rank_pattern": others,
        "alpha_pattern": others,
    }


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
    return Adapters(layers, layout, peft_config, context, head, spec.client_gammas)


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
        folder: of an adapter that ``write_peft_folder`` wrote.

    Returns:
        The model without PEFT's wrappers.

    Raises:
        UserError: where a weight is stored quantised, or is the weight of another layer too.
    """
    wrapped = PeftModel.from_pretrained(model, folder, low_cpu_mem_usage=True)
    adapted = {n: m for n, m in wrapped.named_modules() if isinstance(m, LoraLayer)}
    for name, layer in adapted.items():
        _refuse_unmergeable(wrapped, name.removeprefix(_PREFIX), layer)
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
