"""What an adapter's folder holds beside PEFT's files, and how a folder of an adapter is written.

A run writes its adapters so at its end, and ``sfed export`` those of any checkpoint. How the model
is prompted goes with them (``prompt_template.json``), with the keys by which sfed reads rows for
the adapter elsewhere (``adapter_source``), and a model card.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from sfed.config.schema import Config
from sfed.data.forms import chat
from sfed.data.forms.prompts import Written
from sfed.data.forms.text import TextForms
from sfed.data.tasks import Task, task_of
from sfed.files.names import CLIENT_FILE
from sfed.lora.adapters import Adapters
from sfed.lora.card import ClassifierUse, ModelCard, TextUse, Use
from sfed.storage import card_facts
from sfed.utils.files import write_changed
from sfed.utils.redaction import mask

PROMPT_FILE, CHAT_FILE = "prompt_template.json", "chat_template.jinja"
KEPT_KEYS: Mapping[str, tuple[str, ...] | None] = {
    "model": None,
    "data": (
        "task",
        "name",
        "labels",
        "columns",
        "template",
        "chat_loss",
        "max_tokens",
        "on_long",
        "max_row_characters",
    ),
    "evaluation": ("generate", "max_new_tokens", "batch_size"),
}
"""The keys of a run on which depends what its adapters compute of a row; None = a whole section."""
LEFT_OUT: Mapping[str, tuple[str, ...]] = {"model": ("name",)}
"""But not these: PEFT's own file names the base model."""

# What a tokenizer is given: a text, two texts, or two as one where it has no separator.
_EXAMPLES = ('"A text."', '"A text.", "A second text."', '"A text.\\nA second text."')
Facts = Sequence[tuple[str, str]]


def kept_keys(config: Config) -> dict[str, Any]:
    """The keys of ``KEPT_KEYS`` that are not at their defaults, by section, and the task."""
    dumped = json.loads(config.model_dump_json(exclude_defaults=True))
    dumped.setdefault("data", {})["task"] = config.data.task
    kept = {
        section: {
            key: value
            for key, value in dumped.get(section, {}).items()
            if (keys is None or key in keys) and key not in LEFT_OUT.get(section, ())
        }
        for section, keys in KEPT_KEYS.items()
    }
    return {section: values for section, values in kept.items() if values}


def end_marks(config: Config, tokenizer: PreTrainedTokenizerFast, *, has_chat: bool) -> list[int]:
    """The tokens that end an answer: eos, and what ends a turn of a conversation."""
    marks = [tokenizer.eos_token_id]
    if has_chat:
        marks.append(chat.end_mark(config.data, tokenizer))
    return [mark for mark in dict.fromkeys(marks) if mark is not None]


@dataclass(frozen=True)
class Trained:
    """What was trained, as far as a folder of an adapter tells of it."""

    config: Config
    """Of the run, with the labels of its classes."""
    tokenizer: PreTrainedTokenizerFast
    model_config: PreTrainedConfig
    dtype: str
    """Data type of the base model in training, as transformers names it: float32 or bfloat16."""

    @property
    def _task(self) -> Task:
        return task_of(self.config)

    def _has_chat(self, used_columns: Collection[str]) -> bool:
        section = self.config.data
        return section.is_text and TextForms.of(section).has_conversations(used_columns)

    def _written(self, used_columns: Collection[str]) -> list[Written]:
        """How the rows with these columns were written, but for conversations."""
        is_text, used = self.config.data.is_text, set(used_columns)
        return [one for one in self._task.written if not is_text or one.columns <= used]

    def prompting(self, used_columns: Collection[str]) -> dict[str, str]:
        """Files that say how the model was prompted: name -> text.

        Args:
            used_columns: the columns of the client's rows of which something was used.
        """
        task, section, template = self._task, self.config.data, None
        if self._has_chat(used_columns):
            template = chat.chat_template_of(section, self.tokenizer)
        names = (
            ("first_text", "second_text") if task.is_classification else ("prompt", "completion")
        )
        facts: dict[str, Any] = {
            "task": section.name or section.task,
            "examples": [
                {names[0]: one.prompt, names[1]: one.completion, "condition": one.condition}
                for one in self._written(used_columns)
            ],
            "chat_template": CHAT_FILE if template is not None else None,
            "bos_token": self.tokenizer.bos_token,
            "eos_token": self.tokenizer.eos_token,
            "config": kept_keys(self.config),
        }
        files = {PROMPT_FILE: json.dumps(facts, indent=2, ensure_ascii=False) + "\n"}
        if template is not None:
            files[CHAT_FILE] = template.source
        return files

    def use(self, base_name: str, used_columns: Collection[str], *, replaces_head: bool) -> Use:
        """How an adapter is loaded and prompted.

        Args:
            base_name: hub id or folder of the base model.
            used_columns: as of ``prompting``.
            replaces_head: whether the base model has a head of other classes.
        """
        task = self._task
        if task.is_classification:
            return ClassifierUse(
                base_name=base_name,
                labels=task.labels or task.classes or (),
                dtype=self.dtype,
                max_tokens=self.config.data.max_tokens,
                example=_EXAMPLES[task.has_pair and 1 + (self.tokenizer.sep_token_id is None)],
                pad_token_id=self.model_config.pad_token_id,
                replaces_head=replaces_head,
            )
        has_chat = self._has_chat(used_columns)
        template = chat.chat_template_of(self.config.data, self.tokenizer) if has_chat else None
        marks = end_marks(self.config, self.tokenizer, has_chat=has_chat)
        return TextUse(
            base_name=base_name,
            dtype=self.dtype,
            prompts=[(one.prompt, one.condition) for one in self._written(used_columns)],
            template_file=CHAT_FILE if template is not None else None,
            end_marks=[self.tokenizer.convert_ids_to_tokens(mark) for mark in marks],
        )


@dataclass(frozen=True)
class Described:
    """What is said of one adapter."""

    used_columns: frozenset[str]
    """The columns of the rows of which something was used in training."""
    facts: Facts
    """What the model card says of this one."""
    client: int | None = None
    """Number of the client; None = the global adapter."""
    name: str = ""
    """Of the client, where it has one."""


@dataclass(frozen=True)
class FolderWriter:
    """Writes the folders of adapters of one run."""

    adapters: Adapters
    trained: Trained
    facts: Facts
    """What the model card says of every adapter."""
    changes: Mapping[str, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)
    """What a method has added to frozen weights: layer -> (U, V), W += U V."""
    _known: dict[frozenset[str], tuple[dict[str, str], Use]] = field(default_factory=dict)

    def write(
        self, folder: Path, row: torch.Tensor, described: Described, title: str | None = None
    ) -> None:
        """Write an adapter with all that belongs to it.

        Args:
            folder: parents are made.
            row: (layout.size,) of any device.
            described: what is said of it.
            title: of the model card; None = the name of the folder.

        Raises:
            OSError, SafetensorError: where a file cannot be written.
        """
        self.write_prompting(folder, described)
        self.adapters.peft_form.write(folder, row, self.changes, described.client)
        self.card(described).write(folder, title)

    def write_prompting(self, folder: Path, described: Described) -> dict[str, str]:
        """Write how the model is prompted, and whose it is; returns the files of the first."""
        files, _ = self._of(described)
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_changed(folder / name, text)
        if described.name:  # the folder's may lack letters of it
            facts = {"client": described.client, "name": mask(described.name)}
            text = json.dumps(facts, ensure_ascii=False)
            write_changed(folder / CLIENT_FILE, text + "\n")
        return files

    def card(self, described: Described, *, is_merged: bool = False) -> ModelCard:
        """The model card of an adapter, or of a model that it was merged into."""
        _, use = self._of(described)
        config = self.trained.config
        computes_fp8 = config.backbone.compute == "fp8"
        scheme = "fp8" if computes_fp8 else config.model.quantization
        own = card_facts.of_adapter(*self.adapters.peft_form.rank_and_gamma(described.client))
        return ModelCard(use, [*described.facts, *self.facts, *own], is_merged, scheme)

    def _of(self, described: Described) -> tuple[dict[str, str], Use]:
        used, head = described.used_columns, self.adapters.head
        if used not in self._known:
            base = self.adapters.peft_form.settings["base_model_name_or_path"] or ""
            replaces = head is not None and head.replaces_another
            use = self.trained.use(base, used, replaces_head=replaces)
            self._known[used] = self.trained.prompting(used), use
        return self._known[used]
