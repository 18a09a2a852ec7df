"""The typed, frozen configuration of a run: its sections, and what must hold between them.

Nothing here needs torch, so a mistake is answered before anything heavy is imported.
"""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import NonNegativeInt, model_validator

from sfed.sections import (
    BackboneSection,
    DataSection,
    EvaluationSection,
    FederatedSection,
    LoraSection,
    ModelSection,
    OutputSection,
    PartitionSection,
    Section,
    TrainSection,
)


class Config(Section):
    """One run."""

    seed: NonNegativeInt = 0
    """All randomness is a function of (seed, round, client)."""
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    partition: PartitionSection = PartitionSection()
    lora: LoraSection = LoraSection()
    federated: FederatedSection = FederatedSection()
    train: TrainSection = TrainSection()
    backbone: BackboneSection = BackboneSection()
    evaluation: EvaluationSection = EvaluationSection()
    output: OutputSection = OutputSection()

    @model_validator(mode="after")
    def _check_numbers(self) -> Config:
        federated, train = self.federated, self.train
        if train.local_steps is not None and train.local_epochs is not None:
            raise ValueError(
                f"train.local_steps={train.local_steps} and train.local_epochs="
                f"{train.local_epochs} exclude each other; set one of them to null"
            )
        if (train.micro_batch_size or 1) > train.batch_size:
            raise ValueError(
                f"train.micro_batch_size={train.micro_batch_size} is more than "
                f"train.batch_size={train.batch_size}"
            )
        if (federated.clients_per_round or 1) > (federated.num_clients or math.inf):
            raise ValueError(
                f"federated.clients_per_round={federated.clients_per_round} is more than "
                f"federated.num_clients={federated.num_clients}"
            )
        return self

    @model_validator(mode="after")
    def _check_task(self) -> Config:
        if (self.data.task == "glue") != (self.data.name is not None):
            raise ValueError(
                f"data.task={self.data.task} with data.name={self.data.name}: data.task=glue needs "
                "data.name, such as sst2, and no other task has one"
            )
        if self.federated.share_head and self.data.task != "glue":
            raise ValueError("federated.share_head=true needs data.task=glue: others have no head")
        if self.evaluation.generate and self.data.task == "glue":
            raise ValueError(
                "evaluation.generate=true: a classifier (data.task=glue) writes no text"
            )
        return self

    @model_validator(mode="after")
    def _check_files(self) -> Config:
        kind, files = self.partition.kind, self.files("train")
        per_client = [name for name in files if "{client}" in name]
        if kind == "by_key" and self.partition.key is None:
            raise ValueError("partition.kind=by_key needs partition.key, the name of a column")
        if kind == "by_file" and not (per_client or len(files) > 1):
            raise ValueError(
                "partition.kind=by_file needs data.train_files with {client} in the name, "
                "such as data/{client}.jsonl, or a list with one file per client"
            )
        patterns = [n for n in (*files, *self.files("eval")) if "{client}" in n]
        if kind != "by_file" and patterns:
            raise ValueError(
                f"{{client}} in {patterns[0]!r} (data.train_files, data.eval_files) needs "
                "partition.kind=by_file"
            )
        if self.data.task == "jsonl" and not files:
            raise ValueError("data.task=jsonl needs data.train_files")
        if self.data.task == "demo" and files:
            raise ValueError("data.task=demo makes its own data; set data.task=jsonl for files")
        return self

    def files(self, split: Literal["train", "eval"]) -> tuple[str, ...]:
        """The local files of a split as a tuple, whatever form they were given in."""
        files = self.data.train_files if split == "train" else self.data.eval_files
        if files is None:
            return ()
        return (files,) if isinstance(files, str) else files

    @property
    def run_name(self) -> str:
        """Name of the run folder below ``output.dir``."""
        return self.output.name or f"{self.data.name or self.data.task}-{self.federated.method}"


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
