"""HF's Trainer with PEFT, as an FL loop calls it."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch.utils.data import Dataset, SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from sfed.bench.against.material import Material
from sfed.bench.against.rounds import OneByOne, average, padded_labels
from sfed.bench.peft_baseline import with_adapters
from sfed.data.batches import IGNORED_LABEL
from sfed.data.tokenize import Row
from sfed.utils.errors import UserError


class TrainerRounds(OneByOne):
    """HF's Trainer with PEFT: one Trainer for each client and round, as an FL loop calls it.

    A client's optimizer is kept over the rounds, since the trainer keeps it too. No evaluation, no
    checkpoints, no logging.
    """

    def __init__(self, material: Material) -> None:
        if find_spec("accelerate") is None:
            raise UserError(
                "--against trainer: transformers.Trainer needs accelerate; run pip install "
                "accelerate, or leave trainer out"
            )
        super().__init__(material)
        # It warns that there are process groups, which the bench has for the trainer.
        logging.getLogger("transformers.training_args").setLevel(logging.ERROR)
        job, train = material.job, material.job.config.train
        self._names = [f"client-{client}" for client in range(job.num_clients)]
        adapted = (job.lora_rank, job.target_modules)
        self._model = with_adapters(material.model, self._names, *adapted)
        self._parameters = dict(self._model.named_parameters())
        self._folder = tempfile.TemporaryDirectory()
        self._optimizers = []
        for client in range(job.num_clients):
            own = []
            for piece in material.layout.pieces:
                weight = self._weight(client, piece.layer, piece.factor)
                weight.data.copy_(material.first_values(piece.layer, piece.factor))
                own.append(weight.requires_grad_())
            self._optimizers.append(
                torch.optim.AdamW(own, lr=train.lr, weight_decay=train.weight_decay, fused=True)
            )
        self._arguments = TrainingArguments(
            output_dir=self._folder.name,
            per_device_train_batch_size=job.rows,
            max_steps=job.steps,
            learning_rate=train.lr,
            lr_scheduler_type="constant",
            max_grad_norm=train.max_grad_norm or 0.0,
            bf16=False,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            remove_unused_columns=False,
            use_cpu=material.world.device.type == "cpu",
            dataloader_pin_memory=material.world.device.type == "cuda",
            label_names=["labels"],
        )

    def train(self, client: int, position: int) -> float:
        """Activate the client's adapter and let a Trainer make its steps."""
        job = self.material.job
        rows = [
            row
            for step in range(job.steps)
            for row in self.material.batch(client, position + step * job.rows)
        ]
        self._model.set_adapter(self._names[client])
        trainer = _InOrder(
            self._model,
            self._arguments,
            data_collator=_collated,
            train_dataset=_Rows(rows),
            optimizers=(self._optimizers[client], None),
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        supervised = [
            sum(int(row.is_learned[1:].sum()) for row in rows[start : start + job.rows])
            for start in range(0, len(rows), job.rows)
        ]
        losses = [float(loss) for loss in trainer.step_losses]
        weighted = [loss * count for loss, count in zip(losses, supervised, strict=True)]
        return sum(weighted) / sum(supervised)

    def average(self) -> None:
        """Take the mean of all A."""
        names = [piece.layer for piece in self.material.layout.pieces if piece.factor == "A"]
        everyone = range(self.material.job.num_clients)
        average([[self._weight(client, name, "A") for name in names] for client in everyone])

    def factor(self, client: int, layer: str, factor: str) -> torch.Tensor:
        """A client's factor of a layer."""
        return self._weight(client, layer, factor).detach()

    def _weight(self, client: int, layer: str, factor: str) -> torch.nn.Parameter:
        name = f"base_model.model.{layer}.lora_{factor}.{self._names[client]}.weight"
        weight: torch.nn.Parameter = self._parameters[name]
        return weight


class _Rows(Dataset[Row]):
    """Rows in memory."""

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> Row:
        return self._rows[place]


def _collated(rows: Sequence[Row]) -> dict[str, torch.Tensor]:
    """A batch as the collators of transformers make it, with a mask for the padding."""
    ids, labels = padded_labels(rows)
    lengths = torch.tensor([len(row.ids) for row in rows])
    is_token = torch.arange(ids.shape[1]) < lengths[:, None]
    assert IGNORED_LABEL == -100, "what transformers ignores"
    return {"input_ids": ids, "attention_mask": is_token.long(), "labels": labels}


class _InOrder(Trainer):  # type: ignore[misc]  # it has no types
    """A Trainer that reads the examples as they come and keeps the loss of each step."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.step_losses: list[torch.Tensor] = []

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        return SequentialSampler(train_dataset or self.train_dataset)

    def compute_loss(self, *arguments: Any, **settings: Any) -> Any:
        """The Trainer's own loss."""
        found = super().compute_loss(*arguments, **settings)
        self.step_losses.append((found[0] if isinstance(found, tuple) else found).detach())
        return found
