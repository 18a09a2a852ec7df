"""The clients of this process: one row of numbers each, and the rows that are in a pass right now.

A client's state is its adapter (A, B, and its classification head if any), the optimizer's moments
for it, how many optimizer steps it has made and how many examples it has drawn. Where all clients
of a process share one pass, the rows are used where they lie; where fewer do, all rows rest in host
memory and those of a pass are brought to the device and back.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from sfed.adapters import Adapters, Layout
from sfed.seeds import Stream, derive

MOMENTS = ("exp_avg", "exp_avg_sq")
FACTORS = ("A", "B", "head")


@dataclass
class Rows:
    """The clients of a pass, on the device."""

    clients: tuple[int, ...]
    values: torch.Tensor
    """(C, layout.size) fp32: A, B, head."""
    grads: torch.Tensor
    """(C, layout.size) fp32."""
    moments: dict[str, torch.Tensor]
    """Each (C, layout.size) fp32; empty for SGD."""
    optimizer_steps: torch.Tensor
    """(C, 3) fp32, whole numbers: steps that A, that B and that the head have made."""

    def put_back(self, bad_C: torch.Tensor, start: torch.Tensor) -> None:
        """Give the clients of a (C,) bool mask their values of the start, and fresh moments."""
        self.values.copy_(torch.where(bad_C[:, None], start, self.values))
        self.optimizer_steps.masked_fill_(bad_C[:, None], 0.0)
        for moment in self.moments.values():
            moment.masked_fill_(bad_C[:, None], 0.0)


class ClientRows:
    """The state of all clients of this process."""

    def __init__(
        self,
        own: range,
        layout: Layout,
        device: torch.device,
        *,
        clients_per_pass: int,
        moments: Sequence[str],
    ) -> None:
        """Allocate zeros.

        Args:
            own: the clients of this process.
            layout: of a row.
            device: of the passes.
            clients_per_pass: most clients in one pass.
            moments: names of the optimizer's buffers.
        """
        self.own = own
        self.layout = layout
        self.clients_per_pass = min(clients_per_pass, len(own))
        self._device = device
        resting_place = device if self.clients_per_pass == len(own) else torch.device("cpu")
        shape = (len(own), layout.size)
        self.values = torch.zeros(shape, device=resting_place)
        self.moments = {name: torch.zeros(shape, device=resting_place) for name in moments}
        self.optimizer_steps = torch.zeros(len(own), len(FACTORS), device=resting_place)
        self.examples_drawn = dict.fromkeys(own, 0)
        self._grads = torch.zeros(self.clients_per_pass, layout.size, device=device)

    def groups(self, clients: Sequence[int]) -> Iterator[tuple[int, ...]]:
        """Split clients into those of one pass each."""
        yield from groups(clients, self.clients_per_pass)

    def load(self, clients: Sequence[int]) -> Rows:
        """Bring these clients to the device; without a copy where they are all of this process."""
        everything = [self.values, self.optimizer_steps, *self.moments.values()]
        if tuple(clients) != tuple(self.own) or self.values.device != self._device:
            index = self._index(clients)
            everything = [one[index].to(self._device) for one in everything]
        values, steps, *moments = everything
        named = dict(zip(self.moments, moments, strict=True))
        return Rows(tuple(clients), values, self._grads[: len(clients)], named, steps)

    def load_values(self, clients: Sequence[int]) -> torch.Tensor:
        """Bring only the adapters of these clients to the device: (C, layout.size)."""
        if tuple(clients) == tuple(self.own) and self.values.device == self._device:
            return self.values
        return self.values[self._index(clients)].to(self._device)

    def store(self, rows: Rows) -> None:
        """Take rows back that ``load`` copied."""
        if rows.values.data_ptr() == self.values.data_ptr():
            return
        index = self._index(rows.clients).to(self.values.device)
        home = self.values.device
        self.values[index] = rows.values.to(home)
        self.optimizer_steps[index] = rows.optimizer_steps.to(home)
        for name, moment in rows.moments.items():
            self.moments[name][index] = moment.to(home)

    def row(self, client: int) -> torch.Tensor:
        """One client's adapter, (layout.size,)."""
        return self.values[client - self.own.start]

    def reset_optimizer(self) -> None:
        """Forget all moments."""
        self.optimizer_steps.zero_()
        for moment in self.moments.values():
            moment.zero_()

    def tensors(self, client: int) -> dict[str, torch.Tensor]:
        """One client's state under the names of a checkpoint; views, so loading writes in place."""
        position = client - self.own.start
        named: dict[str, torch.Tensor] = {}
        for factor in self.layout.factors:
            columns, short = self.layout.columns(factor), factor.lower()
            named[short] = self.values[position, columns]
            for name, moment in self.moments.items():
                named[f"{short}_{name}"] = moment[position, columns]
        named["optimizer_steps"] = self.optimizer_steps[position]
        return named

    def _index(self, clients: Sequence[int]) -> torch.Tensor:
        return torch.tensor(
            [client - self.own.start for client in clients],
            dtype=torch.long,
            device=self.values.device,
        )


def groups(clients: Sequence[int], clients_per_pass: int) -> Iterator[tuple[int, ...]]:
    """Split clients into consecutive groups of at most ``clients_per_pass``."""
    for start in range(0, len(clients), clients_per_pass):
        yield tuple(clients[start : start + clients_per_pass])


def draw_initial(clients: ClientRows, adapters: Adapters, *, seed: int, independent: bool) -> None:
    """Give each client its first A, from (seed, client) or from one draw for all; B stays 0.

    Heads start the same on all clients.
    """
    columns, head = adapters.layout.columns("A"), adapters.layout.columns("head")
    for client in clients.own:
        words = (seed, client) if independent else (seed,)
        generator = torch.Generator().manual_seed(derive(Stream.INIT_A, *words))
        clients.row(client)[columns] = adapters.initial_a(generator).to(clients.values.device)
        clients.row(client)[head] = adapters.initial_head().to(clients.values.device)
