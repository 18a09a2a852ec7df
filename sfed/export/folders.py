"""Writes adapters of a checkpoint, and models that they are merged into."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from sfed.data.tasks import task_of
from sfed.export.source import Source
from sfed.federated.context import own_factors
from sfed.files.names import GLOBAL
from sfed.lora import adapters
from sfed.lora.tensor_files import readable_as_its_folder
from sfed.methods.aggregation import normalised_weights
from sfed.models.hf_config import auto_class, cannot_load, is_of_the_machine
from sfed.storage import card_facts
from sfed.storage.adapter_folder import CHAT_FILE, Described
from sfed.utils.errors import UserError
from sfed.utils.files import replace_folder
from sfed.utils.text import one_line

_SHARD = "2GB"
"""Of a merged model: what is copied at once while it is written."""


@dataclass(frozen=True)
class Chosen:
    """One adapter of a run."""

    name: str
    """Of its folder."""
    client: int | None
    """None = the global adapter."""


def choose(source: Source, clients: Sequence[str], *, with_global: bool) -> list[Chosen]:
    """The adapters that are asked for; all of them where nothing is.

    Args:
        source: the run.
        clients: names, folders or numbers.
        with_global: whether the global adapter is asked for.

    Raises:
        UserError: where there is no such client, or the method has no global adapter.
    """
    has_global = source.method.has_global_adapter
    if with_global and not has_global:
        raise UserError(
            f"--global: with federated.method={source.method.name} A differs between the clients, "
            "so there is no global adapter; name clients with --client"
        )
    numbers = list(dict.fromkeys(source.record.client_named(name) for name in clients))
    if not clients and not with_global:
        numbers = list(range(source.num_clients))
        with_global = has_global and "global" in source.config.evaluation.adapters
    chosen = [Chosen(source.folder_of(client), client) for client in numbers]
    return chosen + [Chosen(GLOBAL, None)] * with_global


def write(source: Source, chosen: Chosen, folder: Path, *, is_merged: bool) -> None:
    """Write one adapter, or the model that it is merged into, whole or not at all.

    Args:
        source: the run.
        chosen: which adapter.
        folder: that is not there yet; parents are made.
        is_merged: whether the whole model is written.

    Raises:
        UserError: where the folder cannot be written, the base model is not found, or the adapter
            cannot be merged into it.
    """
    temporary = folder.with_name(f".{folder.name}.tmp")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
        if is_merged:
            _write_merged(source, chosen, temporary, folder.name)
        else:
            described = _described(source, chosen)
            source.writer.write(temporary, _row(source, chosen), described, folder.name)
        replace_folder(temporary, folder)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--out: {folder} cannot be written ({one_line(error)})") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _described(source: Source, chosen: Chosen) -> Described:
    """Whose adapter it is, its data and its scores."""
    record, client, counts = source.record, chosen.client, source.train_counts
    measured = card_facts.scores_of(record, source.event, client)
    if client is None:
        used = frozenset().union(*record.columns.values())
        return Described(used, card_facts.of_global(counts) + measured)
    name = record.names.get(client, "")
    facts = card_facts.of_client(client, name, counts[client]) + measured
    return Described(record.columns.get(client, frozenset()), facts, client, name)


def _row(source: Source, chosen: Chosen) -> torch.Tensor:
    if chosen.client is not None:
        return source.rows.row(chosen.client)
    counts = source.train_counts if source.config.federated.weighting == "examples" else None
    weights = normalised_weights(source.num_clients, range(source.num_clients), counts)
    factors = own_factors(source.config, source.method, source.rows.layout.factors)
    return source.rows.global_row(weights, factors)


def _write_merged(source: Source, chosen: Chosen, folder: Path, title: str) -> None:
    """Merge into the base model as it is stored, and write it in shards."""
    writer, inner, described = source.writer, folder / "adapter", _described(source, chosen)
    writer.adapters.peft_form.write(inner, _row(source, chosen), client=chosen.client)
    model = adapters.merged(_base_model(source), inner)
    shutil.rmtree(inner)
    model.save_pretrained(folder, max_shard_size=_SHARD)
    for file in folder.glob("*.safetensors"):
        readable_as_its_folder(file)
    files, tokenizer = writer.write_prompting(folder, described), source.tokenizer
    if CHAT_FILE in files:
        tokenizer.chat_template = files[CHAT_FILE]
    tokenizer.save_pretrained(folder)
    writer.card(described, is_merged=True).write(folder, title)


def _base_model(source: Source) -> PreTrainedModel:
    """The base model as stock transformers loads it, with the classes of the task."""
    config, task, classes = source.config, task_of(source.config), dict[str, Any]()
    if task.is_classification:
        names = [str(label) for label in task.labels or task.classes or ()]
        classes = {
            "num_labels": task.num_outputs,
            "ignore_mismatched_sizes": True,  # the adapter's head takes its place
        }
        if names:
            classes["id2label"] = dict(enumerate(names))
            classes["label2id"] = {name: number for number, name in enumerate(names)}
    try:
        model: PreTrainedModel = auto_class(config).from_pretrained(
            source.base,
            dtype="auto",
            trust_remote_code=config.backbone.trust_remote_code,
            **classes,
        )
    except Exception as error:  # as of read_model_config
        if is_of_the_machine(error):
            raise
        raise UserError(cannot_load(config, source.base, error)) from None
    if task.is_classification and model.config.pad_token_id is None:
        # By which a model finds the end of a text.
        model.config.pad_token_id = source.writer.trained.model_config.pad_token_id
    return model.requires_grad_(False).eval()
