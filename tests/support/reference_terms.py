"""FedProx, SCAFFOLD and server optimizers a second time: flat vectors, plain SGD, from the papers.

SCAFFOLD (arXiv 1910.06378) with its option II: a client's variate from how far it has moved.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from transformers import AutoModelForCausalLM

from sfed.data.batches import Order
from sfed.utils.rng import Stream, derive
from tests.support import runs
from tests.support.reference import Lora, cohorts_of, parts_of, shares, tokenised

Vectors = dict[str, torch.Tensor]
"""All A, and all B, flat."""


@dataclass
class Settings:
    """What a job of the reference does; gamma = alpha / r, one A for all."""

    shared: str = "A"
    """Factors that are averaged."""
    steps: int = 3
    batch: int = 4
    lr: float = 0.05
    alpha: float = 4.0
    lora_rank: int = 4
    rounds: int = 3
    mu: float = 0.0
    scaffold: bool = False
    clip: float | None = None
    is_linear: bool = False
    """Whether the rate falls along a line to 0 at the end of the run."""
    by_examples: bool = False
    bug: str = ""
    """A mistake of public code that is made on purpose."""
    server: Callable[[Vectors, Vectors], Vectors] | None = None
    """(w, mean of the clients' changes) -> w of the next round."""

    def rate(self, round_index: int, step: int) -> float:
        done = (round_index + step / self.steps) / self.rounds
        return self.lr * (1 - done) if self.is_linear else self.lr


class Federation:
    """One model whose factors are set to a client's before each gradient."""

    def __init__(self, folder: Path, run_folder: Path, settings: Settings) -> None:
        model = AutoModelForCausalLM.from_pretrained(folder / "model").requires_grad_(False)
        self.model, self.settings = copy.deepcopy(model), settings
        linear = {
            name: module
            for name, module in sorted(self.model.named_modules())
            if isinstance(module, nn.Linear) and name != "lm_head"
        }
        generator = torch.Generator().manual_seed(derive(Stream.INIT_A, 0))
        self.layers: dict[str, Lora] = {}
        for name, layer in linear.items():
            bound, shape = layer.in_features**-0.5, (settings.lora_rank, layer.in_features)
            a = torch.empty(shape).uniform_(-bound, bound, generator=generator)
            self.layers[name] = Lora(layer, a, settings.alpha / settings.lora_rank)
            self.model.set_submodule(name, self.layers[name])
        rows, self.parts = tokenised(folder), parts_of(run_folder)
        self.rows = [[rows[i] for i in part["train"]] for part in self.parts]
        self.orders = [Order(0, c, len(own)) for c, own in enumerate(self.rows)]
        self.positions = [0] * len(self.rows)
        self.cohorts = cohorts_of(run_folder)

    def parameters(self, factor: str) -> list[nn.Parameter]:
        return [getattr(layer, factor) for layer in self.layers.values()]

    def start(self) -> Vectors:
        return {f: parameters_to_vector(self.parameters(f)).detach().clone() for f in "AB"}

    def batch_of(self, client: int) -> list[tuple[list[int], int]]:
        first = self.positions[client]
        self.positions[client] += self.settings.batch
        order = self.orders[client]
        return [self.rows[client][order.at(first + i)] for i in range(self.settings.batch)]

    def gradient(self, values: Vectors, batch: Sequence[tuple[list[int], int]]) -> Vectors:
        for factor in "AB":
            vector_to_parameters(values[factor], self.parameters(factor))
        self.model.zero_grad()
        width = max(len(ids) for ids, _ in batch)
        input_ids = torch.tensor([ids + [1] * (width - len(ids)) for ids, _ in batch])
        labels = torch.full_like(input_ids, -100)
        for i, (ids, prompt) in enumerate(batch):
            labels[i, prompt : len(ids)] = input_ids[i, prompt : len(ids)]
        self.model(input_ids=input_ids, labels=labels).loss.backward()
        return {f: torch.cat([p.grad.flatten() for p in self.parameters(f)]).clone() for f in "AB"}

    def train(self) -> list[Vectors]:
        """The factors of every client after all rounds."""
        s, n = self.settings, len(self.rows)
        everyone = shares(self.parts, list(range(n)), by_examples=s.by_examples)
        held = [self.start() for _ in range(n)]
        x = {f: held[0][f].clone() for f in s.shared}
        c = {f: torch.zeros_like(x[f]) for f in s.shared}
        c_of = [{f: torch.zeros_like(x[f]) for f in s.shared} for _ in range(n)]
        for t, cohort in enumerate(self.cohorts):
            p = shares(self.parts, cohort, by_examples=s.by_examples)
            c_before = {f: c[f].clone() for f in c}
            for i in cohort:
                y = {**held[i], **{f: x[f].clone() for f in x}}
                for k in range(s.steps):
                    self._step(y, i, s.rate(t, k), x, {f: c_before[f] - c_of[i][f] for f in c})
                moved = sum(s.rate(t, k) for k in range(s.steps))
                held[i] = y
                for f in c if s.scaffold else ():
                    new = c_of[i][f] - c_before[f] + (x[f] - y[f]) / moved
                    if s.bug == "the corrected gradient is kept":
                        new = (x[f] - y[f]) / moved
                    if s.bug == "steps count the same whatever their rate":
                        new = c_of[i][f] - c_before[f] + (x[f] - y[f]) / (s.steps * s.lr)
                    of_cohort = s.bug == "the server takes the weights of the cohort"
                    weight = p[cohort.index(i)] if of_cohort else everyone[i]
                    c[f] += weight * (new - c_of[i][f])
                    c_of[i][f] = new
            changes = {
                f: sum(w * (held[i][f] - x[f]) for w, i in zip(p, cohort, strict=True)) for f in x
            }
            x = s.server(x, changes) if s.server else {f: x[f] + changes[f] for f in x}
            for own in held:
                own.update({f: x[f].clone() for f in x})
        return held

    def _step(self, y: Vectors, client: int, rate: float, x: Vectors, correction: Vectors) -> None:
        s, grads = self.settings, self.gradient(y, self.batch_of(client))
        for f in x:
            sign = -1.0 if s.bug == "the wrong sign" else float(s.scaffold)
            grads[f] = grads[f] + s.mu * (y[f] - x[f]) + sign * correction[f]
        norm = torch.cat(list(grads.values())).norm()
        factor = min(1.0, s.clip / (float(norm) + 1e-6)) if s.clip else 1.0
        for f in grads:
            y[f] = y[f] - rate * factor * grads[f]

    def difference(self, held: list[Vectors], run_folder: Path) -> float:
        """Largest difference of a factor to those that a run has exported, relative to its size."""
        found, worst = runs.adapters(run_folder), 0.0
        for client, vectors in enumerate(held):
            tensors = found[f"client-{client:04d}"]
            for f in "AB":
                names = [f"base_model.model.{name}.lora_{f}.weight" for name in self.layers]
                ours = torch.cat([tensors[name].flatten() for name in names])
                scale = float(vectors[f].abs().max())
                worst = max(worst, float((ours - vectors[f]).abs().max()) / max(scale, 1e-12))
        return worst


def difference_to(folder: Path, run_folder: Path, **settings: Any) -> float:
    """How far a run is from the reference under these settings."""
    federation = Federation(folder, run_folder, Settings(**settings))
    return federation.difference(federation.train(), run_folder)


Server = Callable[[Vectors, Vectors], Vectors]


def server_of(kind: str, lr: float, beta1: float, beta2: float, tau: float) -> Server:
    """A server of arXiv 2003.00295 with its state: m from 0 and v from tau^2."""
    m: Vectors = {}
    v: Vectors = {}

    def server(x: Vectors, changes: Vectors) -> Vectors:
        after = {}
        for f, d in changes.items():
            m[f] = (
                beta1 * m.get(f, torch.zeros_like(d)) + (1 if kind == "fedavgm" else 1 - beta1) * d
            )
            old = v.get(f, torch.full_like(d, tau**2))
            if kind == "fedavgm":
                after[f] = x[f] + lr * m[f]
                continue
            v[f] = {
                "fedadagrad": old + d**2,
                "fedyogi": old - (1 - beta2) * d**2 * torch.sign(old - d**2),
                "fedadam": beta2 * old + (1 - beta2) * d**2,
            }[kind]
            after[f] = x[f] + lr * m[f] / (v[f].sqrt() + tau)
        return after

    return server
