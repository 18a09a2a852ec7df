"""A client's row as a stock PEFT adapter in a folder: names of tensors, settings, both ways.

Needs no PEFT: its settings come as a mapping.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from sfed.lora.head import Head
from sfed.lora.layout import Layout, Piece
from sfed.lora.tensor_files import write_tensors
from sfed.utils.errors import UserError
from sfed.utils.files import write_changed
from sfed.utils.json_text import plain_json
from sfed.utils.text import counted, one_line

PREFIX = "base_model.model."
"""Before the name of every tensor that PEFT saves."""
_WEIGHTS, _SETTINGS = "adapter_model.safetensors", "adapter_config.json"


@dataclass(frozen=True)
class PeftForm:
    """How the rows of one model's adapters are written as PEFT adapters, and read."""

    layout: Layout
    head: Head | None
    settings: Mapping[str, Any]
    """PEFT's, of the adapter of the largest rank."""
    gammas: tuple[float, ...] = ()
    """(N,) of each client; empty where all have the same."""

    def tensor_shapes(self, factors: Sequence[str]) -> dict[str, tuple[int, ...]]:
        """The shape of each tensor of some factors, by its name in PEFT's files without prefix."""
        return {self._name(p): p.shape for p in self.layout.pieces if p.factor in factors}

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
            names = [self._name(p) for p in self.layout.pieces if p.factor == factor]
            flat = [tensors[f"{PREFIX}{name}"].float().flatten() for name in names]
            found[factor] = torch.cat(flat)
            if not torch.isfinite(found[factor]).all():
                raise ValueError(f"{factor} holds numbers that are not finite")
        return found

    def rank_and_gamma(self, client: int | None) -> tuple[int, float]:
        """LoRA rank and gamma of a client's adapter; None = of the global one."""
        if client is not None and self.gammas:
            return self.layout.rank_of(client), self.gammas[client]
        return self.layout.lora_rank, self.settings["lora_alpha"] / self.settings["r"]

    def write(
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
        settings = dict(self.settings)
        if client is not None and self.gammas:
            settings |= {"r": lora_rank, "lora_alpha": peft_alpha(gamma, lora_rank)}
        by_piece = _cut(self.layout, row.detach().cpu(), lora_rank)
        if changes:
            by_piece, ranks = _with_changes(by_piece, gamma, changes)
            settings |= _patterns(ranks)
        tensors = {f"{PREFIX}{self._name(piece)}": values for piece, values in by_piece.items()}
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

    def read(self, folder: Path) -> torch.Tensor:
        """Read a row from a folder that ``write`` wrote, or stock PEFT.

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
            name = f"{PREFIX}{self._name(piece)}"
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

    def _name(self, piece: Piece) -> str:
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
