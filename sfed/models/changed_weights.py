"""Changes of the frozen weights of adapted layers, on a replica or on the shards of ZeRO-3.

    the weight in use = (W0 + change).to(dtype)      change = U_1 V_1 + U_2 V_2 + ... of all rounds

Always computed from the original W0, so the rounding of a 16-bit dtype does not add up over rounds,
and a resumed run computes the same bits. The change of a layer is kept in fp32 as the factors U and
V, and as the matrix itself once the factors would hold more numbers than it. Under ZeRO-3 a process
keeps only its share of such a matrix. Originals and changes are in host memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from sfed.distributed.world import World, all_reduce_sum
from sfed.lora.linear import StackedLoraLinear
from sfed.models.backbone import Backbone
from sfed.models.deepspeed import held_share, set_share, whole_shape
from sfed.utils.errors import CheckpointError, UserError

Terms = tuple[torch.Tensor, torch.Tensor]
"""U (out, q) and V (q, in), fp32: what is added to a weight is U V."""

PREFIX = "base_change"
"""Of the names in checkpoints: base_change/LAYER/u, .../v, .../dense/POSITION."""
_NUMBERS_AT_A_TIME = 2**24


@dataclass(frozen=True)
class Change:
    """What has been added to the numbers start .. stop of a flat (out, in) weight."""

    shape: tuple[int, int]
    start: int
    stop: int
    terms: Terms | None = None
    """Of the whole weight, on the host."""
    dense: torch.Tensor | None = None
    """(stop - start,) fp32 on the host, once terms would hold more numbers than the weight."""

    def plus(self, terms: Terms, device: torch.device) -> Change:
        """Return the change with the product of other terms added; tensors are never written to."""
        if self.dense is not None:
            return replace(self, dense=self.dense + self._product(terms, device).cpu())
        u, v = (one.to("cpu", torch.float32) for one in terms)
        if self.terms is not None:
            u, v = torch.cat([self.terms[0], u], dim=1), torch.cat([self.terms[1], v])
        if u.numel() + v.numel() <= self.shape[0] * self.shape[1]:
            return replace(self, terms=(u, v))
        return replace(self, terms=None, dense=self._product((u, v), device).cpu())

    def values(self, device: torch.device) -> torch.Tensor:
        """The numbers themselves: (stop - start,) fp32 on a device."""
        if self.dense is not None:
            return self.dense.to(device)
        if self.terms is None:
            return torch.zeros(self.stop - self.start, device=device)
        return self._product(self.terms, device)

    def _product(self, terms: Terms, device: torch.device) -> torch.Tensor:
        """U V from start to stop, in fp64: TF32 would lose most digits, an order of sums the last.

        Rows at a time, so that little memory is needed beside the result.
        """
        width = self.shape[1]
        first, last = self.start // width, -(-self.stop // width)
        u, v = (one.to(device, torch.float64) for one in terms)
        height = max(1, _NUMBERS_AT_A_TIME // width)
        rows = [(some @ v).float() for some in torch.split(u[first:last], height)]
        flat = torch.cat([torch.zeros(0, width, device=device), *rows]).flatten()
        return flat[self.start - first * width : self.stop - first * width]


class ChangedWeights:
    """The frozen weights of the adapted layers, and what has been added to them."""

    def __init__(
        self, backbone: Backbone, layers: Mapping[str, StackedLoraLinear], world: World
    ) -> None:
        """Change nothing yet.

        Args:
            backbone: whose layers they are.
            layers: adapted layers by their names.
            world: the processes.

        Raises:
            UserError: where a weight cannot be changed.
        """
        self._backbone, self._world = backbone, world
        self._weights = weights_of(backbone.model, layers)
        self._originals: dict[str, torch.Tensor] = {}
        """This process's share of each weight, flat, as it was loaded."""
        self.changes: dict[str, Change] = {}
        """Of this process's shares of the layers that have changed, in no order."""

    def add(self, changes: Mapping[str, Terms]) -> None:
        """Add U V to the weights of some layers, on all processes alike.

        Between passes only. Under ZeRO-3 nothing is communicated: each process changes its share.
        """
        device = self._world.device
        for name, terms in changes.items():
            change = self.changes.get(name) or self._unchanged(name)
            self.changes[name] = change.plus(terms, device)
        self._apply(changes)

    def stored(self) -> dict[str, torch.Tensor]:
        """What this process writes into a checkpoint: fp32 on the host, by name.

        Terms of a layer, or a matrix that every process has, are written by one process.
        """
        world, parts = self._world, dict[str, torch.Tensor]()
        for number, (name, change) in enumerate(sorted(self.changes.items())):
            is_whole = change.stop - change.start == change.shape[0] * change.shape[1]
            is_mine = number % world.size == world.rank
            if change.terms is not None and is_mine:
                parts[f"{PREFIX}/{name}/u"], parts[f"{PREFIX}/{name}/v"] = change.terms
            if change.dense is not None and (is_mine or not is_whole) and len(change.dense):
                parts[f"{PREFIX}/{name}/dense/{change.start}"] = change.dense
        return parts

    def restore(self, parts: Mapping[str, torch.Tensor]) -> None:
        """Apply what all processes have written into a checkpoint.

        Raises:
            CheckpointError: where it does not fit these layers.
        """
        names = {key.split("/")[1] for key in parts if key.startswith(f"{PREFIX}/")}
        if unknown := sorted(names - self._weights.keys()):
            raise CheckpointError(
                f"the checkpoint changes the weight of {unknown[0]}, which has no adapter here; "
                "set lora.target_modules back, or output.resume=never to begin anew"
            )
        self.changes = {name: self._restored(name, parts) for name in sorted(names)}
        self._apply(self.changes)

    def factors(self) -> dict[str, Terms]:
        """The change of each layer as U and V, exact, on the host. Collective.

        Of a change that is kept as a matrix one of both is the unit matrix, of min(out, in) rows.
        """
        return {name: self._factors_of(self.changes[name]) for name in sorted(self.changes)}

    def _unchanged(self, name: str) -> Change:
        share, start = held_share(self._weights[name])
        out, width = whole_shape(self._weights[name])
        return Change((out, width), start, start + len(share))

    def _apply(self, names: Mapping[str, object]) -> None:
        """Compute the weights in use anew, from the originals."""
        self._backbone.release()
        device, is_sharded = self._world.device, self._backbone.sharding.is_sharded
        for name in names:
            weight = self._weights[name]
            share, _ = held_share(weight)
            # On a CPU a replica's own tensor is kept, which may be the mapped file of the model.
            if name not in self._originals:
                # A replica's tensor is replaced, so on a CPU it need not be copied: it may be the
                # mapped file of the model, which is not to be written to.
                self._originals[name] = share.to("cpu", copy=is_sharded)
            original = self._originals[name]
            changed = original.to(device).float() + self.changes[name].values(device)
            set_share(weight, changed.to(weight.dtype))
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # ZeRO-3 gathers on a stream that waits for no other

    def _restored(self, name: str, parts: Mapping[str, torch.Tensor]) -> Change:
        blank, prefix = self._unchanged(name), f"{PREFIX}/{name}/"
        own = {
            key.removeprefix(prefix): part for key, part in parts.items() if key.startswith(prefix)
        }
        problem = CheckpointError(
            f"the checkpoint holds a change of {name} that does not fit its weight of shape "
            f"{blank.shape}; resume from another one with output.resume=FOLDER"
        )
        out, width = blank.shape
        if any(part.dtype != torch.float32 for part in own.values()):
            raise problem
        if own.keys() == {"u", "v"}:
            u, v = own["u"], own["v"]
            if u.shape[:1] != (out,) or v.shape[1:] != (width,) or u.shape[1:] != v.shape[:1]:
                raise problem
            return replace(blank, terms=(u, v))
        dense, position = torch.zeros(out * width), 0
        for key in sorted(own, key=lambda key: (len(key), key)):  # by the position in the name
            part = own[key]
            if key != f"dense/{position}" or part.shape != dense[position:][: len(part)].shape:
                raise problem
            dense[position : position + len(part)] = part
            position += len(part)
        if position != len(dense):
            raise problem
        return replace(blank, dense=dense[blank.start : blank.stop].clone())

    def _factors_of(self, change: Change) -> Terms:
        if change.terms is not None:
            return change.terms
        assert change.dense is not None
        out, width = change.shape
        whole = change.dense
        if self._backbone.sharding.is_sharded:
            whole = torch.zeros(out * width, device=self._world.device)
            whole[change.start : change.stop] = change.dense.to(whole.device)
            whole = all_reduce_sum(
                whole
            ).cpu()  # everywhere one share and zeros: nothing is rounded
        matrix = whole.view(out, width)
        return (torch.eye(out), matrix) if out <= width else (matrix, torch.eye(width))


def weights_of(
    model: nn.Module, layers: Mapping[str, StackedLoraLinear]
) -> dict[str, nn.Parameter]:
    """The frozen weights of adapted layers, which a method may change.

    Args:
        model: that the layers are in.
        layers: adapted layers by their names.

    Raises:
        UserError: naming a layer whose weight cannot be changed, and the remedy.
    """
    times = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    weights: dict[str, nn.Parameter] = {}
    for name, layer in layers.items():
        base, problem = layer.base_layer, None
        weight = base.weight
        if type(base) is not nn.Linear:
            problem = f"it is a {type(base).__name__}, not a torch.nn.Linear"
        elif weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            problem = f"its weight is of dtype {weight.dtype}"
        elif times[id(weight)] > 1:
            problem = "other modules use the same weight (tied weights)"
        if problem is not None:
            raise UserError(
                f"federated.method changes the weights of adapted layers, and that of {name} "
                f"cannot be changed: {problem}. Leave it out of lora.target_modules, choose "
                "another model.name, or a method that changes no weight, such as flexlora"
            )
        assert isinstance(weight, nn.Parameter)
        weights[name] = weight
    return weights
