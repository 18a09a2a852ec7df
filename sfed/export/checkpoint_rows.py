"""The adapters of a checkpoint, one client at a time; needs neither the run nor its data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from sfed.lora.layout import Layout
from sfed.methods.aggregation import weighted_sum
from sfed.methods.holders import Holders, sum_of_common_b
from sfed.storage.checkpoint import client_prefix
from sfed.storage.checkpoint_folder import COMMON, CheckpointRef, packs_of
from sfed.utils.errors import CheckpointError
from sfed.utils.text import one_line

_MOST_OPEN = 8


@dataclass(frozen=True)
class CheckpointRows:
    """Adapters of a checkpoint as rows: A, B and head of a client in a vector."""

    found: CheckpointRef
    layout: Layout
    gammas: Sequence[float] = ()
    """(N,) of each client where LoRA ranks differ, else empty."""
    _opened: dict[str, tuple[Any, frozenset[str]]] = field(default_factory=dict)

    def row(self, client: int) -> torch.Tensor:
        """One client's adapter, (layout.size,) fp32: what is its own, else what is shared.

        Raises:
            CheckpointError: where the files do not hold it.
        """
        row = torch.empty(self.layout.size)
        own = self._files.get(client)
        for factor in self.layout.factors:
            name, values = factor.lower(), None
            if own is not None:
                values = self._read(own, f"{client_prefix(client)}/{name}", factor)
            if values is None:
                values = self._common(factor).clone()
                self.layout.take_common([client], factor, values[None])
            row[self.layout.columns(factor)] = values
        return row

    def _common(self, factor: str) -> torch.Tensor:
        values = self._read(COMMON, f"common/{factor.lower()}", factor)
        if values is None:
            raise CheckpointError(f"{self.found.folder / COMMON} lacks common/{factor.lower()}")
        return values

    def global_row(self, weights: Sequence[float], own_factors: Sequence[str]) -> torch.Tensor:
        """The global adapter (A, mean B, mean head), (layout.size,); see ``aggregation``.

        One client's adapter is in memory at a time.

        Args:
            weights: (N,) of all clients, summing to 1.
            own_factors: what clients hold their own of; the rest is the same on all of them.
        """
        row = torch.cat([self._common(factor) for factor in self.layout.factors])
        if own_factors:
            mean = weighted_sum(self._rows(len(weights)), weights)
            holders = Holders(self.layout, weights)
            for factor in own_factors:
                columns = self.layout.columns(factor)
                row[columns] = holders.mean(factor, mean[columns], row[columns])
        if self.layout.has_mixed_ranks:
            columns = self.layout.columns("B")
            of_b = [w * g for w, g in zip(weights, self.gammas, strict=True)]
            row[columns] = (
                weighted_sum(self._rows(len(weights)), of_b)[columns]
                if "B" in own_factors
                else sum_of_common_b(self.layout, row[columns], of_b)
            )
        return row

    def _rows(self, num_clients: int) -> Iterator[torch.Tensor]:
        return (self.row(client) for client in range(num_clients))

    @cached_property
    def _files(self) -> dict[int, str]:
        """The file of each client that has one."""
        packs = packs_of(self.found.metadata)
        return {client: name for name, clients in packs.items() for client in clients}

    def _open(self, file: str) -> tuple[Any, frozenset[str]]:
        """A file and the names of its tensors; a few stay open, since each holds many clients."""
        if file not in self._opened:
            opened: Any = safe_open(self.found.folder / file, framework="pt")
            if len(self._opened) >= _MOST_OPEN:
                del self._opened[next(iter(self._opened))]
            self._opened[file] = opened, frozenset(opened.keys())
        return self._opened[file]

    def _read(self, file: str, key: str, factor: str) -> torch.Tensor | None:
        """A tensor of a file; None where the file holds none of that name."""
        path, columns = self.found.folder / file, self.layout.columns(factor)
        try:
            opened, names = self._open(file)
            if key not in names:
                return None
            tensor: torch.Tensor = opened.get_tensor(key)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"{path} cannot be read ({one_line(error)})") from None
        if tensor.shape != (columns.stop - columns.start,):
            raise CheckpointError(
                f"{path}: {key} has the shape {tuple(tensor.shape)} and this model needs "
                f"({columns.stop - columns.start},); it belongs to another model"
            )
        return tensor
