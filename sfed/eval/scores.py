"""Scores adapters on held-out rows with the trainer's own evaluation.

Each adapter is a client of an evaluation that holds all of the rows; so is the base model, B = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from sfed.clients.schedule import course_of
from sfed.clients.store import ClientStore
from sfed.config.schema import Config
from sfed.data import splits
from sfed.data.tasks import task_of
from sfed.distributed.shutdown import StopRequest
from sfed.federated.build import check_rows_fit
from sfed.federated.context import Run
from sfed.federated.evaluate import Measured, evaluate, score_names
from sfed.federated.loaded import Loaded
from sfed.memory.clients_per_pass import ClientsPerPass
from sfed.methods import method as methods
from sfed.observability import metrics

BASE = "base model"


def measure(loaded: Loaded, titles: Sequence[str]) -> dict[str, Any]:
    """Score the adapters and their base model.

    Args:
        loaded: the adapters.
        titles: a name for each of them.

    Returns:
        What ``--json`` writes: ``base_model``, ``gamma``, ``examples``, ``loss_unit``, ``scores``
        (names), ``notes``, and ``adapters`` with name, loss, perplexity where tokens are learned,
        and each score.

    Raises:
        DataError: where a file or a row is wrong.
        UserError: where a row does not fit the base model.
    """
    run = _run_of(loaded)
    found = evaluate(run, StopRequest(loaded.world), run.config.federated.num_rounds)
    assert found is not None, "nobody asks this evaluation to stop"
    names = score_names(run)
    measured = found.kinds["personal"]
    return {
        "base_model": loaded.config.model.name,
        "gamma": loaded.gamma,
        "examples": run.data.eval_counts[0],
        "loss_unit": run.task.loss_in_words,
        "scores": list(names),
        "notes": list(run.data.notes),
        "adapters": [
            _entry(run, measured, number, title) for number, title in enumerate([BASE, *titles])
        ],
    }


def _entry(run: Run, measured: Measured, number: int, title: str) -> dict[str, Any]:
    loss = measured.loss(number)
    entry: dict[str, Any] = {"name": title, "loss": loss}
    if run.task.loss_unit == "token":
        entry["perplexity"] = metrics.perplexity(loss)
    entry |= {name: measured.score(name, number) for name in score_names(run)}
    if samples := measured.samples.get(number):
        entry["samples"] = [asdict(sample) for sample in samples]
    return entry


def _run_of(loaded: Loaded) -> Run:
    """An evaluation of which the base model and each adapter are clients."""
    config: Config = loaded.config
    rows = [loaded.base_row(), *loaded.rows]
    layout, num = loaded.adapters.layout, len(rows)
    data = splits.held_out_for_all(config, loaded.tokenizer, num)
    check_rows_fit(config, data, loaded.backbone)
    clients = ClientStore(range(num), layout, loaded.world.device, clients_per_pass=1, moments=())
    for number, row in enumerate(rows):
        factors = {factor.lower(): row[layout.columns(factor)] for factor in layout.factors}
        clients.set_own(number, factors)
    return Run(
        config,
        loaded.world,
        task_of(config),
        loaded.tokenizer,
        methods.resolve(config),
        num,
        (loaded.gamma,) * num,
        loaded.backbone,
        loaded.adapters,
        data,
        clients,
        ClientsPerPass(1, "an adapter at a time"),
        course_of(None, config.federated.num_rounds),
        None,
    )
