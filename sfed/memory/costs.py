"""What training needs in memory, part by part, and how many clients fit into a pass.

Rules over what a pass of the model at hand was seen to cost (``profile``). Needs no torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from sfed.data.packing import Packing

_FP32_BYTES = 4
# Of free memory, what may be planned with: allocators leave gaps between tensors.
USABLE_SHARE = 0.9


@dataclass(frozen=True)
class Load:
    """What one pass through the backbone reads."""

    clients: int
    rows: int
    """Rows of one client."""
    tokens: int
    """Tokens of one row, padding included."""
    widest: int = 0
    """Tokens of the widest row that these may be packed into; 0 = they are not packed."""

    @property
    def all_tokens(self) -> int:
        """Tokens of the pass."""
        return self.clients * self.rows * self.tokens


@dataclass(frozen=True)
class Cost:
    """Bytes of something that grows with what a pass reads."""

    fixed: float
    per_client: float
    per_token: float
    per_square: float
    """Per row and square of its tokens: attention masks, and attention without a fused kernel."""
    per_position: float
    """Per token of the longest row, once for all rows: tables of position embeddings."""

    def of(self, load: Load) -> int:
        """Bytes of a pass; at most, where rows are packed: into fewer that hold no more in all."""
        width = max(load.tokens, load.widest)
        of_row = load.tokens * (self.per_token + width * self.per_square)
        of_clients = load.clients * (self.per_client + load.rows * of_row)
        return round(self.fixed + width * self.per_position + of_clients)

    def plus(self, other: Cost, times: int = 1) -> Cost:
        """This, and something else so many times."""
        return Cost(
            self.fixed + times * other.fixed,
            self.per_client + times * other.per_client,
            self.per_token + times * other.per_token,
            self.per_square + times * other.per_square,
            self.per_position + times * other.per_position,
        )

    def of_clients(self, clients: int) -> int:
        """The part that is there however little a pass reads: copies of factors."""
        return round(self.fixed + clients * self.per_client)


@dataclass(frozen=True)
class Costs:
    """What a pass costs on one model."""

    kept: Cost
    """For the backward pass, by all layers."""
    kept_by_layer: Cost
    transient: Cost
    """Peak of the transient buffers of forward and backward pass, beside what is kept."""
    forward: Cost
    """The most that a pass without gradients holds at a time."""
    logits_per_token: int
    logits_at_a_time: int
    """The most tokens whose logits are there at a time."""
    cache_per_token: int
    """Keys and values of all layers while answers are written."""
    optimizer_per_number: float
    """Transient buffers of an optimizer step, per number of a client's row."""
    packing: Packing | None = None
    """How sequences share rows; None = each has a row of its own."""

    @staticmethod
    def of_json(values: Mapping[str, Any]) -> Costs:
        """Read what ``dataclasses.asdict`` made of them."""
        costs: dict[str, Any] = {
            name: Cost(**value) if isinstance(value, dict) else value
            for name, value in values.items()
            if name != "packing"
        }
        packing = values["packing"]
        return Costs(**costs, packing=packing and Packing(**packing))

    def load(self, clients: int, rows: int, tokens: int) -> Load:
        """What passes of so many clients read at most.

        Args:
            clients: of a pass.
            rows: of a client, where each sequence has a row of its own.
            tokens: of the longest sequence.
        """
        widest = self.packing.widest_row(rows, tokens) if self.packing else 0
        return Load(clients, rows, tokens, widest)

    def logits(self, load: Load) -> int:
        """Bytes of the logits that are there at a time."""
        return self.logits_per_token * min(load.all_tokens, self.logits_at_a_time)


@dataclass(frozen=True)
class ClientState:
    """What the trainer holds of a client."""

    numbers: int
    """A, B and head, in fp32."""
    moments: int
    """Buffers of the optimizer and of SCAFFOLD, as long as the row each."""

    @property
    def row_bytes(self) -> int:
        """One buffer with a number for each number of the adapter."""
        return self.numbers * _FP32_BYTES

    @property
    def resting_bytes(self) -> int:
        """Values and moments."""
        return self.row_bytes * (1 + self.moments)


@dataclass(frozen=True)
class Needs:
    """Bytes on a device beside the backbone."""

    values: int
    moments: int
    gradients: int
    round_start: int
    """Values that the round began with: where a client that turns non-finite goes back to."""
    copies: int
    """A and B in the backbone's dtype while a pass is under way."""
    activations: int
    logits: int
    transient: int
    optimizer: int
    evaluation: int
    """Bytes of an evaluation pass, in the place of a training pass."""
    writing: int
    """Bytes of generation, in the place of a training pass."""

    @property
    def state(self) -> int:
        """What is there all the time."""
        return self.values + self.moments + self.gradients + self.round_start

    @property
    def training(self) -> int:
        """The most of a training pass, or of the optimizer step after it."""
        in_pass = self.copies + self.activations + max(self.logits, self.transient)
        return max(in_pass, self.optimizer)

    @property
    def total(self) -> int:
        """The most at any time."""
        out_of_rounds = max(self.evaluation, self.writing) - self.round_start
        return self.state + max(self.training, out_of_rounds)


@dataclass(frozen=True)
class Work:
    """What a process does, as far as memory is concerned."""

    own_clients: int
    round_clients: int
    """The most of them that train in a round."""
    train_rows: int
    """Rows of a client in a training pass."""
    eval_rows: int
    tokens: int
    """Tokens of the longest row."""
    new_tokens: int
    """Tokens of a generated answer; 0 = no generation."""

    def needs(self, costs: Costs, state: ClientState, clients: int) -> Needs:
        """What passes of this many clients need on the device."""
        # One group trains while the next comes and the last goes back.
        groups = 1 if clients >= self.round_clients else 2
        load = costs.load(clients, self.train_rows, self.tokens)
        held_out = costs.load(clients, self.eval_rows, self.tokens)
        writers = clients * self.eval_rows if self.new_tokens else 0
        cache = writers * (self.tokens + self.new_tokens) * costs.cache_per_token
        forward = costs.forward.of(held_out)
        row = state.row_bytes * clients
        # Evaluation has a place of its own for the adapters of clients that do not stay.
        brought = 0 if clients >= self.own_clients else row
        copies = costs.kept.of_clients(clients)
        return Needs(
            values=groups * row,
            moments=groups * row * state.moments,
            gradients=row,
            round_start=row,
            copies=copies,
            activations=costs.kept.of(load) - copies,
            logits=costs.logits(load),
            transient=costs.transient.of(load),
            optimizer=round(costs.optimizer_per_number * state.numbers * clients),
            evaluation=brought + max(forward, costs.logits(held_out)),
            writing=brought + forward + cache if writers else 0,
        )

    def most_clients(self, costs: Costs, state: ClientState, free_bytes: int) -> int:
        """The largest number of clients of a round whose pass fits; 0 where not even one does.

        Args:
            costs: of a pass.
            state: of a client.
            free_bytes: of the device, beside the backbone.
        """

        def fits(clients: int) -> bool:
            return self.needs(costs, state, clients).total <= USABLE_SHARE * free_bytes

        # All of a round need no second group, so they may fit where one less does not.
        return (
            self.round_clients
            if fits(self.round_clients)
            else largest(fits, self.round_clients - 1)
        )


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest number from 1 to the limit that fits, where larger ones fit less; 0 if none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low
