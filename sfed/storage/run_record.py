"""The only reader of run folders: of what runs, finished or still training, have written there.

The report, sweeps, a start that may resume, and the public API read through it. Needs no torch.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.files.names import ADAPTER_FILE, adapter_folder
from sfed.observability import metrics
from sfed.utils import json_text
from sfed.utils.errors import UserError
from sfed.utils.text import printable, some_of

Event = Mapping[str, Any]
KINDS = {
    "personal": "each client's own adapter, its own data",
    "global": "global adapter, everybody's data",
}
LOSS = "loss"
CONFIG_FILE, METRICS_FILE, PARTITION_FILE = "config.json", "metrics.jsonl", "partition.json"
REPORT_FILE, SWEEP_FILE = "report.html", "sweep.csv"
_SQUARED_ERROR_SCORES = ("pearson", "spearman")


@dataclass(frozen=True)
class ClientRecord:
    """What a run folder says of one client."""

    client: int
    """Number of the client, from 0."""
    examples: int
    """Number of its training examples."""
    labels: Mapping[str, int]
    """Number of examples per label, where the partition knows labels."""
    adapter: Path | None
    """Folder of its exported adapter, a PEFT adapter; None where the run is not finished."""
    name: str = ""
    """Its file's name without the end, or its value of the column; "" where it has none."""


@dataclass(frozen=True)
class RunRecord:
    """A run folder read back, of a finished run or of one that still trains. Needs no torch."""

    folder: Path
    """The run folder."""
    config: Mapping[str, Any]
    """Content of ``config.json``: the sections of the configuration, what a start ``resolved``
    (such as gamma and N), and ``versions``."""
    rounds: Sequence[Event]
    """Events of the rounds in order, as in ``metrics.jsonl``; 0 is the state before training."""
    labels: Mapping[int, Mapping[str, int]]
    """Examples per label of each client, where the partition knows labels."""
    sizes: Mapping[int, int]
    """Training examples of each client."""
    note: str | None = None
    """What was passed over while reading; None where nothing was."""
    names: Mapping[int, str] = field(default_factory=dict)
    """Names of the clients that have one."""
    columns: Mapping[int, frozenset[str]] = field(default_factory=dict)
    """The columns in use of the rows that a client's were read from; an older version says none."""
    adapter_folders: Mapping[int, str] = field(default_factory=dict)
    """Name of the folder of each client's adapter, where it is not client-0000 and so on."""
    ends: Sequence[Event] = ()
    """Events of the ends of starts, with the seconds that are in no round."""
    digests: Mapping[int, str] = field(default_factory=dict)
    """Of the tokens of each client's training and held-out examples; an older version says none."""

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.folder.name

    @property
    def ranks(self) -> list[float]:
        """The LoRA ranks of the clients; one of all where an older version wrote the run.

        Empty where the record does not say them.
        """
        told = numbers(self.config, "resolved.ranks")
        of_all = number(self.config, "lora.rank")
        return told or ([] if of_all is None else [of_all])

    @property
    def gammas(self) -> list[float]:
        """Gamma of the clients, one of all where their LoRA ranks are the same; as ``ranks``."""
        of_all = number(self.config, "resolved.gamma")
        return numbers(self.config, "resolved.gamma") if of_all is None else [of_all]

    @property
    def clients(self) -> dict[int, ClientRecord]:
        """Each client by its number."""
        adapters = self.adapters
        return {
            client: ClientRecord(
                client,
                self.sizes[client],
                self.labels.get(client, {}),
                adapters.get(self.adapter_folders.get(client) or adapter_folder(client)),
                self.names.get(client, ""),
            )
            for client in sorted(self.sizes)
        }

    @property
    def adapters(self) -> dict[str, Path]:
        """Folders of the exported adapters by name: those of the clients, and perhaps global.

        A client's is its name as far as file systems allow, or client-0000 and so on.

        Each is a folder for ``PeftModel.from_pretrained``. Empty until the run is finished.
        """
        found = (self.folder / "adapters").glob(f"*/{ADAPTER_FILE}")
        return {file.parent.name: file.parent for file in sorted(found)}

    def client_named(self, name: str) -> int:
        """The number of a client that is named by its name, its adapter's folder or its number.

        Raises:
            UserError: where there is none, with those that there are.
        """
        known = sorted(self.sizes)
        folders = {self.adapter_folders.get(c) or adapter_folder(c): c for c in known}
        numbers = {str(client): client for client in known}
        for names in ({n: c for c, n in self.names.items()}, folders, numbers):
            if name in names:
                return names[name]
        raise UserError(
            f"--client {printable(name)}: {self.folder} has no such client; there are "
            f"{some_of(list(folders))}"
        )

    @property
    def scores(self) -> dict[str, float]:
        """Losses and scores on held-out data after the last evaluated round.

        The names are ``<adapter>_<score>``, such as personal_loss or global_accuracy; the values
        are means over clients, unweighted. Empty where nothing is evaluated yet.
        """
        last = self.evaluated[-1] if self.evaluated else {}
        found = {
            f"{kind}_{what}": held_out(last, kind, what) for what in self.held for kind in KINDS
        }
        return {name: value for name, value in found.items() if value is not None}

    @property
    def evaluated(self) -> list[Event]:
        """The rounds that were evaluated, also those in which nothing was finite."""
        return [
            event
            for event in self.rounds
            if was_evaluated(event)
            or any(held_out(event, kind, what) is not None for kind in KINDS for what in self.held)
        ]

    @property
    def score_names(self) -> list[str]:
        """Names of the task's scores, the main one first; none where losses are all there is."""
        names = look(self.config, "resolved.scores")
        return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []

    @property
    def held(self) -> list[str]:
        """All that is measured on held-out data: scores, then the loss."""
        return [*self.score_names, LOSS]

    @property
    def by_token(self) -> bool:
        """Whether losses are nats per token, so that exp(loss) is a perplexity."""
        return look(self.config, "resolved.loss_unit") in (None, "token")

    @property
    def unit(self) -> str:
        """Unit of the losses."""
        if self.by_token:
            return "nats/token"
        main = self.score_names[:1]
        return "squared error" if main and main[0] in _SQUARED_ERROR_SCORES else "nats/example"

    @property
    def method(self) -> str:
        """Name of the federated method."""
        return str(look(self.config, "federated.method") or "method unknown")

    @property
    def started_from(self) -> str:
        """What the adapters started from, with a digest of its files; empty where A was drawn."""
        key, path, digest = (
            look(self.config, f"resolved.origin.{name}") for name in ("named_by", "path", "digest")
        )
        return "" if key is None else f"{key} = {path} (digest {digest})"

    @property
    def num_clients(self) -> float | None:
        """Number of clients, N."""
        given = number(self.config, "resolved.num_clients")
        return given or number(self.config, "federated.num_clients") or len(self.sizes) or None

    @property
    def progress(self) -> str:
        """Rounds done of rounds planned."""
        done = self.rounds[-1]["round"] if self.rounds else 0
        planned = number(self.config, "federated.num_rounds")
        if planned is None:
            return f"{done} rounds done"
        going = "" if done >= planned else " so far (still running, or stopped)"
        return f"{done} of {planned:g} rounds{going}"

    def title(self, client: int) -> str:
        """The client's number, and what it holds where that is one thing."""
        one = client in self.names or len(self.labels.get(client, {})) == 1
        return f"{client} {self.holds(client)}" if one else f"client {client}"

    def holds(self, client: int) -> str:
        """The name of a client; of one without, what it holds, in a few words."""
        if client in self.names:
            return self.names[client]
        counts = sorted(self.labels.get(client, {}).items(), key=lambda item: -item[1])
        total = sum(count for _, count in counts)
        if len(counts) == 1:
            return counts[0][0]
        words = [f"{label} {100 * count / total:.0f} %" for label, count in counts[:3] if count]
        return ", ".join(words) + (", ..." if len(counts) > 3 else "")


def look(data: Any, dotted: str) -> Any:
    """Return the value under a dotted name; None where there is none."""
    for part in dotted.split("."):
        data = data.get(part) if isinstance(data, dict) else None
    return data


def number(data: Any, dotted: str) -> float | None:
    """Return the finite number under a dotted name; None for anything else."""
    value = look(data, dotted)
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    try:
        return float(value) if usable and math.isfinite(value) else None
    except OverflowError:  # an integer beyond all floats
        return None


def numbers(data: Any, dotted: str) -> list[float]:
    """Return the finite numbers of a list under a dotted name; empty for anything else."""
    values = look(data, dotted)
    found = [number({"one": one}, "one") for one in values] if isinstance(values, list) else []
    known = [one for one in found if one is not None]
    return known if len(known) == len(found) else []


def held_out(
    event: Event, kind: str, what: str = LOSS, mean: str = metrics.UNWEIGHTED
) -> float | None:
    """A held-out loss or score of a round: mean over clients, unweighted unless told otherwise."""
    return number(event, metrics.held_out_key(kind, what, mean))


def was_evaluated(event: Event) -> bool:
    """Whether a round was evaluated, whatever came out; some older versions do not say it."""
    return number(event, metrics.EVALUATED) is not None


def words_of(score: str) -> str:
    """The name of a score as words."""
    return " ".join(score.replace("_", " ").split())


def clients_of(event: Event) -> list[Event]:
    """The clients of a round that have a number."""
    entries = event.get("clients")
    return [
        entry
        for entry in (entries if isinstance(entries, list) else [])
        if isinstance(entry, dict) and isinstance(entry.get("client"), int)
    ]


class ForeignFileError(ValueError):
    """A file that stands in the place of a run's is not that of a run."""


@dataclass(frozen=True)
class SavedConfig:
    """Content of a ``config.json``."""

    sections: Mapping[str, Any]
    """The configuration of the last start, as it was written."""
    resolved: Mapping[str, Any]
    """What that start made of it, such as gamma and N."""

    @property
    def num_clients(self) -> int | None:
        """Number of clients, N, as it was resolved; None where that is unknown."""
        known = number(self.resolved, "num_clients")
        return None if known is None else int(known)

    def parse(self) -> Config:
        """Return the configuration.

        Raises:
            ConfigError: where a version of sfed wrote it that knew other keys.
        """
        return config_load.validate(dict(self.sections))


def read_config(folder: Path) -> SavedConfig | None:
    """Read ``config.json`` of a run folder.

    Returns:
        None where there is none, or an empty one, as a machine leaves it that lost its power.

    Raises:
        OSError: where it is there and cannot be read, or is a link that leads nowhere.
        ForeignFileError: where it is not that of a run.
    """
    path = folder / CONFIG_FILE
    try:
        saved = json_text.read(path)
    except FileNotFoundError:
        if path.is_symlink():
            raise
        return None
    except ValueError as error:
        raise ForeignFileError(f"it is not JSON: {error}") from None
    if saved is None:
        return None
    if not isinstance(saved, dict) or not {"resolved", "versions"} <= saved.keys():
        raise ForeignFileError("it is no object with the keys resolved and versions")
    resolved = saved.pop("resolved")
    del saved["versions"]
    return SavedConfig(saved, resolved if isinstance(resolved, dict) else {})


@dataclass(frozen=True)
class SavedRounds:
    """The rounds that a ``metrics.jsonl`` reports."""

    events: list[dict[str, Any]]
    """An event for each round, in order."""
    note: str | None = None
    """What was passed over while reading; None where nothing was."""
    ends: Sequence[Event] = ()
    """An event for the end of each start that came to its end."""
    is_foreign: bool = False
    """Whether the file has lines and none of them is an event."""

    @property
    def finished(self) -> int:
        """Number of finished rounds."""
        return int(self.events[-1]["round"]) if self.events else 0


def read_rounds(folder: Path) -> SavedRounds:
    """Read ``metrics.jsonl`` and ``starts.jsonl`` of a run folder; without them nothing is there.

    Raises:
        OSError: where it is there and cannot be read.
    """
    found = metrics.read_metrics(folder / METRICS_FILE)
    of_starts = metrics.read_events(folder / metrics.STARTS_FILE)
    rounds = {event["round"]: event for event in found.events if event["event"] == "round"}
    events = [rounds[key] for key in sorted(rounds)]
    # Some older versions wrote the ends of starts among the rounds.
    ends = [event for event in [*found.events, *of_starts] if event["event"] == "end"]
    is_foreign = bool(found.odd_lines) and not found.events
    return SavedRounds(events, found.note, ends, is_foreign)


def open_run(folder: Path | str) -> RunRecord:
    """Read a run folder, of a finished run or of one that still trains. Needs no torch.

    Args:
        folder: that ``metrics.jsonl`` is in, such as runs/demo.

    Raises:
        UserError: where it is missing, is no run folder, or is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        problem = "is no folder" if folder.exists() else "does not exist"
        raise UserError(f"the run folder {str(folder)!r} {problem}; name one, such as runs/demo")
    if not (folder / METRICS_FILE).is_file():
        raise UserError(
            f"{str(folder)!r} holds no metrics.jsonl and no folder in it does, so it is no run "
            "folder and no folder of runs"
        )
    try:
        found = read_rounds(folder)
    except OSError as error:
        raise UserError(f"{folder / METRICS_FILE} is not readable: {error}") from None
    if found.is_foreign:
        raise UserError(f"{folder / METRICS_FILE} is not readable: no line of it is an event")
    config = _read_json(folder / CONFIG_FILE)
    partition = folder / PARTITION_FILE
    parts = clients_of(_read_json(partition)) if partition.is_file() else []
    last = clients_of(found.events[-1]) if found.events else []
    return RunRecord(
        folder=folder.resolve(),
        config=config,
        rounds=found.events,
        labels={part["client"]: counts for part in parts if (counts := _counts(part))},
        sizes={part["client"]: _size(part) for part in parts}
        | {entry["client"]: int(n) for entry in last if (n := number(entry, "examples"))},
        note=found.note,
        names=_texts(parts, "name"),
        columns={
            part["client"]: frozenset(filter(_is_text, some))
            for part in parts
            if isinstance(some := part.get("columns"), list)
        },
        adapter_folders=_texts(parts, "adapter"),
        ends=found.ends,
        digests=_texts(parts, "digest"),
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json_text.read(path)
    except OSError as error:
        raise UserError(f"{path} is not readable: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged, it is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is damaged: it holds {type(value).__name__}, not an object")
    return value


def _size(part: Event) -> int:
    rows = part.get("train")
    return len(rows) if isinstance(rows, list) else 0


def _counts(part: Event) -> dict[str, int]:
    labels = part.get("labels")
    counts = Counter[str]()
    for label, count in labels.items() if isinstance(labels, dict) else ():
        if isinstance(count, int) and count > 0:
            counts[printable(label)] += count
    return dict(counts)


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _texts(parts: Sequence[Event], key: str) -> dict[int, str]:
    """What some clients have under a key, where it is a text and not empty."""
    return {
        part["client"]: text for part in parts if isinstance(text := part.get(key), str) and text
    }


def expected_adapters(folder: Path, num_clients: int) -> set[str]:
    """The names of the folders of the clients' adapters, as ``partition.json`` says them.

    An older version has written none there: client-0000 and so on.
    """
    try:
        parts = clients_of(_read_json(folder / PARTITION_FILE))
    except UserError:
        parts = []
    known = _texts(parts, "adapter")
    return {known.get(client) or adapter_folder(client) for client in range(num_clients)}
