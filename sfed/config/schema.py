"""The typed, frozen configuration of a run. The folder ``sections`` is the reference of all keys.

Every field says its type, bound and default, and the string under it is what ``--help`` prints.
What must hold between sections is checked by ``Config``. Nothing here needs torch, so a mistake is
answered before anything heavy is imported.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import Field, NonNegativeInt, model_validator

from sfed.config import own_method, text_forms
from sfed.config.fields import Section
from sfed.config.sections.backbone import BackboneSection, ModelSection
from sfed.config.sections.clients import ClientSection
from sfed.config.sections.data import CLASS_COLUMNS, DataSection, check_labels
from sfed.config.sections.evaluation import EvaluationSection
from sfed.config.sections.federated import FederatedSection
from sfed.config.sections.lora import LoraSection
from sfed.config.sections.output import OutputSection
from sfed.config.sections.partition import PartitionSection
from sfed.config.sections.privacy import PrivacySection
from sfed.config.sections.train import TrainSection


def _needs_files(task: str) -> str:
    return f"data.task={task} needs data.train_files; set it to a file, a folder or a glob"


class Config(Section):
    """One run."""

    seed: NonNegativeInt = 0
    """Seed of all random numbers, at least 0. Every draw depends on the seed, round and client
    only."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    lora: LoraSection = LoraSection()
    federated: FederatedSection = FederatedSection()
    train: TrainSection = TrainSection()
    backbone: BackboneSection = BackboneSection()
    evaluation: EvaluationSection = EvaluationSection()
    privacy: PrivacySection = PrivacySection()
    output: OutputSection = OutputSection()
    clients: dict[str, ClientSection] = Field(default_factory=dict)
    """What single clients train with, by name or number."""

    @model_validator(mode="after")
    def _check_clients(self) -> Config:
        ranks, num_clients = self.lora.rank, self.federated.num_clients
        if not isinstance(ranks, tuple):
            return self
        if num_clients is not None and len(ranks) != num_clients:
            raise ValueError(
                f"lora.rank has {len(ranks)} ranks and federated.num_clients={num_clients}; give "
                "one rank for each client, or one number for all"
            )
        if named := [name for name, one in self.clients.items() if one.rank is not None]:
            raise ValueError(
                f"clients.{named[0]}.rank and a list in lora.rank both say this client's rank; "
                "remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _check_numbers(self) -> Config:
        federated, train = self.federated, self.train
        if train.local_steps is not None and train.local_epochs is not None:
            raise ValueError(
                f"train.local_steps={train.local_steps} and train.local_epochs="
                f"{train.local_epochs} exclude each other; set one of them to null"
            )
        if (train.micro_batch_size or 1) > (
            most := max(self.of_clients("batch_size", train.batch_size))
        ):
            raise ValueError(
                f"train.micro_batch_size={train.micro_batch_size} is more than "
                f"train.batch_size={train.batch_size}"
                + (f" and than {most}, the largest of a client" if self.clients else "")
            )
        if (federated.clients_per_round or 1) > (federated.num_clients or math.inf):
            raise ValueError(
                f"federated.clients_per_round={federated.clients_per_round} is more than "
                f"federated.num_clients={federated.num_clients}"
            )
        if (self.evaluation.clients or 1) > (federated.num_clients or math.inf):
            raise ValueError(
                f"evaluation.clients={self.evaluation.clients} is more than "
                f"federated.num_clients={federated.num_clients}; lower it, or set it to null for "
                "all clients"
            )
        return self

    @model_validator(mode="after")
    def _check_quantization(self) -> Config:
        zero = self.backbone.deepspeed.get("zero_optimization", {})
        keys = ("zero_quantized_weights", "zero_quantized_nontrainable_weights")
        if self.model.quantization != "none" and (asked := [key for key in keys if zero.get(key)]):
            raise ValueError(
                f"backbone.deepspeed.zero_optimization.{asked[0]} and model.quantization="
                f"{self.model.quantization} exclude each other: codes cannot be quantised again"
            )
        if self.model.quantization != "none" and self.backbone.compute == "fp8":
            raise ValueError(
                f"model.quantization={self.model.quantization} and backbone.compute=fp8 exclude "
                "each other: FP8 products take weights of 16 or 32 bits; set one of them back, "
                "model.quantization=none or backbone.compute=full"
            )
        return self

    @model_validator(mode="after")
    def _check_start(self) -> Config:
        """Refuse keys that an adapter on disk decides, or that have no meaning with it."""
        lora, federated = self.lora, self.federated
        if lora.start_from is not None and federated.join is not None:
            raise ValueError(
                f"lora.start_from={lora.start_from} and federated.join={federated.join} exclude "
                "each other; set one of them to null"
            )
        key = "lora.start_from" if lora.start_from is not None else "federated.join"
        decided: dict[str, object] = {"lora.alpha": lora.alpha, "lora.scaling": lora.scaling}
        if federated.join is not None:
            decided |= {
                "federated.averaged": federated.averaged,
                "federated.share_head": federated.share_head,
            }
        elif lora.start_from is None:
            return self
        if isinstance(lora.rank, tuple) or any(one.rank for one in self.clients.values()):
            raise ValueError(
                f"ranks of single clients with {key}: r is that of the adapters; remove them from "
                "lora.rank and clients"
            )
        for name, value in decided.items():
            if value not in (None, "auto", False):
                reason = "gamma is that of the adapters"
                if name.startswith("federated."):
                    reason = "each new client trains alone, and nothing is averaged"
                raise ValueError(f"{name}={value} with {key}: {reason}; remove it")
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Config:
        if (self.data.task == "glue") != (self.data.name is not None):
            raise ValueError(
                f"data.task={self.data.task} with data.name={self.data.name}: data.task=glue needs "
                "data.name, such as sst2, and no other task has one"
            )
        has_head = self.data.task in ("glue", "classification")
        if self.federated.share_head and not has_head:
            raise ValueError(
                "federated.share_head=true needs data.task=classification or glue: others have no "
                "head"
            )
        if self.evaluation.generate and has_head:
            raise ValueError(
                f"evaluation.generate=true: a classifier (data.task={self.data.task}) writes no "
                "text"
            )
        if self.train.class_weights != "none" and (not has_head or self.data.name == "stsb"):
            raise ValueError(
                f"train.class_weights={self.train.class_weights} needs a task with classes, which "
                f"data.task={self.data.task} is not; remove it"
                if not has_head
                else f"train.class_weights={self.train.class_weights}: data.name=stsb has values "
                "and no classes; remove it"
            )
        return self

    @model_validator(mode="after")
    def _check_classification(self) -> Config:
        data = self.data
        if data.task != "classification":
            if data.labels:
                raise ValueError(
                    f"data.labels needs data.task=classification; data.task={data.task} has labels "
                    "of its own"
                )
            return self
        if not data.train_files:
            raise ValueError(_needs_files(data.task))
        if unknown := sorted(data.column_names.keys() - set(CLASS_COLUMNS)):
            raise ValueError(
                f"data.columns: {unknown[0]!r} is none of {', '.join(CLASS_COLUMNS)}, which "
                "data.task=classification reads"
            )
        columns = [data.column_names.get(name, name) for name in CLASS_COLUMNS]
        if twice := [column for column in columns if columns.count(column) > 1]:
            raise ValueError(f"data.columns: column {twice[0]!r} is named twice")
        if data.labels is not None:
            check_labels(data.labels)
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Config:
        kind, files = self.partition.kind, self.files("train")
        if kind == "by_key" and self.partition.key is None:
            raise ValueError("partition.kind=by_key needs partition.key, the name of a column")
        if kind == "by_file" and not files:
            raise ValueError(
                "partition.kind=by_file needs data.train_files: a folder, a glob or a list with "
                "one file per client, or {client} in the name, such as data/{client}.jsonl"
            )
        if kind != "by_file" and self.data.on_small_client == "skip":
            raise ValueError("data.on_small_client=skip needs partition.kind=by_file")
        patterns = [n for n in (*files, *self.files("eval")) if "{client}" in n]
        if kind != "by_file" and patterns:
            raise ValueError(
                f"{{client}} in {patterns[0]!r} (data.train_files, data.eval_files) needs "
                "partition.kind=by_file"
            )
        if self.data.is_text and not files:
            raise ValueError(_needs_files(self.data.task))
        if self.data.task == "demo" and files:
            raise ValueError("data.task=demo makes its own data; set data.task=text for files")
        return self

    @model_validator(mode="after")
    def _check_hub(self) -> Config:
        data = self.data
        for key, value, names in (
            ("split", data.split, self.files("train")),
            ("eval_split", data.eval_split, self.files("eval")),
        ):
            if value is not None and not any(name.startswith("hub:") for name in names):
                files = "train_files" if key == "split" else "eval_files"
                raise ValueError(f"data.{key} needs a data set hub:org/name in data.{files}")
        return self

    @model_validator(mode="after")
    def _check_forms(self) -> Config:
        data, fields = self.data, type(self.data).model_fields
        if data.columns and not data.is_text and data.task != "classification":
            raise ValueError(
                f"data.columns needs data.task=text or classification; {data.task} has its own form"
            )
        for key in ("template", "chat_template", "chat_loss"):
            if not data.is_text and getattr(data, key) != fields[key].default:
                raise ValueError(f"data.{key} needs data.task=text; {data.task} has its own form")
        if not data.is_text:
            return self
        if own := sorted(data.column_names.keys() & set(CLASS_COLUMNS[1:])):
            raise ValueError(f"data.columns.{own[0]} needs data.task=classification")
        if data.template is not None and data.chat_template is not None:
            raise ValueError("data.template and data.chat_template exclude each other")
        text_forms.check(data.column_names, data.template)
        return self

    def files(self, split: Literal["train", "eval"]) -> tuple[str, ...]:
        """The files of a split as they were named, as a tuple."""
        files = self.data.train_files if split == "train" else self.data.eval_files
        if files is None:
            return ()
        return (files,) if isinstance(files, str) else files

    def of_clients(
        self, key: Literal["rank", "batch_size", "local_steps"], default: int
    ) -> list[int]:
        """The values that clients may have of a key, whatever they are called.

        Args:
            key: of the section of a client.
            default: of those that are not named; left out where all N are.
        """
        others = [default] if len(self.clients) != self.federated.num_clients else []
        return [getattr(one, key) or default for one in self.clients.values()] + others

    @property
    def has_poisson_cohorts(self) -> bool:
        """Whether the number of clients in a round varies."""
        return self.privacy.is_on and self.federated.sampling != "fixed"

    @property
    def most_in_round(self) -> int | None:
        """Most clients that train in a round; None = perhaps all."""
        return None if self.has_poisson_cohorts else self.federated.clients_per_round

    @property
    def run_name(self) -> str:
        """Name of the run folder below ``output.dir``."""
        method = own_method.short_name(self.federated.method)
        return self.output.name or f"{self.data.name or self.data.task}-{method}"


# Keys without a default for whoever writes a configuration, and what to do about them. The schema
# has values for them, so that a part of a configuration can be made and checked by itself.
REQUIRED = {
    "model.name": "set model.name, or data.task=demo",
    "data.task": "set data.task",
}

# What `python -m sfed.train` without arguments runs, and what keys with data.task=demo stand on:
# eight clients, each with its own kind of problem and its own way of writing the answer. The same
# eight on any number of processes. configs/demo.yaml holds the same for a person to copy.
DEMO: dict[str, Any] = {
    "model": {"name": "demo"},
    "data": {"task": "demo", "max_tokens": 128},
    "partition": {"kind": "by_key", "key": "kind"},
    "lora": {"rank": 8},
    "federated": {"method": "sfed", "num_clients": 8, "num_rounds": 5},
    "train": {"local_steps": 10, "batch_size": 8, "lr": 3e-3},
    "evaluation": {"every_rounds": 1, "max_examples": 32},
    "output": {"name": "demo"},
}
