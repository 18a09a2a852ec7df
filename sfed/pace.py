"""How long a round takes, by arithmetic: operations, bytes on the links, and stated assumptions.

    operations per token = 4 P + 6 s d L + 6 (numbers of A and B)       [+ 2 P + 2 s d L + 2 (...)]

P weights of the matrix products (forward 2 P, gradients of inputs 2 P, frozen weights get none), s
tokens of a row, d width, L layers: attention, causal; twice as much where it is not. In brackets
what gradient checkpointing computes again. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass

# Of the datasheet's rate; good public LoRA steps reach 37 to 45 % of it on an H100.
USED_SHARE = 0.4
# A pass takes at least this long for each layer: a guess at what eager kernel launches cost.
LAUNCH_SECONDS_PER_LAYER = 1.25e-3
# Bytes per second of one GPU in a ring of all: NVLink as measured on 8 x H200, PCIe 5 x16 and
# 100 Gbit/s Ethernet by what the link carries.
LINKS = {"nvlink": 361e9, "pcie": 55e9, "100gbe": 12.5e9}


@dataclass(frozen=True)
class Pass:
    """One pass through the backbone on one GPU."""

    rows: int
    tokens: int
    """Of a row, padding included."""
    matmul_weights: int
    adapter_numbers: int
    """A and B of one client."""
    hidden_size: int
    num_layers: int
    is_causal: bool
    recomputes: bool
    """Whether gradient checkpointing is on."""

    @property
    def operations(self) -> float:
        """FLOPs of the pass."""
        scores = self.tokens * self.hidden_size * self.num_layers * (1 if self.is_causal else 2)
        of_token = 4.0 * self.matmul_weights + 6.0 * (scores + self.adapter_numbers)
        if self.recomputes:
            of_token += 2.0 * (self.matmul_weights + scores + self.adapter_numbers)
        return of_token * self.rows * self.tokens

    def seconds(self, flops_per_second: float) -> float:
        """Seconds of computing."""
        launches = LAUNCH_SECONDS_PER_LAYER * self.num_layers
        return max(self.operations / flops_per_second, launches)


def gather_seconds(stored_bytes: int, num_gpus: int, bandwidth: float, recomputes: bool) -> float:
    """What ZeRO-3 takes to bring the weights to a GPU, once for each time that a pass reads them.

    Args:
        stored_bytes: of the whole backbone.
        num_gpus: that share it.
        bandwidth: bytes per second of a GPU.
        recomputes: whether gradient checkpointing reads the weights once more.
    """
    times = 3 if recomputes else 2
    return times * stored_bytes * (num_gpus - 1) / num_gpus / bandwidth


def reduce_seconds(message_bytes: int, num_gpus: int, bandwidth: float) -> float:
    """What the mean of a round takes: an all_reduce in a ring."""
    return 2 * message_bytes * (num_gpus - 1) / num_gpus / bandwidth
