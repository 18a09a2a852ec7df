"""What every contestant of ``--against`` does."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sfed.bench.steps import GAMMA
from sfed.config.load import validate
from sfed.config.schema import Config
from sfed.config.sections.train import DEFAULT_LOCAL_STEPS
from sfed.lora import adapters
from sfed.lora.adapters import Adapters, LoraSpec
from sfed.lora.layout import Layout
from sfed.models.hf_config import DTYPES
from sfed.models.synthetic import build, model_config
from sfed.utils.errors import UserError

SEED = 0
# ln(length) of random rows: normal, as wide as that of GSM8K (half of it at most 194 tokens, 90 %
# at most 311, 99 % at most 439).
SIGMA_OF_LENGTHS = 0.36
# Of the median: no random row is longer.
LONGEST_SHARE = 3


@dataclass(frozen=True)
class Job:
    """What every contestant does; it is sent to a process of its own."""

    model: str
    """Name of a shape, for random weights; else a folder."""
    model_folder: Path | None
    """With the config.json of another shape, for random weights."""
    num_layers: int | None
    data: Path | None
    """Real examples, for a model in a folder; None = random tokens."""
    task: str
    """Form of the real examples, as data.task."""
    dtype: str
    num_clients: int
    rows: int
    """Examples of a client and step."""
    tokens: int
    """Median length of random rows; of real ones the longest."""
    steps: int
    """Of a client and round."""
    lora_rank: int
    target_modules: tuple[str, ...] | str

    @cached_property
    def config(self) -> Config:
        """The same as the configuration of a run."""
        targets = self.target_modules
        data: dict[str, Any] = {"task": "gsm8k"}  # any that needs no file
        if self.data is not None:
            data = {"task": self.task, "train_files": str(self.data), "max_tokens": self.tokens}
        return validate(
            {
                "model": {"name": self.model, "dtype": self.dtype},
                "data": data,
                "lora": {
                    "rank": self.lora_rank,
                    "target_modules": targets if isinstance(targets, str) else list(targets),
                },
                "federated": {"method": "sfed", "num_clients": self.num_clients},
                "train": {"batch_size": self.rows, "local_steps": self.steps, "lr": 1e-3},
                "evaluation": {"generate": False},
                "seed": SEED,
            }
        )

    @property
    def shape(self) -> PreTrainedConfig:
        """The model's own configuration."""
        folder = self.model_folder if self.data is None else Path(self.model)
        return model_config(self.model, folder, self.num_layers)

    @property
    def layout(self) -> Layout:
        """Of a client's row, without any weight.

        Raises:
            UserError: where a target is no layer of this shape.
        """
        blank = build(self.shape, DTYPES[self.dtype], SEED, torch.device("meta"), blank=True)
        try:
            return self.attach(blank).layout
        except UserError as mistake:
            raise UserError(str(mistake).replace("lora.target_modules", "--targets")) from None

    def attach(self, model: PreTrainedModel) -> Adapters:
        """Put the trainer's layers into a model, as a run would."""
        targets = self.target_modules
        return adapters.attach(model, LoraSpec(self.lora_rank, GAMMA, 0.0, targets, "bench"))

    @property
    def about_rows(self) -> str:
        """What a client reads in a step, in words."""
        each = f"{self.rows} rows of each of {self.num_clients} clients"
        if self.data is not None:
            return f"{each}, from {self.data}, of at most {self.tokens} tokens"
        return (
            f"{each}, of random tokens; ln(length) is normal, half of the rows have at most "
            f"{self.tokens} tokens and two thirds are within a factor of "
            f"{math.exp(SIGMA_OF_LENGTHS):.2f} of that; the second half of a row is learned"
        )


def job_of(given: Mapping[str, Any]) -> Job:
    """The job of the arguments of a command.

    Raises:
        UserError: where rows may be longer than the model reads.
    """
    default = "bf16" if torch.cuda.is_available() else "fp32"
    targets = given["targets"]
    job = Job(
        model=given["model"],
        model_folder=given["model_config"],
        num_layers=given["layers"],
        data=given["data"],
        task=given["task"] or "text",
        dtype=given["dtype"] or default,
        num_clients=given["clients"],
        rows=given["rows"],
        tokens=given["tokens"],
        steps=given["steps"] or DEFAULT_LOCAL_STEPS,
        lora_rank=given["rank"],
        target_modules=targets if targets == "all-linear" else tuple(targets.split(",")),
    )
    most = int(getattr(job.shape, "max_position_embeddings", 2**31))
    longest = job.tokens if job.data is not None else LONGEST_SHARE * job.tokens
    if longest > most:
        raise UserError(
            f"--tokens {job.tokens}: rows may have {longest} tokens and this model reads {most}; "
            f"give at most {most * job.tokens // longest}"
        )
    return job
