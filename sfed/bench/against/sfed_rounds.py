"""The trainer's own rounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from sfed.bench.against.material import Material
from sfed.bench.against.rounds import Parts, Rounds
from sfed.bench.steps import GAMMA, replica
from sfed.clients.round_stats import RoundStats
from sfed.data.tasks import task_of
from sfed.distributed.shutdown import StopRequest
from sfed.federated import local, passes
from sfed.federated.context import Run
from sfed.lora.hf_blocks import patch_blocks
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.methods import aggregation
from sfed.methods import method as methods
from sfed.models.backbone import kernels_of
from sfed.storage import resume

_ALL = 2**31


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
    kernels = kernels_of(config, world)
    patch_blocks(material.model, kernels)
    backbone = replica(material.model)
    backbone.kernels = kernels
    attached = job.attach(material.model)
    clients = passes.new_clients(config, world, attached, range(job.num_clients), sharing)
    return Run(
        config=config,
        world=world,
        task=task_of(config),
        tokenizer=material.tokenizer,  # random tokens have none
        method=methods.resolve(config),
        num_clients=job.num_clients,
        gammas=(GAMMA,) * job.num_clients,
        backbone=backbone,
        adapters=attached,
        data=material.data,
        clients=clients,
        sharing=sharing,
        course=resume.course_from(None, config),
        origin=None,
    )
