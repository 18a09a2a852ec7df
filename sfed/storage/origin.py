"""What the adapters of a run start from, where that is on disk: adapters, or a finished run.

A start that begins reads the folder, and takes keys that are not set from it. A start that resumes
takes them, and all else, from its checkpoint. Needs no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sfed.config import load as config_load
from sfed.config.diff import flatten
from sfed.config.schema import Config
from sfed.files import peft_folders
from sfed.files.names import GLOBAL, adapter_folders
from sfed.files.peft_folders import PeftFolder
from sfed.files.silos import num_clients_of, silos_of
from sfed.storage.checkpoint_folder import CheckpointRef, by_age, metadata_of
from sfed.storage.previous_run import finished_rounds
from sfed.storage.run_record import CONFIG_FILE, ForeignFileError, SavedConfig, number, read_config
from sfed.utils.errors import CheckpointError, ConfigError

START_FROM, JOIN = "lora.start_from", "federated.join"
_OF_ADAPTERS = ("lora.rank", "lora.target_modules")
_OF_RUN = (
    "federated.method",
    *("data.name", "data.max_tokens", "data.template", "data.chat_template", "data.chat_loss"),
)
"""Keys by which a run's clients read text and train, so that A fits those who join."""


@dataclass(frozen=True)
class Source:
    """The folder that a run starts from, as it is on disk."""

    key: str
    """lora.start_from or federated.join."""
    path: str
    """As it was given."""
    adapters: tuple[PeftFolder, ...]
    """One for all clients, or several with the names of clients."""
    is_for_all: bool
    """Whether one adapter is that of all clients."""
    gamma: float
    run: SavedConfig | None = None
    """Configuration of the run that is joined."""
    run_config: Config | None = None
    """The same, checked."""

    @property
    def said(self) -> str:
        """Key and value, for messages."""
        return f"{self.key} = {self.path!r}"

    def of_clients(self, names: Sequence[str], folders: Sequence[str]) -> list[PeftFolder]:
        """Return the adapter of each client.

        Raises:
            ConfigError: naming all clients that have none.
        """
        if self.is_for_all:
            return [self.adapters[0]] * len(names)
        return peft_folders.by_client(self.adapters, names, folders, self.said)

    def check_labels(self, labels: Sequence[str | int]) -> None:
        """Refuse a head that is for other classes, or for the same in another order.

        Raises:
            ConfigError: with both. Where no file says the classes of an adapter, its own order is
                taken to be that of the data.
        """
        for one in self.adapters:
            if one.labels is not None and one.labels != tuple(labels):
                raise ConfigError(
                    f"{self.said}: the classes of {one.path} are {list(one.labels)!r} and those of "
                    f"the data {list(labels)!r}; set data.labels to the former, in this order"
                )

    def settings(self) -> dict[str, Any]:
        """The keys that the folder decides, with its values."""
        first = self.adapters[0]
        targets = first.targets if isinstance(first.targets, str) else list(first.targets)
        decided: dict[str, Any] = {"lora.rank": first.lora_rank, "lora.target_modules": targets}
        if self.run_config is not None:
            decided |= {key: flatten(self.run_config)[key] for key in _OF_RUN}
        return decided


@dataclass(frozen=True)
class Origin:
    """What a run started from, as its records say it."""

    named_by: str
    """The key that names the folder: lora.start_from or federated.join."""
    path: str
    """As it was given."""
    digest: str
    """Of the files of the adapters."""
    gamma: float
    is_for_all: bool
    """Whether all clients started with one adapter."""
    has_common_a: bool
    """Whether all clients started with the same A."""
    factors: tuple[str, ...]
    """What was loaded: some of A, B and head."""
    base_name: str
    """Model that the adapters were trained for, as they say; perhaps empty."""
    own: Mapping[int, PeftFolder] = field(default_factory=dict)
    """The adapters of this process's clients, where the run begins."""
    own_digests: Mapping[int, str] = field(default_factory=dict)
    """Of the files of each of them."""

    @property
    def own_factors(self) -> tuple[str, ...]:
        """What clients hold their own of before the first round."""
        if self.is_for_all:
            return ()
        return tuple(f for f in self.factors if f != "A" or not self.has_common_a)

    @property
    def name(self) -> str:
        """The key, the folder and a digest of its files."""
        return f"{self.named_by} = {self.path} (digest {self.digest})"

    @property
    def line(self) -> str:
        """What is to be known of it, on one line."""
        if self.named_by == JOIN:
            return f"joined {self.path} (digest {self.digest}): its A, frozen, and its gamma"
        whose = "one adapter for all clients" if self.is_for_all else "an adapter for each client"
        base = f"; made for {self.base_name}" if self.base_name else ""
        return f"started from {self.path}: {whose} (digest {self.digest}{base})"

    def as_record(self) -> dict[str, Any]:
        """What checkpoints and ``config.json`` keep."""
        facts = {k: v for k, v in vars(self).items() if not k.startswith("own")}
        return {**facts, "factors": list(self.factors)}


def of_record(found: CheckpointRef) -> Origin | None:
    """Return what a checkpoint has recorded; None where its run started afresh.

    Raises:
        CheckpointError: where that is damaged.
    """
    record = found.metadata.get("origin")
    try:
        return None if record is None else Origin(**{**record, "factors": (*record["factors"],)})
    except (KeyError, TypeError):
        raise CheckpointError(
            f"the checkpoint {found.folder} does not say what its run started from; "
            "output.resume=FOLDER resumes from another one"
        ) from None


def place_of(config: Config) -> tuple[str, str] | None:
    """The key that names a folder to start from, and the folder; None where none does."""
    named = {START_FROM: config.lora.start_from, JOIN: config.federated.join}
    return next(((key, path) for key, path in named.items() if path is not None), None)


def adopted(config: Config) -> Config:
    """Return the configuration with the keys that were not set as what it starts from has them.

    Raises:
        ConfigError: where the folder cannot be used, or a key is set to something else.
    """
    if place_of(config) is None:
        return config
    resumed = _resumed(config)
    if resumed is not None:
        keys = _OF_ADAPTERS + (_OF_RUN if config.federated.join else ())
        before = resumed.get("config", {})
        decided = {key: before[key] for key in keys if key in before}
    else:
        found = source(config)
        decided = found.settings()
        _refuse_other(config, found, decided)
    data = json.loads(config.model_dump_json(exclude_unset=True))
    for key, value in decided.items():
        if not _is_set(config, key):
            data = config_load.put(data, key, value, origin=key)
    return config_load.validate(data)


def _is_set(config: Config, key: str) -> bool:
    section, _, leaf = key.partition(".")
    return leaf in getattr(config, section).model_fields_set


def _refuse_other(config: Config, found: Source, decided: Mapping[str, Any]) -> None:
    """Refuse keys that are set to something else than what the run starts from."""
    flat = flatten(config)
    lines = [
        f"{key} = {flat[key]!r}: it is {value!r} in {found.path} ({found.key}); set it to that"
        for key, value in decided.items()
        if key != "lora.target_modules" and _is_set(config, key) and flat[key] != value
    ]
    if found.run_config is not None and _task(config) != _task(found.run_config):
        lines.append(
            f"data.task = {config.data.task!r}: it is {found.run_config.data.task!r} in "
            f"{found.path} ({found.key}); set it to that"
        )
    given = config.lora.target_modules
    if _is_set(config, "lora.target_modules") and isinstance(given, tuple):
        layers = found.adapters[0].layers
        if _matched(layers, given) != set(layers) or any(not _matched(layers, [g]) for g in given):
            lines.append(
                f"lora.target_modules = {list(given)!r}: the adapters of {found.path} "
                f"({found.key}) adapt {decided['lora.target_modules']!r}; set it to that, or leave "
                "it out"
            )
    if lines:
        raise ConfigError("\n".join(lines))


def _task(config: Config) -> str:
    return "text" if config.data.is_text else config.data.task


def _matched(layers: Sequence[str], targets: Sequence[str]) -> set[str]:
    """The layers that some targets name, as PEFT reads them."""
    return {one for one in layers if any(f".{one}".endswith(f".{name}") for name in targets)}


def is_resumed(config: Config) -> bool:
    """Whether a start has a checkpoint to resume from, whole or not."""
    return _resumed(config) is not None


def _resumed(config: Config) -> Mapping[str, Any] | None:
    """What the checkpoint that a start resumes says; None where the run begins.

    Where none of several can be read, nothing is said, and the start itself says why.
    """
    if config.output.resume == "never":
        return None
    try:
        folder = Path(config.output.dir) / config.run_name / "checkpoints"
        named = Path(config.output.resume)
        paths = by_age(folder) if config.output.resume == "auto" else [named]
    except OSError:
        return {}
    readable = filter(None, map(_facts_of, reversed(paths)))
    return next(readable, {}) if paths else None


def _facts_of(path: Path) -> Mapping[str, Any] | None:
    """What a checkpoint says of itself; None where it cannot be read."""
    try:
        facts = metadata_of(path)
        return facts if isinstance(facts["config"], dict) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def gamma_of(config: Config) -> float | None:
    """Return gamma of what a start goes on from; None where A is drawn.

    Raises:
        ConfigError: where the folder cannot be used.
    """
    if place_of(config) is None:
        return None
    resumed = _resumed(config)
    return source(config).gamma if resumed is None else number(dict(resumed), "gamma")


def source(config: Config) -> Source:
    """Read the folder that a run starts from.

    Raises:
        ConfigError: where it cannot be used.
    """
    place = place_of(config)
    assert place is not None
    key, path = place
    found = _joined(path) if key == JOIN else _adapters(path)
    head = found.adapters[0].head
    has_head = config.data.task in ("glue", "classification")
    if key == START_FROM and bool(head) != has_head:
        text = f"data.task={config.data.task} has no head, but the adapter holds {', '.join(head)}"
        raise ConfigError(
            f"{found.said}: {text} (modules_to_save)"
            if head
            else f"{found.said}: the adapter holds no classification head, which data.task="
            f"{config.data.task} trains; start from an adapter of a classifier"
        )
    if not found.is_for_all and (known := _known_names(config)):
        found.of_clients(*known)
    return found


def _known_names(config: Config) -> tuple[list[str], list[str]] | None:
    """Names and folders of the clients, where files or their number say them; else None."""
    if config.partition.kind == "by_file":
        names = list(silos_of(config, config.federated.num_clients).names)
    elif config.partition.kind == "by_key" or (count := num_clients_of(config)) is None:
        return None
    else:
        names = [""] * count
    return names, adapter_folders(names)


def _adapters(path: str) -> Source:
    folder = Path(path)
    found = peft_folders.find(folder, START_FROM)
    first = found[0]
    for one in found:
        if len(one.ranks) > 1:
            raise ConfigError(
                f"{START_FROM} = {path!r}: the layers of {one.path.name} have LoRA ranks from "
                f"{one.ranks[0]} to {one.ranks[-1]} (rank_pattern), and a run trains one rank in "
                "all layers; merge the adapter into its base model with PEFT (merge_and_unload) "
                "and set model.name to the result, or start from an adapter of one rank"
            )
        for what, value, other in (
            ("r", one.lora_rank, first.lora_rank),
            ("gamma", one.gamma, first.gamma),
            ("layers", one.layers, first.layers),
        ):
            if value != other:
                both = "" if what == "layers" else f", {value:g} and {other:g}"
                raise ConfigError(
                    f"{START_FROM} = {path!r}: {one.path.name} and {first.path.name} differ in "
                    f"{what}{both}; all clients of a run have the same"
                )
    is_for_all = peft_folders.is_adapter(folder)
    return Source(START_FROM, path, tuple(found), is_for_all, first.gamma)


def _joined(path: str) -> Source:
    """The finished run that clients join, with one of its adapters."""
    said, folder = f"{JOIN} = {path!r}", Path(path)
    try:
        saved = read_config(folder)
    except (OSError, ForeignFileError) as error:
        raise ConfigError(f"{said}: {CONFIG_FILE} cannot be read ({error})") from None
    if saved is None:
        raise ConfigError(f"{said}: it holds no {CONFIG_FILE}, so it is no run folder")
    run_config = saved.parse()
    rounds = finished_rounds(folder)
    if rounds != run_config.federated.num_rounds:
        raise ConfigError(
            f"{said}: the run is not finished, so its A may still change; start it again, to the "
            f"end of its {run_config.federated.num_rounds} rounds"
        )
    inside = folder / "adapters"
    found = sorted(filter(peft_folders.is_adapter, inside.iterdir())) if inside.is_dir() else []
    if not found:
        raise ConfigError(f"{said}: {inside} holds no adapter")
    # A is the same in all of them; B where it is common.
    chosen = inside / GLOBAL if inside / GLOBAL in found else found[0]
    adapter = peft_folders.read(chosen, JOIN)
    if isinstance(saved.resolved.get("gamma"), list):
        raise ConfigError(
            f"{said}: its clients have different LoRA ranks, each with its own gamma, and who "
            "joins has neither; join a run of one LoRA rank"
        )
    gamma = number(dict(saved.resolved), "gamma")
    used = adapter.gamma if gamma is None else gamma  # alpha / r may be the float beside it
    return Source(JOIN, path, (adapter,), True, used, saved, run_config)
