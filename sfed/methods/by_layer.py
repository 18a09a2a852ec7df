"""Server steps that see each client's own factors: layers are dealt to the processes.

Every process sends its clients' factors of a layer to the process that has the layer, in one
``all_to_all``; that process calls the method's server step, and one ``all_gather`` gives everybody
the result. So no process holds all factors of all clients, and a step gets the same numbers in the
same order on any number of processes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from sfed.clients.store import ClientStore
from sfed.data.assignment.placement import by_work
from sfed.distributed.sync import gather_json, raise_everywhere
from sfed.distributed.world import World, all_gather_rows, all_to_all
from sfed.lora.layout import Layout, Piece
from sfed.methods.server import CommonLayer, SentLayer, ServerStep
from sfed.utils.errors import UserError
from sfed.utils.rng import Stream, derive
from sfed.utils.text import one_line


@dataclass(frozen=True)
class Assignment:
    """The layers of the sent factors, and which process has which."""

    layers: tuple[tuple[str, ...], ...]
    """Names, by process."""
    pieces: Mapping[str, tuple[Piece, ...]]
    """Of each layer, one for each factor."""

    @staticmethod
    def of(layout: Layout, factors: Sequence[str], num_processes: int) -> Assignment:
        """Deal by numbers to send: the largest layer first, to the process with the least so far.

        Args:
            layout: of a client's row.
            factors: that are sent.
            num_processes: W.
        """
        found: dict[str, list[Piece]] = {}
        for piece in layout.pieces:
            if piece.factor in factors:
                found.setdefault(piece.layer, []).append(piece)
        names = list(found)
        sizes = [sum(map(_numbers, found[name])) for name in names]
        placed = by_work(sizes, num_processes, "numbers").clients
        layers = tuple(tuple(names[i] for i in own) for own in placed)
        return Assignment(layers, {name: tuple(found[name]) for name in names})

    def of_process(self, rank: int) -> list[Piece]:
        """The pieces that a process gets of each client, in the order in which they are sent."""
        return [piece for layer in self.layers[rank] for piece in self.pieces[layer]]

    def width(self, rank: int) -> int:
        """Numbers of each client that a process gets."""
        return sum(map(_numbers, self.of_process(rank)))


BaseChanges = Mapping[str, tuple[torch.Tensor, torch.Tensor]]
"""U (out, q) and V (q, in), fp32 on the host, of the layers whose frozen weight becomes W + U V."""


@dataclass(frozen=True)
class Shared:
    """What a server step over all layers did beside the factors."""

    num_bytes: int
    """Bytes of the messages of the process that sends most."""
    base_changes: BaseChanges
    """The same on every process."""


@dataclass(frozen=True)
class ByLayer:
    """One server step over all layers, on all processes."""

    world: World
    clients: ClientStore
    """Of this process."""
    senders: Sequence[Sequence[int]]
    """The clients of each process that send, in ascending order."""
    weights: Sequence[float]
    """(N,) of all clients, summing to 1 over those that send."""
    gammas: Sequence[float]
    """(N,) of all clients: the factor of B A x."""
    seed: int = 0
    """Of the round, for what a step draws."""

    def share(self, step: ServerStep, factors: Sequence[str]) -> Shared:
        """Replace factors of every client by what a server step makes of them. Collective.

        Who did not take part receives the result too. The state of the step for the layers that
        this process has stays in ``clients.server_state``.

        Args:
            step: of the method.
            factors: what is sent: A, B or both.

        Raises:
            UserError: on every process, where the step fails, or returns what it must not.
        """
        world = self.world
        dealt = Assignment.of(self.clients.layout, factors, world.size)
        received = self._exchange(dealt)
        before = {factor: self.clients.shared(factor).to(world.device) for factor in factors}
        results, shapes = dict[str, CommonLayer](), layer_shapes(self.clients.layout)
        with raise_everywhere(world, "the server step"):
            for layer in dealt.layers[world.rank]:
                sent = self._sent(layer, _views(dealt, layer, world.rank, received), before)
                results[layer] = _result_of(step, sent, shapes[layer])
        self.clients.server_state = {
            f"{layer}/{name}": tensor.detach().to("cpu", copy=True)
            for layer, result in results.items()
            for name, tensor in result.state.items()
        }
        self._give_to_all(dealt, results, before)
        changes, num_bytes = self._base_changes(dealt, results)
        num_bytes += message_bytes(self.clients.layout, factors, self.senders)
        return Shared(num_bytes, changes)

    def _exchange(self, dealt: Assignment) -> torch.Tensor:
        """Send every layer to who has it; returns (n, width) of all senders, in their order."""
        world, own = self.world, self.senders[self.world.rank]
        parts = [
            [self._piece(client, piece) for client in own for piece in dealt.of_process(rank)]
            for rank in range(world.size)
        ]
        nothing = torch.empty(0, device=world.device)
        width = dealt.width(world.rank)
        received = all_to_all(
            world,
            [torch.cat([nothing, *some]) for some in parts],
            [len(some) * width for some in self.senders],
        )
        rows = torch.cat(received).view(sum(map(len, self.senders)), width)
        numbers = [client for some in self.senders for client in some]
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        return rows[torch.tensor(order, device=rows.device)]

    def _piece(self, client: int, piece: Piece) -> torch.Tensor:
        values = piece.within(self.clients.layout, self.clients.factor(client, piece.factor))
        return values.flatten().to(self.world.device)

    def _sent(
        self,
        layer: str,
        factors: Mapping[str, torch.Tensor],
        before: Mapping[str, torch.Tensor],
    ) -> SentLayer:
        numbers = tuple(sorted(client for some in self.senders for client in some))
        device, layout = self.world.device, self.clients.layout
        weights = [self.weights[client] for client in numbers]
        of_layer = {
            piece.factor: piece.within(layout, before[piece.factor])
            for piece in layout.pieces
            if piece.layer == layer and piece.factor in factors
        }
        state = {
            name.removeprefix(f"{layer}/"): tensor.to(device)
            for name, tensor in self.clients.server_state.items()
            if name.startswith(f"{layer}/")
        }
        weights_n = torch.tensor(weights, dtype=torch.float64, device=device)
        number = [piece.layer for piece in layout.pieces].index(layer)
        gammas = [self.gammas[client] for client in numbers]
        return SentLayer(
            layer,
            numbers,
            factors,
            weights_n,
            torch.tensor(gammas, dtype=torch.float64, device=device),
            tuple(layout.rank_of(client) for client in numbers),
            of_layer,
            state,
            derive(Stream.SERVER_STEP, self.seed, number),
            common_gamma(self.gammas, layout.ranks),
        )

    def _give_to_all(
        self,
        dealt: Assignment,
        results: Mapping[str, CommonLayer],
        before: Mapping[str, torch.Tensor],
    ) -> None:
        """Set the results of all layers, those of other processes too, for every client."""
        world, layout = self.world, self.clients.layout
        own = torch.zeros(max(map(dealt.width, range(world.size))), device=world.device)
        position = 0
        for piece in dealt.of_process(world.rank):
            values = results[piece.layer].factors[piece.factor].flatten()
            own[position : position + len(values)] = values
            position += len(values)
        common = {factor: values.clone() for factor, values in before.items()}
        for rank, values in enumerate(all_gather_rows(world, own)):
            position = 0
            for piece in dealt.of_process(rank):
                end = position + _numbers(piece)
                place = piece.within(layout, common[piece.factor])
                place.copy_(values[position:end].view(piece.shape))
                position = end
        for factor, values in common.items():
            self.clients.set_shared(factor, values)

    def _base_changes(
        self, dealt: Assignment, results: Mapping[str, CommonLayer]
    ) -> tuple[BaseChanges, int]:
        """The changes of all layers, and the bytes of the process that sends most of them."""
        world, shapes = self.world, layer_shapes(self.clients.layout)
        own = {
            layer: (u.float(), v.float())
            for layer, result in results.items()
            if result.base_change is not None
            for u, v in [result.base_change]
        }
        ranks: dict[str, int] = {}
        said = {layer: len(v) for layer, (_, v) in own.items()}
        for some in gather_json(world, "changes of the frozen weights", said):
            ranks |= some
        if not ranks:
            return {}, 0
        sizes = [
            {layer: ranks[layer] * sum(shapes[layer]) for layer in layers if layer in ranks}
            for layers in dealt.layers
        ]
        most = max(sum(some.values()) for some in sizes)
        sent = torch.zeros(most, device=world.device)
        flat = [one.flatten() for layer in sizes[world.rank] for one in own[layer]]
        if flat:
            sent[: sum(map(len, flat))] = torch.cat(flat)
        changes = {}
        for some, values in zip(sizes, all_gather_rows(world, sent), strict=True):
            parts = torch.split(values[: sum(some.values())], list(some.values()))
            for layer, part in zip(some, parts, strict=True):
                out, width = shapes[layer]
                u, v = torch.split(part, [ranks[layer] * out, ranks[layer] * width])
                changes[layer] = (u.view(out, -1), v.view(-1, width))
        return changes, 4 * most


def common_gamma(gammas: Sequence[float], ranks: Sequence[int]) -> float:
    """Gamma (N,) of a client of the largest rank (N,); of any, where no ranks are given."""
    return gammas[ranks.index(max(ranks))] if ranks else gammas[0]


def layer_shapes(layout: Layout) -> dict[str, tuple[int, int]]:
    """(out, in) of each adapted layer."""
    widths = {piece.layer: piece.shape[1] for piece in layout.pieces if piece.factor == "A"}
    heights = {piece.layer: piece.shape[0] for piece in layout.pieces if piece.factor == "B"}
    return {layer: (heights[layer], width) for layer, width in widths.items()}


def base_change_bytes(layout: Layout, factors: Sequence[str], change_rank: int, size: int) -> int:
    """Bytes that the process with most layers sends of changes of rank q of all frozen weights.

    Args:
        layout: of a client's row.
        factors: that are sent.
        change_rank: q.
        size: number of processes.
    """
    shapes = layer_shapes(layout)
    dealt = Assignment.of(layout, factors, size)
    return max(4 * change_rank * sum(sum(shapes[one]) for one in own) for own in dealt.layers)


def message_bytes(layout: Layout, factors: Sequence[str], senders: Sequence[Sequence[int]]) -> int:
    """Bytes that the process with most senders sends: their factors, and the results that it makes.

    Args:
        layout: of a client's row.
        factors: that are sent.
        senders: the clients of each process that send.
    """
    dealt = Assignment.of(layout, factors, len(senders))
    widths = [dealt.width(rank) for rank in range(len(senders))]
    return 4 * (max(map(len, senders)) * sum(widths) + max(widths))


def _numbers(piece: Piece) -> int:
    return piece.end - piece.start


def _views(
    dealt: Assignment, layer: str, rank: int, received: torch.Tensor
) -> dict[str, torch.Tensor]:
    """A layer's factors of all senders, (n, *shape) each, out of what a process has received."""
    views, position = {}, 0
    for piece in dealt.of_process(rank):
        end = position + _numbers(piece)
        if piece.layer == layer:
            views[piece.factor] = received[:, position:end].reshape(-1, *piece.shape)
        position = end
    return views


def _result_of(step: ServerStep, sent: SentLayer, shape: tuple[int, int]) -> CommonLayer:
    """Call a server step, which may be a user's, and check what it returns.

    Args:
        step: of the method.
        sent: what it gets.
        shape: (out, in) of the layer.

    Raises:
        UserError: naming the step, the layer, and what is wrong.
    """
    name = getattr(step, "__qualname__", repr(step))
    what = f"the server step {name} of federated.method, layer {sent.layer}"
    try:
        result = step(sent)
    except Exception as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(f"{what}: it raised {reason}") from error
    if not isinstance(result, CommonLayer):
        raise UserError(f"{what}: it returned {type(result).__name__}, not a CommonLayer")
    if result.factors.keys() != sent.factors.keys():
        raise UserError(
            f"{what}: it returned the factors {', '.join(sorted(result.factors)) or 'none'}; it "
            f"has to return those that were sent: {', '.join(sorted(sent.factors))}"
        )
    for factor, values in result.factors.items():
        expected = sent.before[factor]
        if values.shape != expected.shape or values.dtype != expected.dtype:
            raise UserError(
                f"{what}: {factor} has shape {tuple(values.shape)} and dtype {values.dtype}; "
                f"expected {tuple(expected.shape)} and {expected.dtype}"
            )
        if not bool(torch.isfinite(values).all()):
            raise UserError(f"{what}: {factor} holds numbers that are not finite")
    if problem := _wrong_base_change(result, shape):
        raise UserError(f"{what}: {problem}")
    return result


def _wrong_base_change(result: CommonLayer, shape: tuple[int, int]) -> str | None:
    """What is wrong with the change of the frozen weight that a step returns."""
    if result.base_change is None:
        return None
    try:
        u, v = result.base_change
        shapes = (u.ndim, v.ndim, u.shape[1], u.isfinite().all() and v.isfinite().all())
    except (TypeError, ValueError, AttributeError, IndexError):
        return "base_change is no pair of matrices U (out, q) and V (q, in)"
    out, width = shape
    if shapes[:2] != (2, 2) or (len(u), len(v), v.shape[1]) != (out, shapes[2], width):
        return (
            f"base_change has the shapes {tuple(u.shape)} and {tuple(v.shape)}; expected "
            f"({out}, q) and (q, {width})"
        )
    return None if shapes[3] else "base_change holds numbers that are not finite"
