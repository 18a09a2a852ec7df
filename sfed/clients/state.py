"""The rows of numbers of the clients that share a pass, on the device; and the parts of a client.

Suffix: C clients of the pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sfed.lora.layout import Layout

MOMENTS = ("exp_avg", "exp_avg_sq")
FACTORS = ("A", "B", "head")
SERVER = ("m", "v")
"""What a server optimizer keeps of a factor, the same on every process."""
CONTROL, GRADIENT = "control", "mean_gradient"
"""SCAFFOLD: the control variate of a client, and of the server; the mean gradient of a round."""
STEPS = "optimizer_steps"
DRAWN = "examples_drawn"

Parts = dict[str, torch.Tensor]
"""Parts of one client, flat, by name: a, b, head, a_exp_avg, ..., optimizer_steps."""


@dataclass
class PassState:
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
    controls: Parts = field(default_factory=dict)
    """SCAFFOLD: a_control, a_mean_gradient, ..., each (C, parameters of the factor) fp32."""

    def restore(self, bad_C: torch.Tensor, start: torch.Tensor) -> None:
        """Give the clients of a (C,) bool mask their values of the start, and fresh moments."""
        self.values.copy_(torch.where(bad_C[:, None], start, self.values))
        self.optimizer_steps.masked_fill_(bad_C[:, None], 0.0)
        gradients = (part for name, part in self.controls.items() if name.endswith(GRADIENT))
        for buffer in (*self.moments.values(), *gradients):
            buffer.masked_fill_(bad_C[:, None], 0.0)

    def parts(self, layout: Layout, factors: Sequence[str]) -> Parts:
        """Views of the parts that belong to some factors, (C, parameters of the part) each."""
        named: Parts = {}
        for factor in factors:
            columns, short = layout.columns(factor), factor.lower()
            named[short] = self.values[:, columns]
            for name, moment in self.moments.items():
                named[f"{short}_{name}"] = moment[:, columns]
            for name in (f"{short}_{CONTROL}", f"{short}_{GRADIENT}"):
                if name in self.controls:
                    named[name] = self.controls[name]
        named[STEPS] = self.optimizer_steps
        return named

    def first(self, clients: tuple[int, ...]) -> PassState:
        """Return a view of the memory for as many clients as given."""
        count = len(clients)
        moments = {name: moment[:count] for name, moment in self.moments.items()}
        steps = self.optimizer_steps[:count]
        controls = {name: part[:count] for name, part in self.controls.items()}
        return PassState(clients, self.values[:count], self.grads[:count], moments, steps, controls)


def part_widths(layout: Layout, moments: Sequence[str]) -> dict[str, int]:
    """How many numbers each part of a client has, and each that the server keeps."""
    row = torch.empty(1, layout.size, device="meta")
    steps = torch.empty(1, len(FACTORS), device="meta")
    rows = PassState((), row, row, dict.fromkeys(moments, row), steps)
    widths = {name: part.shape[1] for name, part in rows.parts(layout, layout.factors).items()}
    of_server = {
        f"{factor.lower()}_{name}": widths[factor.lower()]
        for factor in layout.factors
        for name in SERVER
    }
    return {**widths, **of_server, DRAWN: 1}
