"""The clients of this process: what each holds while it rests, and the rows that are in a pass.

A client's state is its adapter (A, B, and its classification head if any), the optimizer's moments
for it, how many optimizer steps it has made and how many examples it has drawn. Much of it is the
same for many clients: A after a mean, B = 0 and no moments of who has never taken part. So what
clients have in common exists once, and a client holds the parts that are its own.

Where all clients of a process share one pass, they stay on the device. Where fewer do, all of them
rest in host memory, and those of a pass are brought to the device: the next group while the present
one trains, and the one before goes back meanwhile. The device then holds two groups, whatever N.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Sequence

import torch

from sfed.clients.offload import HostOffload
from sfed.clients.state import (
    CONTROL,
    DRAWN,
    FACTORS,
    GRADIENT,
    STEPS,
    Parts,
    PassState,
    part_widths,
)
from sfed.lora.adapters import Adapters
from sfed.lora.layout import Layout, zero_rows
from sfed.utils.rng import Stream, derive


class ClientStore:
    """The state of all clients of this process."""

    def __init__(
        self,
        own: Sequence[int],
        layout: Layout,
        device: torch.device,
        *,
        clients_per_pass: int,
        moments: Sequence[str],
    ) -> None:
        """Create all clients with zeros.

        Args:
            own: the clients of this process, in ascending order.
            layout: of a row.
            device: of the passes.
            clients_per_pass: most clients in one pass.
            moments: names of the optimizer's buffers.
        """
        self.own = tuple(own)
        self.lines = {client: line for line, client in enumerate(own)}
        """Place of each client among those of this process, from 0."""
        self.layout = layout
        self.clients_per_pass = min(clients_per_pass, len(own))
        self.examples_drawn = dict.fromkeys(own, 0)
        self.device = device
        """Of the passes."""
        self.moments = tuple(moments)
        self._ferry = HostOffload(device)
        self._grads = zero_rows(self.clients_per_pass, layout.size, device)
        self._places: list[PassState] = []
        """Memory of the device for groups that come and go: one, or two where there are several."""
        self.controlled: tuple[str, ...] = ()
        """Factors that have control variates."""
        self._stay = self._new_rows() if self.clients_per_pass == len(own) else None
        self.widths = part_widths(layout, moments)
        self._common: Parts = {}
        for factor in layout.factors:
            self._set_common(factor, torch.zeros(self.widths[factor.lower()], device=device))
        self._parts: dict[int, Parts] = {client: {} for client in own}
        self.server_state: Parts = {}
        """What the method's server step keeps for the layers of this process: LAYER/NAME."""
        self.common_state: Parts = {}
        """What the server keeps that is the same on every process: a_m, a_v, a_control, ..."""
        self._changed: set[int] = set()

    def keep_controls(self, factors: Sequence[str]) -> None:
        """Keep control variates of some factors (SCAFFOLD), zero at first. Before any pass."""
        self.controlled = tuple(factors)
        for factor in factors:
            for name in (CONTROL, GRADIENT):
                self.widths[f"{factor.lower()}_{name}"] = self.widths[factor.lower()]
        if self._stay is not None:
            self._stay.controls = self._new_controls()

    def passes(
        self, groups_of_clients: Sequence[tuple[int, ...]], trained: Sequence[str]
    ) -> Generator[PassState, None, None]:
        """Bring in groups of clients, one after another; what trained goes back.

        No client is in two of them. Close the iterator, by its end or with ``contextlib.closing``,
        before anything else reads the clients.

        Args:
            groups_of_clients: who shares a pass.
            trained: the factors that change.
        """
        try:
            coming = [self._bring(group, 0) for group in groups_of_clients[:1]]
            for number in range(len(groups_of_clients)):
                rows, arrival = coming.pop()
                self._ferry.wait(arrival)
                following = groups_of_clients[number + 1 : number + 2]
                coming = [self._bring(group, (number + 1) % 2) for group in following]
                try:
                    yield rows
                finally:
                    self._take_back(rows, trained)
        finally:
            self._ferry.finish()

    def load_values(self, clients: Sequence[int]) -> torch.Tensor:
        """Bring only the adapters of these clients to the device: (C, layout.size)."""
        if self._stay is not None and tuple(clients) == self.own:
            return self._stay.values
        values = torch.empty(len(clients), self.layout.size, device=self.device)
        for factor in self.layout.factors:
            for row, client in zip(values[:, self.layout.columns(factor)], clients, strict=True):
                row.copy_(self.factor(client, factor), non_blocking=True)
        return values

    def factor(self, client: int, factor: str) -> torch.Tensor:
        """One client's factor, flat, where it rests. Not to be written to.

        Of what is shared a client has as much as its LoRA rank, and zeros beyond.
        """
        name = factor.lower()
        if name in self._parts[client]:
            return self._parts[client][name]
        if self.layout.takes_all(client):
            return self._common[name]
        taken = self._common[name].clone()
        self.layout.take_common([client], factor, taken[None])
        return taken

    def on_device(self, client: int, factor: str) -> torch.Tensor:
        """One client's factor, flat, on the device. Not to be written to.

        The host does not wait for the copy of a client that rests.
        """
        return self.factor(client, factor).to(self.device, non_blocking=True)

    def shared(self, factor: str) -> torch.Tensor:
        """The factor of all clients that hold none of their own, flat, where it rests.

        With as many rows as the largest LoRA rank.
        """
        return self._common[factor.lower()]

    def owners(self, factor: str) -> list[int]:
        """The clients whose factor is their own, in order."""
        return [client for client in self.own if factor.lower() in self._parts[client]]

    def row(self, client: int) -> torch.Tensor:
        """A copy of one client's adapter, (layout.size,)."""
        return torch.cat([self.factor(client, factor) for factor in self.layout.factors])

    def set_own(self, client: int, parts: Parts) -> None:
        """Make these parts the client's own."""
        self._changed.add(client)
        if self._stay is None:
            self._parts[client] |= {name: self._ferry.keep(part) for name, part in parts.items()}
            return
        staying = self._stay.parts(self.layout, self.layout.factors)
        for name, part in parts.items():
            self._parts[client][name] = staying[name][self.lines[client]].copy_(part)

    def set_shared(self, factor: str, values: torch.Tensor) -> None:
        """Set the shared value of a factor, (parameters of the factor,)."""
        self._set_common(factor, values)
        for client, parts in self._parts.items():
            if parts.pop(factor.lower(), None) is not None:
                self._changed.add(client)

    def control_change(self, client: int, factor: str) -> torch.Tensor:
        """The mean gradient of the round without the client's control variate, on the device."""
        parts, short = self._parts[client], factor.lower()
        gradient, control = (
            parts[f"{short}_{name}"].to(self.device, non_blocking=True)
            for name in (GRADIENT, CONTROL)
        )
        return gradient - control

    def take_controls(self, clients: Iterable[int]) -> None:
        """Let the mean gradients of the round be these clients' control variates; drop the rest."""
        for client in self.own:
            for short in map(str.lower, self.controlled):
                gradient = self._parts[client].pop(f"{short}_{GRADIENT}", None)
                if gradient is None:
                    continue
                self._changed.add(client)
                if client in clients and self._stay is None:
                    self._parts[client][f"{short}_{CONTROL}"] = gradient
                elif client in clients:
                    self.set_own(client, {f"{short}_{CONTROL}": gradient})

    def reset_optimizer(self) -> None:
        """Forget all moments."""
        of_optimizer = {STEPS} | {
            f"{factor.lower()}_{moment}" for factor in FACTORS for moment in self.moments
        }
        for client, parts in self._parts.items():
            for name in parts.keys() & of_optimizer:
                del parts[name]
                self._changed.add(client)
        if self._stay is not None:
            for buffer in (self._stay.optimizer_steps, *self._stay.moments.values()):
                buffer.zero_()

    def memory(self) -> Iterator[torch.Tensor]:
        """All tensors of the clients, where they rest and where they are in a pass."""
        yield from (*self._common.values(), *self.common_state.values())
        for rows in self._places if self._stay is None else (self._stay, *self._places):
            yield from (rows.values, rows.grads, *rows.moments.values(), rows.optimizer_steps)
            yield from rows.controls.values()
        for parts in self._parts.values():
            yield from parts.values()

    @property
    def changed(self) -> frozenset[int]:
        """Those who changed since ``collect_changes``."""
        return frozenset(self._changed)

    def collect_changes(self, *, also: Iterable[int] = ()) -> tuple[Parts, dict[int, Parts]]:
        """What clients have in common, and all that those hold who changed since the last call.

        In host memory that nobody writes to again. What a client holds in host memory is replaced
        and never written to, so it needs no copy.

        Args:
            also: clients that are taken whether they changed or not.
        """
        self._changed |= set(also)
        with self._ferry.aside():
            common = {name: self._at_rest(part) for name, part in self._common.items()}
            common |= {name: self._ferry.keep(part) for name, part in self.common_state.items()}
            changed = {
                client: {name: self._at_rest(part) for name, part in self._parts[client].items()}
                for client in sorted(self._changed)
            }
        self._ferry.finish()
        for client, parts in changed.items():
            parts[DRAWN] = torch.tensor([self.examples_drawn[client]])
        self._changed.clear()
        return common, changed

    def _at_rest(self, part: torch.Tensor) -> torch.Tensor:
        return part if self._stay is None else self._ferry.keep(part)

    @property
    def holders(self) -> frozenset[int]:
        """The clients that hold something of their own, or have drawn examples."""
        drawn = self.examples_drawn
        return frozenset(client for client in self.own if self._parts[client] or drawn[client])

    def held_bytes(self, client: int) -> int:
        """Bytes of what a client holds of its own."""
        return sum(part.nbytes for part in self._parts[client].values())

    def restore(self, common: Parts, held: Iterable[tuple[int, Parts]]) -> None:
        """Restore the state that ``collect_changes`` returned.

        Args:
            common: what the clients share, and what the server keeps.
            held: what clients hold of their own, one after another; it is copied. Those that are
                not named hold nothing.
        """
        for factor in self.layout.factors:
            self.set_shared(factor, common[factor.lower()])
        self.common_state = {
            name: part.to(self.device) for name, part in common.items() if name not in self._common
        }
        for client, parts in held:
            self.examples_drawn[client] = int(parts[DRAWN])
            self.set_own(client, {name: part for name, part in parts.items() if name != DRAWN})
        self._changed.clear()

    def _set_common(self, factor: str, values: torch.Tensor) -> None:
        if self._stay is not None:
            self._common[factor.lower()] = values.to(self.device, copy=True)
            staying = self._stay.values[:, self.layout.columns(factor)]
            staying.copy_(self._common[factor.lower()])
            self.layout.take_common(self.own, factor, staying)
            return
        with self._ferry.aside():
            self._common[factor.lower()] = self._ferry.keep(values)
        self._ferry.finish()

    def _new_rows(self) -> PassState:
        shape = (self.clients_per_pass, self.layout.size)
        return PassState(
            self.own[: self.clients_per_pass],
            zero_rows(*shape, self.device),
            self._grads,
            {name: zero_rows(*shape, self.device) for name in self.moments},
            torch.zeros(self.clients_per_pass, len(FACTORS), device=self.device),
            self._new_controls(),
        )

    def _new_controls(self) -> Parts:
        return {
            name: torch.zeros(self.clients_per_pass, self.widths[name], device=self.device)
            for factor in self.controlled
            for name in (f"{factor.lower()}_{CONTROL}", f"{factor.lower()}_{GRADIENT}")
        }

    def _bring(
        self, clients: tuple[int, ...], place: int
    ) -> tuple[PassState, torch.cuda.Event | None]:
        """Copy a group into one of two places, behind what that place was used for before."""
        if self._stay is not None and clients == self._stay.clients:
            return self._stay, None
        while len(self._places) <= place:
            self._places.append(self._new_rows())
        rows = self._places[place].first(clients)
        with self._ferry.aside():
            for name, part in rows.parts(self.layout, self.layout.factors).items():
                for row, client in zip(part, clients, strict=True):
                    held = self._parts[client].get(name, self._common.get(name))
                    self._ferry.bring(row, held)
            for factor in self.layout.factors:
                part = rows.values[:, self.layout.columns(factor)]
                for row, client in zip(part, clients, strict=True):
                    if factor.lower() not in self._parts[client]:
                        self.layout.take_common([client], factor, row[None])
        return rows, self._ferry.mark()

    def _take_back(self, rows: PassState, trained: Sequence[str]) -> None:
        """Store the trained state of the clients of a pass."""
        parts = rows.parts(self.layout, self.layout.factors)
        of_trained = rows.parts(self.layout, trained).keys()
        with self._ferry.aside():
            for position, client in enumerate(rows.clients):
                # What it has held before may have changed too: who turned non-finite starts afresh.
                names = of_trained | self._parts[client].keys()
                become = {name: parts[name][position] for name in names}
                if rows is self._stay:
                    self._parts[client] |= become
                    self._changed.add(client)
                else:
                    self.set_own(client, become)


def groups(clients: Sequence[int], clients_per_pass: int) -> Iterator[tuple[int, ...]]:
    """Split clients into consecutive groups of at most ``clients_per_pass``."""
    for start in range(0, len(clients), clients_per_pass):
        yield tuple(clients[start : start + clients_per_pass])


def initial_a(own: Sequence[int], adapters: Adapters, seed: int) -> Iterator[torch.Tensor]:
    """Draw each client's first A, from (seed, client): (parameters of A,) on CPU, one at a time."""
    for client in own:
        generator = torch.Generator().manual_seed(derive(Stream.INIT_A, seed, client))
        yield adapters.initial_a(generator, adapters.layout.rank_of(client))


def draw_initial(clients: ClientStore, adapters: Adapters, *, seed: int, independent: bool) -> None:
    """Give each client its first A, from (seed, client) or from one draw for all; B stays 0.

    Heads start the same on all clients.
    """
    if independent:
        draws = initial_a(clients.own, adapters, seed)
        for client, a in zip(clients.own, draws, strict=True):
            clients.set_own(client, {"a": a})
    else:
        generator = torch.Generator().manual_seed(derive(Stream.INIT_A, seed))
        clients.set_shared("A", adapters.initial_a(generator))
    if adapters.head is not None:
        clients.set_shared("head", adapters.initial_head())
