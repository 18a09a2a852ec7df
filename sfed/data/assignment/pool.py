"""The rows of one common pool, assigned to clients: training and held-out by the same rule."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sfed.config.schema import Config
from sfed.data import partition
from sfed.data.assignment.labels import Chosen, Labels, labels_of
from sfed.data.partition import Indices
from sfed.files.silos import LEAST_TRAIN_EXAMPLES

_DIRICHLET_TRIES = 100


@dataclass(frozen=True)
class Assignment:
    """Which rows of the tables each client gets."""

    train: list[Indices]
    """(N,) rows of the training table."""
    held_out: list[Indices]
    """(N,) rows of the held-out table, none where there is no table."""
    names: dict[int, str]
    """The value that a client holds, of those that hold one alone; by_key only."""
    labels: dict[int, list[str]] | None
    """The label of each training row of a client; None where rows are dealt without labels."""
    notes: list[str]
    """What a person should know."""


def deal(config: Config, train: Chosen, held_out: Chosen | None, num_clients: int) -> Assignment:
    """Deal training and held-out rows by the same rule, so that both follow one distribution.

    Args:
        config: the run.
        train: rows to train on.
        held_out: rows of a table of their own; None where they are held out of the training rows.
        num_clients: N.

    Raises:
        DataError: where values of the column cannot be told apart, or are fewer than clients.
    """
    kind, seed = config.partition.kind, config.seed
    eval_rows = np.arange(0) if held_out is None else held_out.rows
    labels: Labels | None = None
    if kind == "iid":
        parts = partition.iid(len(train.rows), num_clients, seed)
        eval_parts = partition.iid(len(eval_rows), num_clients, seed + 1)
    else:
        labels = labels_of(config, train, held_out)
        if kind == "by_key":
            parts, eval_parts = _by_key(labels, num_clients)
        else:
            parts, eval_parts = _by_shares(config, labels, num_clients)
    return Assignment(
        train=[train.rows[part] for part in parts],
        held_out=[eval_rows[part] for part in eval_parts],
        names=_names_of_values(labels, parts) if labels is not None and kind == "by_key" else {},
        labels=None if labels is None else _labels_by_client(labels, parts),
        notes=[] if labels is None else labels.notes,
    )


def _by_key(labels: Labels, num_clients: int) -> tuple[list[Indices], list[Indices]]:
    """Positions of each client's training and held-out rows: the values of a column, dealt."""
    keys = [labels.names[label] for label in labels.of_train]
    eval_keys = [labels.names[label] if label >= 0 else None for label in labels.of_eval]
    groups = partition.key_groups(keys, num_clients)
    return partition.by_key(keys, groups), partition.by_key(eval_keys, groups)


def _names_of_values(labels: Labels, parts: Sequence[Indices]) -> dict[int, str]:
    """The value that a client holds, of those that hold one alone."""
    values = [set(labels.of_train[part].tolist()) for part in parts]
    return {
        client: labels.names[next(iter(some))]
        for client, some in enumerate(values)
        if len(some) == 1
    }


def _labels_by_client(labels: Labels, parts: Sequence[Indices]) -> dict[int, list[str]]:
    return {
        client: [labels.names[label] for label in labels.of_train[part]]
        for client, part in enumerate(parts)
    }


def _by_shares(
    config: Config, labels: Labels, num_clients: int
) -> tuple[list[Indices], list[Indices]]:
    """Split by shares of each label, drawn until every client has enough to train on."""
    concentration, seed = config.partition.concentration, config.seed
    for attempt in range(_DIRICHLET_TRIES):
        draw = seed + attempt * 1_000_003
        shares = partition.dirichlet_shares(len(labels.names), num_clients, concentration, draw)
        parts = partition.by_shares(labels.of_train, shares, seed)
        if min(map(len, parts)) >= LEAST_TRAIN_EXAMPLES:
            break
    return parts, partition.by_shares(labels.of_eval, shares, seed)
