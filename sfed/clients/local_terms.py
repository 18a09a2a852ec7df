"""What joins the gradient of a client's own loss, before it is clipped and an optimizer sees it.

FedProx (arXiv 1812.06127): the loss of a client has the further term mu / 2 |w - w_received|^2.

SCAFFOLD (arXiv 1910.06378), option II: the gradient g of a client is corrected by its control
variate c_i and that of the server, c, before any optimizer; afterwards c_i is the mean of the
round's uncorrected g, weighted by the learning rate of each step:

    w <- step along g - c_i + c          c_i <- sum_k eta_k g_k / sum_k eta_k

Under SGD without momentum, clipping and weight decay that is c_i - c + (w_received - w) / sum eta.

A method may name a term of its own: a function of what the clients hold of a layer.
Shape suffixes: C clients, N parameters of a factor.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby

import torch

from sfed.clients.local_layer import LocalLayer, LocalTerm
from sfed.clients.state import CONTROL, GRADIENT, PassState
from sfed.lora.layout import Layout, Piece
from sfed.utils.errors import UserError
from sfed.utils.text import one_line


@dataclass(frozen=True)
class MethodTerm:
    """The local term that a method names."""

    function: LocalTerm
    trained: Sequence[str]
    """Factors that train in the round."""
    gamma: float
    """The factor of B A x."""

    def add_to(self, rows: PassState, layout: Layout, received: Mapping[str, torch.Tensor]) -> None:
        """Add its gradients to those of the clients of a pass, in place.

        Raises:
            UserError: naming the term, the layer, and what is wrong with what it returns.
        """
        pieces = sorted((p for p in layout.pieces if p.factor != "head"), key=_layer)
        for layer, some in groupby(pieces, key=_layer):
            own = {piece.factor: piece for piece in some}
            held = LocalLayer(
                layer,
                {factor: piece.of(rows.values) for factor, piece in own.items()},
                {f: own[f].within(layout, values) for f, values in received.items() if f in own},
                self.gamma,
            )
            version = rows.values._version
            for factor, gradient in self._gradients(held).items():
                own[factor].of(rows.grads).add_(gradient)
            if rows.values._version != version:
                raise UserError(f"{self._name(held)}: it changed the factors that it was given")

    def _gradients(self, held: LocalLayer) -> Mapping[str, torch.Tensor]:
        try:
            found = self.function(held)
        except Exception as error:
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise UserError(f"{self._name(held)}: it raised {reason}") from error
        if not isinstance(found, Mapping) or not set(found) <= set(self.trained) - {"head"}:
            of = ", ".join(factor for factor in self.trained if factor != "head")
            told = sorted(map(str, found)) if isinstance(found, Mapping) else type(found).__name__
            raise UserError(
                f"{self._name(held)}: it returned {told}; it has to return a mapping with "
                f"gradients of factors that train in the round: {of}"
            )
        for factor, gradient in found.items():
            values = held.factors[factor]
            if not isinstance(gradient, torch.Tensor):
                told = type(gradient).__name__
                raise UserError(f"{self._name(held)}: the gradient of {factor} is {told}")
            if gradient.shape != values.shape or gradient.dtype != values.dtype:
                raise UserError(
                    f"{self._name(held)}: the gradient of {factor} has shape "
                    f"{tuple(gradient.shape)} and dtype {gradient.dtype}; expected "
                    f"{tuple(values.shape)} and {values.dtype}"
                )
        return found

    def _name(self, held: LocalLayer) -> str:
        name = getattr(self.function, "__qualname__", repr(self.function))
        return f"the local term {name} of federated.method, layer {held.layer}"


@dataclass(frozen=True)
class LocalTerms:
    """What joins the gradients of a round."""

    layout: Layout
    """Of a row."""
    prox_mu: float
    received: Mapping[str, torch.Tensor]
    """The values at the start of the round, (N,) on the device, of the factors that train and were
    received."""
    controls: Mapping[str, torch.Tensor]
    """The server's control variate, (N,) on the device, of the factors that have one."""
    of_method: MethodTerm | None = None
    """The term that the method names."""

    def add_to(
        self, rows: PassState, weights_C: torch.Tensor | None, active_C: torch.Tensor
    ) -> None:
        """Change the gradients of the clients of a pass in place; nothing is read back.

        Args:
            rows: of the clients.
            weights_C: (C,) of ``mean_weights`` at this step; None where there are no controls.
            active_C: (C,) bool, whose gradients count.
        """
        for factor in self.received if self.prox_mu > 0 else ():
            columns, received = self.layout.columns(factor), self._received(rows, factor)
            rows.grads[:, columns].add_(rows.values[:, columns] - received, alpha=self.prox_mu)
        if self.of_method is not None:
            self.of_method.add_to(rows, self.layout, self.received)
        for factor, control_N in self.controls.items():
            assert weights_C is not None
            grads_CN = rows.grads[:, self.layout.columns(factor)]
            mean_CN = rows.controls[f"{factor.lower()}_{GRADIENT}"]
            moved_CN = torch.lerp(mean_CN, grads_CN, weights_C[:, None])
            mean_CN.copy_(moved_CN.where(active_C[:, None], mean_CN))
            grads_CN.sub_(rows.controls[f"{factor.lower()}_{CONTROL}"]).add_(control_N)

    def _received(self, rows: PassState, factor: str) -> torch.Tensor:
        """What the clients of a pass received of a factor: (N,) of all, or (C, N) of each."""
        common_N = self.received[factor]
        if not self.layout.has_mixed_ranks:
            return common_N
        taken_CN = common_N.repeat(len(rows.clients), 1)
        self.layout.take_common(rows.clients, factor, taken_CN)
        return taken_CN


def _layer(piece: Piece) -> str:
    return piece.layer


def mean_weights(rates: Sequence[float]) -> list[float]:
    """Weights w_k such that mean += w_k (g_k - mean) is the mean of all g so far, by rates.

    The first is 1, so that what the mean was before does not matter. While all rates are 0, as at
    the start of a warm-up, the g count the same.

    Args:
        rates: learning rate of each step, at least 0.
    """
    return [
        rate / total if total > 0 else 1 / number
        for number, (rate, total) in enumerate(zip(rates, accumulate(rates), strict=True), start=1)
    ]
