"""Which client of this process holds which tokenised rows.

With one common pool every process computes the same split of everything. Under
``partition.kind=by_file`` a process opens the files of its own clients and no others. Which clients
a process holds follows from the work of each (``placement``).
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from sfed.config.clients import ClientSettings, settings_of
from sfed.config.schema import Config
from sfed.data import classification, partition, scores
from sfed.data.assignment import placement
from sfed.data.assignment.labels import Chosen
from sfed.data.assignment.placement import Placement
from sfed.data.assignment.pool import deal
from sfed.data.forms.reading import Reading, Truncated, header_lines, length_lines
from sfed.data.sources import has_split, source_of
from sfed.data.tasks import task_of
from sfed.data.tokenize import Examples, Tokens, tokenise
from sfed.data.tokenizer import identity_of
from sfed.distributed.sync import first_of_node_first, gather_json, raise_everywhere
from sfed.distributed.world import World
from sfed.files.listing import Split, files_of
from sfed.files.names import adapter_folders
from sfed.files.silos import LEAST_TRAIN_EXAMPLES, Silos, silos_of
from sfed.utils.errors import DataError
from sfed.utils.rng import Stream, generator
from sfed.utils.text import counted

_MOST_NAMED = 8


@dataclass(frozen=True)
class Data:
    """The data of this process's clients, and the counts of everybody's."""

    train: dict[int, Examples]
    held_out: dict[int, Examples]
    train_counts: tuple[int, ...]
    eval_counts: tuple[int, ...]
    summary: dict[str, Any]
    """What ``partition.json`` records; the digests tell processes, or starts, apart whose data are
    not the same."""
    notes: tuple[str, ...]
    """What a person should know, such as rows that were left out."""
    lines: tuple[str, ...]
    """What the header of a run says of columns and lengths."""
    used_columns: frozenset[str]
    """The columns of the rows of which something is used, by any process."""
    parts: tuple[str, ...]
    """Names of the parts of the held-out set; one empty name where there are none."""
    placement: Placement
    """Which process holds which client; the same on every process."""
    settings: tuple[ClientSettings, ...]
    """(N,): what each client trains with; empty where none trains."""
    left_out: tuple[str, ...] = ()
    """Names of files with too few rows, which are no clients (``data.on_small_client=skip``)."""

    @cached_property
    def names(self) -> list[str]:
        """The name of each client: of its file, or its value of a column; "" where it has none."""
        return [entry["name"] for entry in self.summary["clients"]]

    @cached_property
    def adapter_folders(self) -> list[str]:
        """The name of the folder of each client's adapter."""
        return [entry["adapter"] for entry in self.summary["clients"]]

    def columns_of(self, client: int) -> frozenset[str]:
        """The columns of the training rows that a client's were read from, in use."""
        return frozenset(self.summary["clients"][client]["columns"])

    @cached_property
    def digests(self) -> list[str]:
        """Digests of the training and held-out examples of each client."""
        return [entry["digest"] for entry in self.summary["clients"]]

    @property
    def class_counts(self) -> list[int]:
        """Training examples of each class, of all clients; empty for tasks without classes."""
        counts = [entry["classes"] or [] for entry in self.summary["clients"]]
        return [sum(of_class) for of_class in zip(*counts, strict=True)]


def with_labels(config: Config, world: World, num_clients: int) -> Config:
    """Fill in ``data.labels`` where nothing names the classes of own texts. Collective.

    They are the labels of all training files. A process reads those files that hold its clients,
    and the labels alone are exchanged.

    Raises:
        DataError: on every process, for a record without a label, or labels that are no classes.
    """
    if config.data.task != "classification" or config.data.labels is not None:
        return config
    with raise_everywhere(world, "files of the labels"):
        files = files_of(config, "train")
        if config.partition.kind == "by_file":
            silos = silos_of(config, num_clients)
            placed = _place_files(config, world, silos)
            files = tuple(silos.train[client] for client in placed.clients[world.rank])
    with raise_everywhere(world, "reading the labels"):
        columns = classification.Columns(config.data.column_names)
        rows = ((where, row) for (where, _), row in source_of(config, "train", files)[0])
        own = list(classification.labels_in(rows, columns))
    told = gather_json(world, "labels of the training files", own)
    with raise_everywhere(world, "labels of the training files"):
        labels = classification.ordered(label for some in told for label in some)
    return config.model_copy(update={"data": config.data.model_copy(update={"labels": labels})})


def load(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    world: World,
    num_clients: int,
    in_lockstep: bool,
) -> Data:
    """Tokenise, split over the clients, hold out, and deal the clients to processes. Collective.

    Args:
        config: the run.
        tokenizer: of its backbone.
        world: the processes.
        num_clients: N.
        in_lockstep: whether all processes make equally many passes. Then who has the most steps
            keeps the others waiting, and clients are dealt by steps; else by tokens.

    Raises:
        DataError: on every process, where a file, a line or the split is wrong on any.
    """
    with raise_everywhere(world, "reading the data"):
        if config.partition.kind == "by_file":
            silos = silos_of(config, num_clients)
            settings = settings_of(config, silos.names)
            placed = _place_files(config, world, silos)
            held = _split_by_file(config, tokenizer, placed.clients[world.rank], silos)
        else:
            held = _split_one_pool(config, tokenizer, world, num_clients)
            settings = settings_of(config, [held.names.get(c, "") for c in range(num_clients)])
        _require_examples(held, config)
        held.notes += _note_on_unscored(held.held_out, config)
        if config.partition.kind != "by_file":
            placed = placement.of_pool(settings, sizes_of(held.train), world.size, in_lockstep)
    return _assemble(held, config, world, placed, settings)


def held_out_for_all(config: Config, tokenizer: PreTrainedTokenizerFast, num_clients: int) -> Data:
    """The rows of ``data.eval_files`` alone, all of them for every client; in one process.

    Args:
        config: of an evaluation.
        tokenizer: of its backbone.
        num_clients: how many.

    Raises:
        DataError: where a file or a row is wrong.
    """
    table = tokenise(config, tokenizer, "eval", files_of(config, "eval"))
    rows = partition.subset(len(table), config.data.max_eval_examples, config.seed)
    examples = _evaluated(Examples(table, rows), config, 0)
    held = _Held({}, dict.fromkeys(range(num_clients), examples), None, [])
    held.notes += _note(held.reading, "eval", table) + _note_on_unscored({0: examples}, config)
    empty = Truncated([0], [0])
    by_split = {"train": empty, "eval": Truncated([len(examples)], [examples.num_truncated])}
    lines, warnings = length_lines(config, held.reading, by_split)
    return Data(
        train={},
        held_out=held.held_out,
        train_counts=(0,) * num_clients,
        eval_counts=(len(examples),) * num_clients,
        summary={"clients": []},
        notes=(*held.notes, *warnings),
        lines=tuple(lines),
        used_columns=frozenset(held.reading.used),
        parts=table.parts,
        placement=Placement((tuple(range(num_clients)),), "one process holds all"),
        settings=(),
    )


def sizes_of(train: Mapping[int, Examples]) -> list[tuple[int, int]]:
    """Examples, and tokens of all of them together, of each client, in the order of clients."""
    return [(len(train[c]), int(train[c].lengths.sum())) for c in range(len(train))]


def _place_files(config: Config, world: World, silos: Silos) -> Placement:
    """Deal clients that have files of their own, of which none is opened yet. Collective.

    Epochs read whole files, so their sizes stand for the work. They count only where every process
    sees the same files: otherwise a file may be on the machine of one process alone, which is the
    one that holds the client by number.
    """
    numbered = placement.by_number(len(silos.train), world.size)
    if config.train.local_epochs is None or config.data.max_train_examples is not None:
        return numbered  # as many rows for every client
    sizes = [_size(name) for name in silos.train]
    told = gather_json(world, "sizes of the clients' files", [sizes, *map(_size, silos.held_out)])
    if any(one != told[0] for one in told) or any(size is None for size in sizes):
        return numbered
    return placement.by_work([float(size or 0) for size in sizes], world.size, "bytes of the files")


def _size(name: str) -> int | None:
    """Bytes of a file; None of one that is not to be seen here."""
    path = Path(name)
    return path.stat().st_size if path.is_file() else None


@dataclass
class _Held:
    """A split under way: client -> its rows, for all clients or only for this process's."""

    train: dict[int, Examples]
    held_out: dict[int, Examples]
    labels: dict[int, list[str]] | None
    notes: list[str]
    names: dict[int, str] = field(default_factory=dict)
    """Of the clients that have one."""
    left_out: tuple[str, ...] = ()
    """Names of files with too few rows."""

    reading: Reading = field(default_factory=Reading)

    def called(self, client: int) -> str:
        """The name of a client, or its number where it has none."""
        name = self.names.get(client)
        return f"client {client}" + (f" ({name})" if name else "")


def _require_examples(held: _Held, config: Config) -> None:
    least = LEAST_TRAIN_EXAMPLES
    counts = {client: len(examples) for client, examples in held.train.items()}
    short = {client: count for client, count in counts.items() if count < least}
    if short:
        some = [f"{held.called(client)} holds {count}" for client, count in short.items()]
        more = f" and {len(some) - _MOST_NAMED} more too few" if len(some) > _MOST_NAMED else ""
        shown = ", ".join(some[:_MOST_NAMED]) + more
        remedy = {
            "dirichlet": f"raise partition.concentration (now {config.partition.concentration:g}), "
            "lower federated.num_clients or give more data",
            "by_file": "give more rows in the files of these clients, or leave the files out",
        }.get(config.partition.kind, "lower federated.num_clients or give more data")
        raise DataError(
            f"each client needs at least {least} training examples, but {shown}; {remedy}"
        )


def _split_one_pool(
    config: Config, tokenizer: PreTrainedTokenizerFast, world: World, num_clients: int
) -> _Held:
    """Split one common pool; every process computes the same split of everything."""
    section, seed, identity = config.data, config.seed, identity_of(tokenizer)
    with first_of_node_first(world, "tokenising"):
        pool = tokenise(config, tokenizer, "train", files_of(config, "train"), identity)
        held_pool = None
        if has_split(config, "eval"):
            held_pool = tokenise(config, tokenizer, "eval", files_of(config, "eval"), identity)
    train = Chosen(pool, partition.subset(len(pool), section.max_train_examples, seed))
    held_out = None
    if held_pool is not None:
        rows = partition.subset(len(held_pool), section.max_eval_examples, seed)
        held_out = Chosen(held_pool, rows)
    dealt = deal(config, train, held_out, num_clients)
    held = _Held(
        {client: Examples(pool, rows) for client, rows in enumerate(dealt.train)},
        {},
        dealt.labels,
        dealt.notes,
        dealt.names,
    )
    held.notes += _note(held.reading, "train", pool) + _note(held.reading, "eval", held_pool)
    if held_pool is not None:
        held.held_out = {c: Examples(held_pool, rows) for c, rows in enumerate(dealt.held_out)}
        return held
    for client, own in held.train.items():
        kept, out = partition.hold_out(own.indices, section.eval_fraction, seed, client)
        if section.max_eval_examples is not None:
            out = out[: max(1, section.max_eval_examples // num_clients)]
        held.train[client], held.held_out[client] = Examples(pool, kept), Examples(pool, out)
    return held


def _split_by_file(
    config: Config,
    tokenizer: PreTrainedTokenizerFast,
    own_clients: Sequence[int],
    silos: Silos,
) -> _Held:
    """Read the files of this process's clients, and no others."""
    names = {client: name for client, name in enumerate(silos.names) if name}
    held = _Held({}, {}, None, _notes_on_silos(silos), names, silos.left_out)
    identity = identity_of(tokenizer)
    common: Tokens | None = None
    for client in own_clients:
        table = tokenise(config, tokenizer, "train", (silos.train[client],), identity)
        rows = partition.subset(len(table), config.data.max_train_examples, config.seed)
        held.notes += _note(held.reading, "train", table, f" of {held.called(client)}")
        if silos.held_out:
            if common is None or not silos.shares_held_out:
                common = tokenise(config, tokenizer, "eval", (silos.held_out[client],), identity)
                held.notes += _note(held.reading, "eval", common, f" of {held.called(client)}")
            limit = config.data.max_eval_examples
            chosen = partition.subset(len(common), limit, config.seed)
            held.held_out[client] = Examples(common, chosen)
        else:
            fraction = config.data.eval_fraction
            rows, out = partition.hold_out(rows, fraction, config.seed, client)
            held.held_out[client] = Examples(table, out)
        held.train[client] = Examples(table, rows)
    return held


def _notes_on_silos(silos: Silos) -> list[str]:
    notes = []
    if silos.left_out:
        notes.append(
            f"data.on_small_client=skip: {counted(len(silos.left_out), 'file')} with too few rows "
            f"left out: {', '.join(silos.left_out)}"
        )
    return notes


def _note(reading: Reading, split: Split, table: Tokens | None, whose: str = "") -> list[str]:
    """Add a table to what was read; tell of rows that are empty."""
    if table is None:
        return []
    if table.whole_lengths is not None:
        lengths, counts = np.unique(table.whole_lengths, return_counts=True)
        found = zip(lengths.tolist(), counts.tolist(), strict=True)
        reading.add(split, dict(found), table.gone)
    reading.used |= table.used_columns
    reading.others |= table.other_columns
    empty, what = table.left_out - table.gone, "training" if split == "train" else "held-out"
    note = f"{empty:,} {what} examples{whose} have no {table.needs} and are left out"
    return [note] * (empty > 0)


def _note_on_unscored(held_out: dict[int, Examples], config: Config) -> list[str]:
    """Answers that are to be scored and end in no number."""
    task = task_of(config)
    if not (config.evaluation.generate and task.scores):
        return []
    count = sum(int(np.isnan(examples.targets).sum()) for examples in held_out.values())
    whose = f" of {_named(sorted(held_out))}" if held_out else ""
    what = f"have no number after {scores.ANSWER_MARK} and are not scored"
    return [f"{count} held-out examples{whose} {what}"] if count else []


def _named(clients: Sequence[int]) -> str:
    """Some clients in ascending order, in words."""
    first, last = clients[0], clients[-1]
    if len(clients) == last - first + 1:
        return f"clients {first} to {last}"
    return f"{len(clients)} clients, such as {', '.join(map(str, clients[:_MOST_NAMED]))}"


def _evaluated(examples: Examples, config: Config, client: int) -> Examples:
    """The held-out examples that are evaluated, the longest first.

    So a batch has little padding, also where some clients have few: they are done early.
    """
    limit, indices = config.evaluation.max_examples, examples.indices
    if limit is not None and limit < len(indices):
        drawn = generator(Stream.SUBSET, config.seed, client).permutation(len(indices))[:limit]
        indices = indices[np.sort(drawn)]
    chosen = Examples(examples.table, indices)
    return Examples(examples.table, indices[np.argsort(-chosen.lengths, kind="stable")])


def _assemble(
    held: _Held,
    config: Config,
    world: World,
    placed: Placement,
    settings: tuple[ClientSettings, ...],
) -> Data:
    """Exchange the counts of all clients and keep the examples of this process. Collective."""
    own_clients, num_clients = placed.clients[world.rank], sum(map(len, placed.clients))
    entries = _entries(held, len(task_of(config).classes or ()))
    tables: dict[int, Any] = entries
    if len(entries) < num_clients:  # by file: a process has read its own clients only
        shared = gather_json(world, "sharing the partition", list(entries.values()))
        tables = {entry["client"]: entry for other in shared for entry in other}
    folders = adapter_folders([tables[client]["name"] for client in range(num_clients)])
    for client, folder in enumerate(folders):
        tables[client]["adapter"] = folder
    limit = config.evaluation.max_examples or sys.maxsize
    told = gather_json(world, "sharing notes", [held.notes, held.reading.to_json()])
    reading = Reading.of_json(
        [one for _, one in told] if len(entries) < num_clients else [told[0][1]]
    )
    ordered = [tables[client] for client in range(num_clients)]
    lines, warnings = header_lines(config, reading, ordered)
    return Data(
        train={client: held.train[client] for client in own_clients},
        held_out={c: _evaluated(held.held_out[c], config, c) for c in own_clients},
        train_counts=tuple(len(table["train"]) for table in ordered),
        eval_counts=tuple(min(len(table["eval"]), limit) for table in ordered),
        summary={"clients": ordered},
        notes=tuple(sorted({note for some, _ in told for note in some}) + warnings),
        lines=tuple(lines),
        used_columns=frozenset(reading.used),
        parts=held.held_out[own_clients[0]].table.parts,
        placement=placed,
        settings=settings,
        left_out=held.left_out,
    )


def _entries(held: _Held, num_classes: int) -> dict[int, dict[str, Any]]:
    """What ``partition.json`` says of each client whose rows were read here."""
    return {
        client: {
            "client": client,
            "name": held.names.get(client, ""),
            "train": [int(index) for index in held.train[client].indices],
            "eval": [int(index) for index in held.held_out[client].indices],
            "labels": _histogram(held.labels[client]) if held.labels else None,
            "truncated": [held.train[client].num_truncated, held.held_out[client].num_truncated],
            "classes": _class_counts(held.train[client], num_classes),
            "columns": sorted(held.train[client].table.used_columns),
            "digest": f"{held.train[client].digest()}{held.held_out[client].digest()}",
        }
        for client in held.train
    }


def _class_counts(examples: Examples, num_classes: int) -> list[int] | None:
    """Examples of each class; None for tasks without classes."""
    if not num_classes:
        return None
    counts: list[int] = np.bincount(examples.targets.astype(int), minlength=num_classes).tolist()
    return counts


def _histogram(labels: Sequence[str]) -> dict[str, int]:
    return dict(sorted(Counter(labels).items()))
