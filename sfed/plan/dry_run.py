"""``sfed train CONFIG --dry-run``: what a run would read, train and send, without training.

One process reads the data as a run does, for all clients, and no weights. Memory and time are those
of ``sfed.plan``. The screen fits 100 columns; ``facts_of`` has everything as plain data.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.data import classification, splits
from sfed.data.assignment import placement
from sfed.data.sources import has_split, source_of
from sfed.data.splits import Data
from sfed.data.tasks import task_of
from sfed.data.tokenize import Examples
from sfed.distributed import world as distributed
from sfed.federated.build import check_cohort, method_and_gammas, model_folder
from sfed.files.listing import Split, files_of
from sfed.files.silos import num_clients_of
from sfed.methods import method as methods
from sfed.methods.method import Method
from sfed.models.backbone import context_of
from sfed.models.hf_config import MetaModel
from sfed.models.tokenizer import load_tokenizer
from sfed.observability.third_party import quieten
from sfed.plan import estimate, tables
from sfed.plan.request import Machine, Pace
from sfed.privacy import guarantee as guarantees
from sfed.storage import origin
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask
from sfed.utils.text import counted, duration, printable, size_text, span

_WIDTH = 100
_ASSUMED_GPU_BYTES = 80 * 2**30
_WIDEST_NAME = 28
_MOST_CLIENTS, _MOST_LABELS, _MOST_CHARACTERS = 16, 3, 280
Piece = tuple[str, bool]
"""Some text of a row, and whether it is supervised."""


@dataclass(frozen=True)
class Facts:
    """What a run would do."""

    config: Config
    num_processes: int
    data: Data
    placement: Sequence[Sequence[int]]
    """The clients of each process."""
    columns: dict[str, list[str]]
    """Of the first row of each split."""
    examples: list[tuple[int, list[Piece]]]
    """Client and text of some training examples."""
    gammas: Sequence[float]
    """(N,) of the clients."""
    plan: dict[str, Any]
    """As ``sfed plan --json`` writes it."""

    @property
    def num_clients(self) -> int:
        """N."""
        return len(self.data.train_counts)

    @property
    def steps(self) -> list[int]:
        """Optimizer steps of each client in a round."""
        pairs = zip(self.data.settings, self.data.train_counts, strict=True)
        return [settings.steps(count) for settings, count in pairs]

    @property
    def round_seconds(self) -> float:
        """Of a round on GPUs, by the plan's pace: the longest client's steps, and the mean."""
        one = self.plan["round"]
        return float(max(self.steps) * one["seconds_per_step"] + one["mean_seconds"])


def show(config: Config, num_processes: int) -> None:
    """Check a run and print the screen.

    Args:
        config: of the run.
        num_processes: that it would have.

    Raises:
        UserError: for what a run would refuse before it trains.
    """
    warnings.simplefilter("ignore")
    _say("reading the data as the run does")
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = _WIDTH
    for part in _screen(facts_of(config, num_processes), is_terminal=console.is_terminal):
        console.print(part, soft_wrap=isinstance(part, str))


def _say(line: str) -> None:
    sys.stderr.write(f"{line} ...\n")
    sys.stderr.flush()


def facts_of(config: Config, num_processes: int) -> Facts:
    """Read the data and the model's configuration, and plan.

    Raises:
        UserError: for what a run would refuse before it trains.
    """
    num_clients = num_clients_of(config) or num_processes
    name = model_folder(config)
    check_cohort(config, num_clients)
    config, tokenizer, data = _data(config, name, num_clients)
    if (classes := task_of(config).classes) is not None:
        classification.class_weights(config.train, classes, data.class_counts)
    model = MetaModel.read(config, name)
    _check_context(config, data, context_of(model.model))
    plan = _plan(config, name, num_processes, data)
    placed = data.placement
    if config.partition.kind != "by_file":
        is_sharded = plan["sharding"]["kind"] == "zero3"
        sizes = splits.sizes_of(data.train)
        placed = placement.of_pool(data.settings, sizes, num_processes, is_sharded)
    elif num_processes > 1:
        placed = placement.by_number(num_clients, num_processes)
    return Facts(
        config,
        num_processes,
        data,
        placed.clients,
        {split: _columns(config, split) for split in _splits(config)},
        list(_some_examples(config, data, tokenizer)),
        method_and_gammas(config, data, num_clients, origin.gamma_of(config))[1],
        plan,
    )


def _data(
    config: Config, name: str, num_clients: int
) -> tuple[Config, PreTrainedTokenizerFast, Data]:
    """The configuration with labels, the tokenizer, and the data of all clients.

    This process reads them alone, in the order of a run: a model fits so many labels.
    """
    place = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in place}
    os.environ.update(place)
    try:
        world = distributed.start(config.federated.deadline_seconds)
        quieten(0, world.device.type, config.run_name)
        try:
            config = splits.with_labels(config, world, num_clients)
            tokenizer, _ = load_tokenizer(config, name)
            data = splits.load(config, tokenizer, world, num_clients, in_lockstep=False)
            return config, tokenizer, data
        finally:
            distributed.stop(world)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _check_context(config: Config, data: Data, context: int) -> None:
    longest = max(int(max(one.lengths, default=0)) for one in _all(data))
    if longest > context:
        raise UserError(
            f"data.max_tokens = {config.data.max_tokens}: a row has {longest} tokens and the "
            f"model's context is {context}; set it to at most {context}"
        )


def _all(data: Data) -> list[Examples]:
    return [*data.train.values(), *data.held_out.values()]


def _plan(config: Config, name: str, num_processes: int, data: Data) -> dict[str, Any]:
    named = config.model.model_copy(update={"name": name})
    lengths = np.concatenate([one.lengths for one in data.train.values()])
    memory = _ASSUMED_GPU_BYTES
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory
    machine = Machine(num_processes, memory)
    pace = Pace(max(1, round(float(lengths.mean()))))
    return estimate.predict(config.model_copy(update={"model": named}), machine, pace, _say)


def _splits(config: Config) -> list[Split]:
    return ["train", "eval"] if has_split(config, "eval") else ["train"]


def _columns(config: Config, split: Split) -> list[str]:
    """The columns of the first row of a split."""
    files = tuple(name.replace("{client}", "0") for name in files_of(config, split)[:1])
    rows, _ = source_of(config, split, files)
    return list(next(rows)[1])


def _some_examples(
    config: Config, data: Data, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[int, list[Piece]]]:
    """Three training examples, of different clients where there are as many."""
    clients = sorted(data.train)
    chosen = [clients[0], clients[len(clients) // 2], clients[-1]]
    for number, client in enumerate(chosen):
        examples = data.train[client]
        position = min(number, len(examples) - 1) if len(set(chosen)) < len(chosen) else 0
        yield client, _pieces(config, examples, position, tokenizer)


def _pieces(
    config: Config, examples: Examples, position: int, tokenizer: PreTrainedTokenizerFast
) -> list[Piece]:
    """The text of an example as the model reads it, with its marks, and what is supervised.

    The only place here that knows how an example says what is supervised.
    """
    row, classes = examples.row(position), task_of(config).classes
    if classes is not None:
        target = row.target or 0.0
        answer = classes[int(target)] if classes else f"{target:g}"
        return [(f"{tokenizer.decode(row.ids)} -> ", False), (answer, True)]
    learned = row.is_learned
    edges = np.flatnonzero(np.diff(learned.astype(int))) + 1
    starts, ends = [0, *edges.tolist()], [*edges.tolist(), len(row.ids)]
    return [
        (tokenizer.decode(row.ids[start:end]), bool(learned[start]))
        for start, end in zip(starts, ends, strict=True)
    ]


def _screen(facts: Facts, *, is_terminal: bool) -> Iterator[str | Text | Table]:
    yield from map(mask, _heading(facts))
    yield _clients(facts, is_terminal=is_terminal)
    yield "examples, with what is supervised in [[ ]] (\\n is a line break):"
    for client, pieces in facts.examples:
        yield _rendered(client, pieces)
    yield from _costs(facts)
    for note in facts.data.notes:
        yield printable(f"note       {note}")


def _heading(facts: Facts) -> Iterator[str]:
    config, data = facts.config, facts.data
    federated = config.federated
    ranks, batches = zip(*((one.lora_rank, one.batch_size) for one in data.settings), strict=True)
    rows = counted(batches[0], "row") if len(set(batches)) == 1 else f"{span(batches)} rows"
    yield (
        f"run        {config.run_name}: {federated.method}, N = {facts.num_clients}, r = "
        f"{span(ranks)}, gamma = {span(facts.gammas, '.4g')}; "
        f"{counted(federated.num_rounds, 'round')} of {span(facts.steps)} steps of {rows}"
    )
    adapted = facts.plan["targets"]
    adapted = adapted if isinstance(adapted, str) else ", ".join(adapted)
    yield (
        f"model      {config.model.name}: {facts.plan['weights']:,} weights; adapters on "
        f"{adapted}: {facts.plan['adapter_numbers']:,} parameters per client"
    )
    for split in ("train", "eval"):
        yield printable(_files(facts, split))
    if place := origin.place_of(config):
        yield printable(f"starts     {place[0]} = {place[1]}: gamma, r and targets are from there")
    for line in data.lines:
        name, _, said = line.partition(": ")
        yield printable(f"{name:<10} {said}")


def _files(facts: Facts, split: Split) -> str:
    counts = facts.data.train_counts if split == "train" else facts.data.eval_counts
    total = f"{sum(counts):,} examples"
    label = "training" if split == "train" else "evaluated"
    if split not in facts.columns:
        fraction = facts.config.data.eval_fraction
        return f"{label:<10} {total}: {100 * fraction:g} % of each client's (data.eval_fraction)"
    names = facts.config.files(split)
    named = ", ".join(names[:2]) + (f" and {len(names) - 2} more" if len(names) > 2 else "")
    named = f"of {named or task_of(facts.config).hub}"
    named = "made by sfed" if facts.config.data.task == "demo" else named
    return f"{label:<10} {total} {named}; columns {', '.join(facts.columns[split])}"


def _clients(facts: Facts, *, is_terminal: bool) -> Table:
    table = Table(box=box.SIMPLE_HEAD if is_terminal else box.ASCII2)
    table.add_column("client")
    for name in ("examples", "tokens mean", "longest", "steps", "held out"):
        table.add_column(name, justify="right")
    table.add_column("process")
    own = _own_settings(facts)
    for name in own:
        table.add_column(name, justify="right")
    mixes = [_mix(facts, client) for client in range(facts.num_clients)]
    if facts.config.partition.kind == "by_key":  # each client has one value, which is its name
        mixes = [""] * facts.num_clients
    if any(mixes):
        table.add_column("labels")
    process_of = {c: process for process, some in enumerate(facts.placement) for c in some}
    shown = _shown(facts.num_clients)
    for client in shown:
        lengths = facts.data.train[client].lengths
        cells = [
            mask(printable(facts.data.names[client] or str(client)))[:_WIDEST_NAME],
            f"{len(lengths):,}",
            f"{lengths.mean():.0f}",
            f"{lengths.max():,}",
            str(facts.steps[client]),
            f"{facts.data.eval_counts[client]:,}",
            str(process_of[client]),
        ]
        cells += [values[client] for values in own.values()]
        table.add_row(*cells, *([mixes[client]] if any(mixes) else []))
        if len(shown) < facts.num_clients and client == _MOST_CLIENTS // 2 - 1:
            table.add_section()
    if len(shown) < facts.num_clients:
        table.caption = f"{len(shown)} of {facts.num_clients} clients"
    return table


def _shown(num_clients: int) -> list[int]:
    """The clients of the table: of many the first and the last ones."""
    clients = list(range(num_clients))
    if num_clients <= _MOST_CLIENTS:
        return clients
    return [*clients[: _MOST_CLIENTS // 2], *clients[-_MOST_CLIENTS // 2 :]]


def _own_settings(facts: Facts) -> dict[str, list[str]]:
    """What differs between the clients: a column of each."""
    settings = facts.data.settings
    columns = {
        "r": [f"{one.lora_rank}" for one in settings],
        "gamma": [f"{gamma:.4g}" for gamma in facts.gammas],
        "lr": [f"{one.lr:g}" for one in settings],
        "rows": [f"{one.batch_size}" for one in settings],
    }
    return {name: values for name, values in columns.items() if len(set(values)) > 1}


def _mix(facts: Facts, client: int) -> str:
    """The most frequent labels of a client's training examples."""
    found = Counter[str](facts.data.summary["clients"][client]["labels"] or {})
    classes = task_of(facts.config).classes
    if not found and classes:
        targets = facts.data.train[client].targets
        found.update(classes[int(target)] for target in targets)
    if len(found) == 1:
        return mask(printable(*found)[:40])
    named = [
        f"{printable(label)[:24]} {100 * count / found.total():.0f} %"
        for label, count in found.most_common(_MOST_LABELS)
    ]
    rest = len(found) - len(named)
    return mask(", ".join(named) + (f" and {rest} more" if rest > 0 else ""))


def _rendered(client: int, pieces: Sequence[Piece]) -> Text:
    """An example in printable form; a long one without its middle."""
    most = _MOST_CHARACTERS // len(pieces)
    line = Text(f"  client {client}: ", overflow="fold")
    for text, is_supervised in pieces:
        shown = printable(mask(text))
        if len(shown) > most:
            shown = f"{shown[: most // 2]} ... {shown[-most // 2 :]}"
        line.append(
            f"[[{shown}]]" if is_supervised else shown, "bold green" if is_supervised else ""
        )
    return line


def _privacy(facts: Facts, method: Method) -> str:
    """What the planned rounds come to, if none is repeated."""
    guarantee = guarantees.guarantee_of(facts.config, method, facts.num_clients)
    num_rounds = facts.config.federated.num_rounds
    planned = guarantees.planned_releases(facts.config, method, num_rounds)
    return guarantees.describe(guarantee, guarantee.epsilon(planned))


def _costs(facts: Facts) -> Iterator[str]:
    plan, rounds = facts.plan, facts.config.federated.num_rounds
    upload, total = plan["upload"], size_text(plan["gpu_memory_bytes"])
    yield (
        f"sends      {tables.sent(upload)}: {upload['bytes']:,} bytes per "
        "process and round; no rows, no tokens"
    )
    method, wanted = methods.resolve(facts.config), facts.config.evaluation.adapters
    if "global" in wanted and method.has_global_adapter and method.keeps_apart("B"):
        yield "           at evaluations and the end also B, in a sum (evaluation.adapters)"
    if facts.config.privacy.is_on:
        yield f"privacy    {_privacy(facts, method)}"
    has_gpu = torch.cuda.is_available()
    verdict = "it fits" if plan["fits"] else "it does not fit, and sfed plan says what would"
    yield (
        f"memory     {size_text(plan['needed_bytes'])} of a GPU of {total}"
        f"{'' if has_gpu else ' (assumed: there is none here)'}: {verdict}"
    )
    yield (
        f"           {'at most ' if plan['auto_clients_per_pass'] else ''}"
        f"{counted(plan['clients_per_pass'], 'client')} in a pass, backbone "
        f"{plan['sharding']['kind']} ({plan['sharding']['reason']})"
    )
    whole = rounds * facts.round_seconds
    about = duration(whole) if whole >= 1 else "less than a second"
    if not has_gpu:
        yield "time       not estimated on a CPU"
    yield (
        f"{'time' if has_gpu else '':<10} {about} on {counted(facts.num_processes, 'GPU')} without "
        "evaluation, at an assumed 40 % of an H100's rate"
    )
