"""Whole rounds of the trainer and of loops that people write, on the same examples.

All start from the same adapters, read the same batches of rows of unequal length, make the same
optimizer steps with clipping, and end a round with the mean of A; so their losses and adapters are
the same up to round-off (a test, and every run of the bench checks the losses).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from sfed.bench.measure import Clock
from sfed.bench.steps import GAMMA, replica
from sfed.clients.round_stats import RoundStats
from sfed.config.clients import settings_of
from sfed.config.load import validate
from sfed.config.schema import Config
from sfed.data import batches, splits
from sfed.data.batches import IGNORED_LABEL, Order
from sfed.data.placement import Placement
from sfed.data.splits import Data
from sfed.data.tasks import task_of
from sfed.data.tokenize import Examples, Row, Tokens
from sfed.distributed.shutdown import StopRequest
from sfed.distributed.world import World
from sfed.federated import local, passes
from sfed.federated.context import Run
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.hf_blocks import patch_blocks
from sfed.lora.layout import Layout
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.methods import aggregation
from sfed.methods import method as methods
from sfed.models.hf_config import DTYPES
from sfed.models.synthetic import build, model_config
from sfed.models.tokenizer import load_tokenizer
from sfed.storage import resume
from sfed.utils.errors import UserError

# ln(length) of random rows: normal, as wide as that of GSM8K (half of it at most 194 tokens, 90 %
# at most 311, 99 % at most 439).
SIGMA_OF_LENGTHS = 0.36
# Of the median: no random row is longer.
LONGEST_SHARE = 3
_EXAMPLES_PER_CLIENT = 64
_ALL = 2**31
_SEED = 0
_STD_OF_A = 0.05

Parts = dict[str, float]
"""Seconds of a round by part: steps, similarity, mean."""


@dataclass(frozen=True)
class Job:
    """What every contestant does; it is sent to a process of its own."""

    model: str
    """Name of a shape, for random weights; else a folder."""
    model_folder: Path | None
    """With the config.json of another shape, for random weights."""
    num_layers: int | None
    data: Path | None
    """Real examples, for a model in a folder; None = random tokens."""
    task: str
    """Form of the real examples, as data.task."""
    dtype: str
    num_clients: int
    rows: int
    """Examples of a client and step."""
    tokens: int
    """Median length of random rows; of real ones the longest."""
    steps: int
    """Of a client and round."""
    lora_rank: int
    target_modules: tuple[str, ...] | str

    @cached_property
    def config(self) -> Config:
        """The same as the configuration of a run."""
        targets = self.target_modules
        data: dict[str, Any] = {"task": "gsm8k"}  # any that needs no file
        if self.data is not None:
            data = {"task": self.task, "train_files": str(self.data), "max_tokens": self.tokens}
        return validate(
            {
                "model": {"name": self.model, "dtype": self.dtype},
                "data": data,
                "lora": {
                    "rank": self.lora_rank,
                    "target_modules": targets if isinstance(targets, str) else list(targets),
                },
                "federated": {"method": "sfed", "num_clients": self.num_clients},
                "train": {"batch_size": self.rows, "local_steps": self.steps, "lr": 1e-3},
                "evaluation": {"generate": False},
                "seed": _SEED,
            }
        )

    @property
    def shape(self) -> PreTrainedConfig:
        """The model's own configuration."""
        folder = self.model_folder if self.data is None else Path(self.model)
        return model_config(self.model, folder, self.num_layers)

    @property
    def layout(self) -> Layout:
        """Of a client's row, without any weight.

        Raises:
            UserError: where a target is no layer of this shape.
        """
        blank = build(self.shape, DTYPES[self.dtype], _SEED, torch.device("meta"), blank=True)
        try:
            return _attach(blank, self).layout
        except UserError as mistake:
            raise UserError(str(mistake).replace("lora.target_modules", "--targets")) from None

    @property
    def about_rows(self) -> str:
        """What a client reads in a step, in words."""
        each = f"{self.rows} rows of each of {self.num_clients} clients"
        if self.data is not None:
            return f"{each}, from {self.data}, of at most {self.tokens} tokens"
        return (
            f"{each}, of random tokens; ln(length) is normal, half of the rows have at most "
            f"{self.tokens} tokens and two thirds are within a factor of "
            f"{math.exp(SIGMA_OF_LENGTHS):.2f} of that; the second half of a row is learned"
        )


@dataclass(frozen=True)
class Material:
    """A model, what the clients read, and the adapters that they start from."""

    job: Job
    world: World
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast | None
    data: Data
    layout: Layout
    first_a: torch.Tensor
    """(parameters of A,) of every client; B is 0."""

    def batch(self, client: int, position: int) -> list[Row]:
        """The examples of a client's step."""
        order = Order(_SEED, client, len(self.data.train[client]))
        return batches.draw(self.data.train[client], order, position, self.job.rows)

    def first_values(self, layer: str, factor: str) -> torch.Tensor:
        """The factor of a layer that every client starts with."""
        piece = next(p for p in self.layout.pieces if (p.layer, p.factor) == (layer, factor))
        if factor == "B":
            return torch.zeros(piece.shape, device=self.world.device)
        return piece.within(self.layout, self.first_a).clone()


def material(job: Job, world: World) -> Material:
    """Make what a contestant works on; the same in every process."""
    dtype, tokenizer = DTYPES[job.dtype], None
    if job.data is None:
        model = build(job.shape, dtype, _SEED, world.device)
        data = _random_data(job, int(model.config.vocab_size))
    else:
        tokenizer, _ = load_tokenizer(job.config, job.model)
        data = splits.load(job.config, tokenizer, world, job.num_clients, False)
        model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).to(world.device)
        model.requires_grad_(False)
        model.config.use_cache = False
    layout = job.layout
    generator = torch.Generator().manual_seed(_SEED)
    columns = layout.columns("A")
    first_a = torch.randn(columns.stop - columns.start, generator=generator)
    first_a *= _STD_OF_A
    return Material(job, world, model.eval(), tokenizer, data, layout, first_a.to(world.device))


def _attach(model: PreTrainedModel, job: Job) -> Adapters:
    return adapters.attach(model, LoraSpec(job.lora_rank, GAMMA, 0.0, job.target_modules, "bench"))


def _random_data(job: Job, vocabulary_size: int) -> Data:
    """Random tokens with lengths like those of GSM8K; the second half of each row is learned."""
    everyone = range(job.num_clients)
    train = {client: _random_examples(job, client, vocabulary_size) for client in everyone}
    nothing = Examples(train[0].table, np.arange(0))
    return Data(
        train=train,
        held_out=dict.fromkeys(everyone, nothing),
        train_counts=(_EXAMPLES_PER_CLIENT,) * job.num_clients,
        eval_counts=(0,) * job.num_clients,
        summary={"clients": []},
        notes=(),
        lines=(),
        used_columns=frozenset(),
        parts=("",),
        settings=settings_of(job.config, [""] * job.num_clients),
        placement=Placement((tuple(everyone),), "one process holds all"),
    )


def _random_examples(job: Job, client: int, vocabulary_size: int) -> Examples:
    generator = np.random.default_rng([_SEED, client])
    drawn = job.tokens * np.exp(SIGMA_OF_LENGTHS * generator.standard_normal(_EXAMPLES_PER_CLIENT))
    lengths = np.clip(np.rint(drawn).astype(np.int64), 2, LONGEST_SHARE * job.tokens)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    table = Tokens(
        generator.integers(vocabulary_size, size=starts[-1], dtype=np.int32),
        starts,
        (lengths // 2).astype(np.int32),
        keys=None,
        targets=np.full(len(lengths), np.nan),
        predicts_targets=False,
        parts=("",),
        part_of_row=np.zeros(len(lengths), dtype=np.int64),
        left_out=0,
    )
    return Examples(table, np.arange(len(lengths)))


class Rounds(ABC):
    """One way to train all clients for a round."""

    def __init__(self, material: Material) -> None:
        self.material = material
        self.clock = Clock(material.world.device)
        self.losses: list[list[float]] = []
        """By round: each client's mean over the tokens that it learned in it."""

    @property
    def about(self) -> str:
        """What a reader should know of it; empty where there is nothing."""
        return ""

    @abstractmethod
    def round(self) -> Parts:
        """Train every client and take the mean of A."""

    @abstractmethod
    def factor(self, client: int, layer: str, factor: str) -> torch.Tensor:
        """A client's factor of a layer."""


class OneByOne(Rounds):
    """One client after another, as a loop is written without this trainer."""

    def round(self) -> Parts:
        """All steps of a client, then the next; the mean at the end."""
        moments, found = [self.clock.read()], []
        for client in range(self.material.job.num_clients):
            first = len(self.losses) * self.material.job.steps * self.material.job.rows
            found.append(self.train(client, first))
        moments.append(self.clock.read())
        self.average()
        moments.append(self.clock.read())
        self.losses.append(found)
        return {"steps": moments[1] - moments[0], "mean": moments[2] - moments[1]}

    @abstractmethod
    def train(self, client: int, position: int) -> float:
        """Make the steps of a round, from a position of the client's order.

        Returns:
            The mean loss over the tokens that were learned.
        """

    @abstractmethod
    def average(self) -> None:
        """Replace the A of all clients by their mean."""


def average(of_clients: Sequence[Sequence[torch.Tensor]]) -> None:
    """Replace the tensors of each client by the means over clients, in place."""
    with torch.no_grad():
        sums = [torch.zeros_like(one) for one in of_clients[0]]
        for own in of_clients:
            torch._foreach_add_(sums, list(own), alpha=1.0 / len(of_clients))
        for own in of_clients:
            torch._foreach_copy_(list(own), sums)


class Lean(OneByOne):
    """The leanest loop that a good engineer writes by hand.

    One frozen model whose linear layers add the factors of the client at work; the rows of a step
    padded to the longest; logits of the learned tokens only; torch's fused AdamW.
    """

    def __init__(self, material: Material) -> None:
        super().__init__(material)
        job, model = material.job, material.model
        names = [piece.layer for piece in material.layout.pieces if piece.factor == "A"]
        self._layers = {name: LeanLinear(model.get_submodule(name)) for name in names}
        for name, layer in self._layers.items():
            model.set_submodule(name, layer)
        self._factors = [self._new_factors() for _ in range(job.num_clients)]
        train = job.config.train
        self._optimizers = [
            torch.optim.AdamW([*a, *b], lr=train.lr, weight_decay=train.weight_decay, fused=True)
            for a, b in self._factors
        ]

    def _new_factors(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        first = self.material.first_values
        a, b = ([nn.Parameter(first(name, f)) for name in self._layers] for f in "AB")
        return a, b

    def train(self, client: int, position: int) -> float:
        """Swap the client's factors in and make its steps."""
        job, device = self.material.job, self.material.world.device
        a, b = self._factors[client]
        for layer, *factors in zip(self._layers.values(), a, b, strict=True):
            layer.a, layer.b = factors
        optimizer, most = self._optimizers[client], job.config.train.max_grad_norm
        loss_sum, count = torch.zeros((), device=device), 0
        for step in range(job.steps):
            rows = self.material.batch(client, position + step * job.rows)
            ids, places, targets = (part.to(device) for part in padded(rows))
            loss = self._loss(ids, places, targets)
            torch.autograd.backward(loss)
            if most is not None:
                nn.utils.clip_grad_norm_([*a, *b], most, foreach=True)
            optimizer.step()
            optimizer.zero_grad()
            loss_sum, count = loss_sum + loss.detach() * len(targets), count + len(targets)
        return float(loss_sum) / count

    def _loss(self, ids: torch.Tensor, places: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        model = self.material.model
        hidden = model.base_model(input_ids=ids).last_hidden_state
        logits = model.get_output_embeddings()(hidden.flatten(0, 1)[places])
        return functional.cross_entropy(logits.float(), targets)

    def average(self) -> None:
        """Take the mean of all A."""
        average([a for a, _ in self._factors])

    def factor(self, client: int, layer: str, factor: str) -> torch.Tensor:
        """A client's factor of a layer."""
        of_factor = self._factors[client]["AB".index(factor)]
        return of_factor[list(self._layers).index(layer)].detach()


class LeanLinear(nn.Module):
    """A frozen linear layer and the factors of one client."""

    a: torch.Tensor
    b: torch.Tensor

    def __init__(self, frozen: nn.Module) -> None:
        super().__init__()
        self.frozen = frozen

    def __setattr__(self, name: str, value: Any) -> None:
        """Let factors come and go without being registered as the module's own."""
        if name in "ab":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """The frozen product and gamma B A x."""
        a, b = self.a.to(inputs.dtype), self.b.to(inputs.dtype)
        added = functional.linear(functional.linear(inputs, a), b)
        output: torch.Tensor = self.frozen(inputs)
        return output + GAMMA * added


def padded(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows as long as the longest: ids, the flat places that predict, what they predict."""
    ids, labels = padded_labels(rows)
    places = torch.nonzero(labels[:, 1:] != IGNORED_LABEL)
    return ids, places[:, 0] * ids.shape[1] + places[:, 1], labels[places[:, 0], places[:, 1] + 1]


def padded_labels(rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
    """(rows, tokens) ids and labels, padded at the right to the longest."""
    shape = (len(rows), max(len(row.ids) for row in rows))
    ids, labels = torch.zeros(shape, dtype=torch.long), torch.full(shape, IGNORED_LABEL)
    for place, row in enumerate(rows):
        tokens = torch.from_numpy(row.ids.astype(np.int64))
        ids[place, : len(tokens)] = tokens
        learned = torch.from_numpy(np.flatnonzero(row.is_learned))
        labels[place, learned] = tokens[learned]
    return ids, labels


class SfedRounds(Rounds):
    """The trainer's own rounds: its local steps, the similarity of the clients, the mean."""

    def __init__(self, material: Material, per_pass: str) -> None:
        """Build the run.

        Args:
            material: of the job.
            per_pass: auto, all or a number.
        """
        super().__init__(material)
        sharing = {
            "auto": ClientsPerPass(_ALL, "all fit", is_limit=True),
            "all": ClientsPerPass(_ALL, "as asked"),
        }
        chosen = sharing.get(per_pass)
        run = _run(material, chosen or ClientsPerPass(int(per_pass), "as asked"))
        self.run = passes.at_the_knee(run)
        self.run.clients.set_shared("A", material.first_a)
        self._stop = StopRequest(material.world)

    @property
    def about(self) -> str:
        """How many clients share a pass, and why."""
        return f"{self.run.clients.clients_per_pass} a pass; {self.run.sharing.reason}"

    def round(self) -> Parts:
        """Make a round as the trainer does, with the similarity that it reports."""
        run, moments = self.run, [self.clock.read()]
        plan, stats = run.plan(len(self.losses)), RoundStats.empty(run.num_clients)
        local.train(run, plan, stats, self._stop, _nobody)
        local.gather(run, plan, stats, 0.0)
        moments.append(self.clock.read())
        aggregation.similarity(run.world, run.clients)
        moments.append(self.clock.read())
        aggregation.share(run.world, run.clients, plan.means, run.weights(plan.cohort))
        moments.append(self.clock.read())
        self.losses.append((stats.loss_sum / stats.supervised).tolist())
        steps, similarity, mean = np.diff(moments).tolist()
        return {"steps": steps, "similarity": similarity, "mean": mean}

    def factor(self, client: int, layer: str, factor: str) -> torch.Tensor:
        """A client's factor of a layer."""
        row = self.run.clients.row(client)
        pieces = self.run.clients.layout.pieces
        piece = next(p for p in pieces if (p.layer, p.factor) == (layer, factor))
        return row[piece.start : piece.end].view(piece.shape)


def _nobody(_done: int, _last: int, _loss: Callable[[], float], _tokens: int) -> None:
    """Nobody is told about a step."""


def _run(material: Material, sharing: ClientsPerPass) -> Run:
    """A run of the trainer, with nothing of it on disk."""
    job, config, world = material.job, material.job.config, material.world
    patch_blocks(material.model)
    attached = _attach(material.model, job)
    clients = passes.new_clients(config, world, attached, range(job.num_clients), sharing)
    return Run(
        config=config,
        world=world,
        task=task_of(config),
        tokenizer=material.tokenizer,  # random tokens have none
        method=methods.resolve(config),
        num_clients=job.num_clients,
        gammas=(GAMMA,) * job.num_clients,
        backbone=replica(material.model),
        adapters=attached,
        data=material.data,
        clients=clients,
        sharing=sharing,
        course=resume.course_from(None, config),
        origin=None,
    )
