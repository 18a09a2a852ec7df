"""What the bench lets run side by side on the same frozen weights; stock PEFT has its own file.

All make the same step: forward, backward and AdamW on the same tokens of every client, from the
same adapters, with the same gamma; two of them end with the same adapters (a test). What a round
does once and not in each step (bringing a client's adapter in and out) is left out for all alike.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable

import torch
from transformers import PreTrainedModel

from sfed.bench.workload import Workload
from sfed.clients import store as client_store
from sfed.clients.optimizer import StackedOptimizer
from sfed.clients.state import MOMENTS
from sfed.clients.store import ClientStore
from sfed.config.sections.train import TrainSection
from sfed.data.batches import Batch
from sfed.kernels.choice import choose
from sfed.lora import adapters, packed_attention
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.hf_blocks import patch_blocks
from sfed.models.backbone import Backbone
from sfed.models.hf_config import Sharding

GAMMA = 2.0
_TRAINED = ("A", "B")
# As PyTorch's AdamW but for its weight decay; no clipping, since a plain loop has none.
TRAIN = TrainSection(lr=1e-3, weight_decay=0.0, max_grad_norm=None)


class Contestant(ABC):
    """One way to make a step of every client, in turns of one client or of all."""

    num_turns: int

    def __init__(self, workload: Workload, input_ids: torch.Tensor) -> None:
        self.workload = workload
        self._input_ids = input_ids

    @abstractmethod
    def enter(self, turn: int) -> None:
        """Bring in the clients of a turn; not timed, since a round does it once."""

    @abstractmethod
    def losses(self) -> torch.Tensor:
        """Forward: the mean loss of each client of the turn, (clients of the turn,)."""

    @abstractmethod
    def update(self) -> None:
        """The optimizer's step for the clients of the turn."""

    def step(self) -> torch.Tensor:
        """Forward, backward, optimizer; returns the (clients of the turn,) losses before it."""
        losses = self.losses()
        torch.autograd.backward(losses.sum())
        self.update()
        return losses.detach()

    def leave(self) -> None:  # noqa: B027  (not all have something to put away)
        """Put the clients of the turn away; not timed."""

    @abstractmethod
    def frozen(self) -> Iterable[torch.Tensor]:
        """Weights and buffers that autograd may keep at no cost, because they are there anyway."""

    @abstractmethod
    def state(self) -> Iterable[torch.Tensor]:
        """What exists for the clients: factors, gradients, moments."""

    def _rows_of(self, turn: int) -> torch.Tensor:
        """The tokens of a turn."""
        count = len(self._input_ids) // self.num_turns
        return self._input_ids[turn * count : (turn + 1) * count]


def attach(model: PreTrainedModel, workload: Workload) -> Adapters:
    """Put the trainer's layers into a model, as a run would."""
    return adapters.attach(
        model, LoraSpec(workload.lora_rank, GAMMA, 0.0, workload.target_modules, "bench")
    )


def every_position(input_ids: torch.Tensor) -> torch.Tensor:
    """Places from which a token is predicted where all tokens are supervised: (rows * (T - 1),)."""
    places = torch.arange(input_ids.numel(), device=input_ids.device).view(input_ids.shape)
    return places[:, :-1].flatten()


def replica(model: PreTrainedModel) -> Backbone:
    """The model as it is, without any hooks."""
    packed_attention.install(model, model.device)
    return Backbone(model, None, Sharding("none", "one process"), None)


class Sfed(Contestant):
    """The trainer's own path: rows of clients, bound layers, its losses and its optimizer."""

    def __init__(
        self,
        model: PreTrainedModel,
        workload: Workload,
        input_ids: torch.Tensor,
        *,
        clients_per_pass: int,
        store: Callable[[PreTrainedModel], Backbone] = replica,
    ) -> None:
        super().__init__(workload, input_ids)
        kernels = choose(TRAIN.kernels, input_ids.device, workload.dtype)
        patch_blocks(model, kernels)
        self.backbone = store(model)
        self.backbone.kernels = kernels
        self.adapters = attach(model, workload)
        own = range(workload.num_clients)
        self.clients = ClientStore(
            own,
            self.adapters.layout,
            input_ids.device,
            clients_per_pass=clients_per_pass,
            moments=MOMENTS,
        )
        client_store.draw_initial(self.clients, self.adapters, seed=workload.seed, independent=True)
        self._groups = list(client_store.groups(own, self.clients.clients_per_pass))
        self.num_turns = len(self._groups)
        self._passes = self.clients.passes((), ())
        self.backbone.training()
        self.enter(0)

    def enter(self, turn: int) -> None:
        """Bring the rows of the turn's clients to the device and point the layers at them."""
        self._bring(self._groups[turn], self._rows_of(turn))

    def enter_first(self, count: int) -> None:
        """Bring only the first clients."""
        self._bring(tuple(range(count)), self._input_ids[: count * self.workload.rows])

    def _bring(self, clients: tuple[int, ...], input_ids: torch.Tensor) -> None:
        self.leave()
        self._passes = self.clients.passes([clients], _TRAINED)
        self.rows = next(self._passes)
        self.adapters.bind(self.rows.values, self.rows.grads, _TRAINED)
        self._ids = input_ids
        self._everyone = torch.ones(len(self.rows.clients), device=self._ids.device)
        supervised = self.workload.rows * (self.workload.tokens - 1)
        self._supervised_C = self._everyone * supervised

    def losses(self) -> torch.Tensor:
        """Each client's mean over its own tokens, as in a local step."""
        self.rows.grads.zero_()
        return self._means()

    def step_on(self, batch: Batch) -> None:
        """The same step on rows of other lengths, of the clients of the turn."""
        self.rows.grads.zero_()
        row_losses = self.backbone.token_losses(
            batch.input_ids, batch.labels, batch.positions, batch.documents
        )
        torch.autograd.backward(row_losses.sum() / len(batch.positions))
        self.update()

    def evaluate(self) -> torch.Tensor:
        """Return the same losses, forward only."""
        with torch.no_grad():
            return self._means()

    def _means(self) -> torch.Tensor:
        row_losses = self.backbone.token_losses(self._ids, self._ids, every_position(self._ids))
        return row_losses.view(len(self._supervised_C), -1).sum(dim=1) / self._supervised_C

    def update(self) -> None:
        """The per-client optimizer over flat rows, with the norms that a round notes."""
        adam = StackedOptimizer(TRAIN, self.clients.layout, _TRAINED, self.backbone.kernels)
        norms_C = adam.gradient_norms(self.rows)
        taken_C = self._everyone.bool() & torch.isfinite(norms_C)
        lr_C = self._everyone * TRAIN.lr
        adam.step(self.rows, lr_C, norms_C, taken_C)

    def leave(self) -> None:
        """Put the rows back, if any are there."""
        self._passes.close()

    def frozen(self) -> Iterable[torch.Tensor]:
        """The backbone and the clients' rows."""
        model = self.backbone.model
        return (*model.parameters(), *model.buffers(), self.rows.values, self.rows.grads)

    def state(self) -> Iterable[torch.Tensor]:
        """The rows, where they rest and where they are in a pass."""
        yield from self.clients.memory()


class FrozenOnly(Contestant):
    """The floor: the frozen model forward and backward, all clients in one pass, no adapters.

    The embeddings require gradients, so that those of all inputs are computed. Attention, norms,
    head and loss are in it too.
    """

    num_turns = 1

    def __init__(self, model: PreTrainedModel, workload: Workload, input_ids: torch.Tensor) -> None:
        super().__init__(workload, input_ids)
        self.backbone = replica(model)
        model.get_input_embeddings().register_forward_hook(
            lambda _module, _inputs, output: output.requires_grad_()
        )
        self._supervised = workload.rows * (workload.tokens - 1)

    def enter(self, turn: int) -> None:
        """Nothing to bring."""

    def losses(self) -> torch.Tensor:
        """Return the same losses without adapters."""
        row_losses = self.backbone.token_losses(
            self._input_ids, self._input_ids, every_position(self._input_ids)
        )
        return row_losses.view(self.workload.num_clients, -1).sum(dim=1) / self._supervised

    def update(self) -> None:
        """Nothing to train."""

    def frozen(self) -> Iterable[torch.Tensor]:
        """The model."""
        return (*self.backbone.model.parameters(), *self.backbone.model.buffers())

    def state(self) -> Iterable[torch.Tensor]:
        """Nothing."""
        return ()
