"""Which client holds which example, and how things are dealt evenly.

Everything here is a pure function of its arguments: every process computes the same answer and
nothing has to be communicated. Needs numpy only.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sfed.utils import rng
from sfed.utils.errors import DataError
from sfed.utils.rng import Stream
from sfed.utils.text import printable, some_of

Indices = NDArray[np.int64]

# Unlabelled examples are skewed over this many quantiles of their length.
LENGTH_QUANTILES = 10


def place(num_clients: int, num_processes: int) -> list[range]:
    """Return each process's clients: contiguous and as even as it goes."""
    share, extra = divmod(num_clients, num_processes)
    starts = [process * share + min(process, extra) for process in range(num_processes + 1)]
    return [range(start, end) for start, end in itertools.pairwise(starts)]


def subset(count: int, limit: int | None, seed: int) -> Indices:
    """Return ``limit`` sorted positions out of ``count``, all of them where there is no limit."""
    if limit is None or limit >= count:
        return np.arange(count)
    return np.sort(rng.generator(Stream.SUBSET, seed).permutation(count)[:limit])


def hold_out(examples: Indices, fraction: float, seed: int, client: int) -> tuple[Indices, Indices]:
    """Split one client's examples into (train, held out), at least one each where there are two."""
    generator = rng.generator(Stream.HOLD_OUT, seed, client)
    total = len(examples)
    count = min(max(1, round(fraction * total)), total - 1) if total > 1 else 0
    order = generator.permutation(total)
    return np.sort(examples[order[count:]]), np.sort(examples[order[:count]])


def iid(count: int, num_clients: int, seed: int) -> list[Indices]:
    """Deal ``count`` examples evenly and at random."""
    order = rng.generator(Stream.SPLIT, seed).permutation(count)
    return [np.sort(part) for part in np.array_split(order, num_clients)]


def dirichlet_shares(
    num_labels: int, num_clients: int, concentration: float, seed: int
) -> NDArray[np.float64]:
    """Draw the share of every label that each client gets: (labels, clients), rows sum to 1."""
    generator = rng.generator(Stream.SPLIT, seed)
    return generator.dirichlet(np.full(num_clients, concentration), size=num_labels)


def by_shares(labels: Indices, shares: NDArray[np.float64], seed: int) -> list[Indices]:
    """Deal the examples of each label to the clients in the given shares.

    The same shares applied to a training and a held-out set give each client held-out data that
    follows its training distribution.

    Args:
        labels: (examples,) label numbers in 0 .. labels - 1.
        shares: (labels, clients), rows sum to 1.
        seed: of the shuffle within a label.
    """
    num_clients = shares.shape[1]
    held: list[list[Indices]] = [[] for _ in range(num_clients)]
    for label, share in enumerate(shares):
        generator = rng.generator(Stream.SPLIT, seed, label)
        examples = generator.permutation(np.flatnonzero(labels == label))
        cuts = np.round(np.cumsum(share)[:-1] * len(examples)).astype(np.int64)
        for client, part in enumerate(np.split(examples, cuts)):
            held[client].append(part)
    return [np.sort(np.concatenate(parts)).astype(np.int64) for parts in held]


def key_groups(keys: Sequence[str], num_clients: int) -> list[tuple[str, ...]]:
    """Return the values of a column that each client holds, as even as it goes.

    They are dealt in the order of their texts, numbers too: 10 comes before 2.

    Raises:
        DataError: where there are fewer values than clients.
    """
    values = sorted(set(keys))
    if len(values) < num_clients:
        raise DataError(
            f"partition.kind=by_key: the column has {len(values)} values for {num_clients} "
            f"clients; set federated.num_clients to at most {len(values)}"
        )
    return [tuple(values[index] for index in part) for part in place(len(values), num_clients)]


def by_key(keys: Sequence[str | None], groups: Sequence[tuple[str, ...]]) -> list[Indices]:
    """Give each client the examples whose key is in its group; None and others go to nobody."""
    owner: dict[str | None, int] = {
        key: client for client, group in enumerate(groups) for key in group
    }
    client_of_row = np.asarray([owner.get(key, -1) for key in keys], dtype=np.int64)
    return [np.flatnonzero(client_of_row == client) for client in range(len(groups))]


def value_of(row: Mapping[str, Any], key: str, where: str) -> Any:
    """The value that a row has in the column ``partition.key``.

    Raises:
        DataError: where it has no such column, with its place and the columns.
    """
    if key not in row:
        known = some_of(sorted(row), printable)
        raise DataError(f"{where}: no column {key!r} (partition.key); the columns are {known}")
    return row[key]


def form_of_key(value: Any) -> str:
    """The JSON form by which values of a column are told apart: equal for equal values only.

    Types count (1, "1" and true are three values), how a number is written does not (1 and 1.0 are
    one).
    """
    return json.dumps(_plain(value), sort_keys=True)


def _plain(value: Any) -> Any:
    """The value with each whole number as an int."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value


def length_edges(lengths: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the inner edges of the length quantiles of a training set."""
    return np.quantile(lengths, np.linspace(0, 1, LENGTH_QUANTILES + 1)[1:-1])
