"""How long a training pass takes on a machine of some kind: arithmetic, not a measurement.

    fixed  = (layers + 2) * launch + weights * bytes * reads / (bytes per second)
    a slot = (4 P + 6 (parameters of A and B) + 12 d L places) / (FLOPs per second)

P weights of the matrix products (6 P where checkpointing computes the forward pass again), d width,
L layers, places to which attention attends for a slot (``data.batches.PassSize``). Loss and
optimizer take about as many operations as two layers.

A small pass is bound by its launches, or by reading the weights, a large one by its operations.
Only the ratio of the two matters to how many clients should share a pass, and it varies little
within a kind of machine.
"""

from __future__ import annotations

from dataclasses import dataclass

from sfed.data.batches import PassSize

# Operations of the loss and of the optimizer, in layers.
_LAYERS_OF_THE_REST = 2


@dataclass(frozen=True)
class Speed:
    """What a machine does in a second, about."""

    launch_seconds: float
    """Of one layer, forward and backward: what the host takes to start its operations."""
    bytes_per_second: float
    flops_per_second: float
    runs_ahead: bool
    """Whether the host launches while the device computes."""


# Fitted to passes of three LLaMAs of 0.26 to 30 M weights in fp32 (docs/decisions.md).
CPU_THREAD = Speed(2e-3, 10e9, 70e9, runs_ahead=False)
# Of a GPU nothing was measured: 40 % of an H100's datasheet rate, and launches as in sfed.plan.
GPU = Speed(1.25e-3, 3e12, 400e12, runs_ahead=True)


def speed_of(device: str, threads: int) -> Speed:
    """The speed that is assumed of a process.

    Args:
        device: its type, cuda or cpu.
        threads: of a process on a CPU.
    """
    if device == "cuda":
        return GPU
    one = CPU_THREAD
    return Speed(
        one.launch_seconds, threads * one.bytes_per_second, threads * one.flops_per_second, False
    )


@dataclass(frozen=True)
class Trained:
    """A model with adapters, as far as the time of a pass depends on it."""

    num_layers: int
    hidden_size: int
    matmul_weights: int
    weight_bytes: int
    """Of one weight as a pass reads it."""
    adapter_numbers: int
    """A and B of one client."""
    recomputes: bool
    """Whether gradient checkpointing computes the forward pass once more."""


@dataclass(frozen=True)
class PassTime:
    """Seconds of a pass against what it computes."""

    launch_seconds: float
    """The host's part."""
    read_seconds: float
    """The device's, however little a pass computes."""
    slot_seconds: float
    """For each slot: a token, padding included."""
    place_seconds: float
    """For each slot and place that it attends to."""
    runs_ahead: bool

    @staticmethod
    def of(model: Trained, speed: Speed) -> PassTime:
        """The time of a model's passes on a machine."""
        reads = 3 if model.recomputes else 2
        read_bytes = reads * model.matmul_weights * model.weight_bytes
        flops = 2 * reads * model.matmul_weights + 6 * model.adapter_numbers
        return PassTime(
            (model.num_layers + _LAYERS_OF_THE_REST) * speed.launch_seconds,
            read_bytes / speed.bytes_per_second,
            flops / speed.flops_per_second,
            12 * model.hidden_size * model.num_layers / speed.flops_per_second,
            speed.runs_ahead,
        )

    def seconds(self, size: PassSize) -> float:
        """Seconds of a pass of this size."""
        of_slot = self.slot_seconds + size.places * self.place_seconds
        computing = self.read_seconds + size.slots * of_slot
        if self.runs_ahead:
            return max(self.launch_seconds, computing)
        return self.launch_seconds + computing
