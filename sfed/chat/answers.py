"""What an adapter answers to a line: through the prompt with which it was trained."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from sfed.config.text_forms import parsed
from sfed.data import batches
from sfed.data.classification import Columns
from sfed.data.forms import chat, encode
from sfed.data.forms.chat import ChatTemplate
from sfed.data.forms.pair import Pair
from sfed.data.tasks import Task, task_of
from sfed.data.tokenize import Row
from sfed.federated.generate import Writing
from sfed.federated.loaded import Loaded
from sfed.storage import adapter_source
from sfed.storage.adapter_folder import CHAT_FILE, end_marks
from sfed.utils import json_text
from sfed.utils.errors import DataError

Answer = Callable[[str], str]
"""Answers a line; raises DataError where the line is not what the adapter reads."""


@dataclass(frozen=True)
class Decoding:
    """How an answer is written."""

    max_new_tokens: int
    """Most tokens of it."""
    temperature: float
    """0 = always the likeliest token."""


def answerer(loaded: Loaded, folder: Path, decoding: Decoding, *, keeps_turns: bool) -> Answer:
    """What answers lines with the first adapter that is loaded.

    Args:
        loaded: the adapter on its base model.
        folder: of the adapter, which says how it is prompted.
        decoding: of answers.
        keeps_turns: whether a conversation remembers what was said.
    """
    loaded.adapters.bind(loaded.rows[0][None].to(loaded.world.device))
    task = task_of(loaded.config)
    if task.is_classification:
        return Classifying(loaded, task).answer
    template = chat.chat_template_of(loaded.config.data, loaded.tokenizer)
    prompts = adapter_source.prompts_of(folder)
    has_chat = (folder / CHAT_FILE).is_file() or (template is not None and prompts is None)
    marks = end_marks(loaded.config, loaded.tokenizer, has_chat=has_chat)
    writing = Writing(loaded.backbone, loaded.tokenizer, loaded.world, marks)
    if prompts is None:
        prompts = [one.prompt for one in task.written]
    completing = Completing(writing, prompts, decoding)
    if not has_chat or template is None:
        return completing.answer
    conversation = Conversation(writing, template, decoding, keeps_turns)
    return Both(conversation, completing).answer


@dataclass
class Conversation:
    """Turns through a chat template."""

    writing: Writing
    template: ChatTemplate
    decoding: Decoding
    keeps_turns: bool
    turns: list[dict[str, str]] = field(default_factory=list)

    def answer(self, line: str) -> str:
        """Answer a line; what no longer fits the model's context is forgotten, the oldest first."""
        turns = [*(self.turns if self.keeps_turns else []), {"role": "user", "content": line}]
        ids = self._ids(turns)
        while len(turns) > 1 and len(ids) + 1 >= self.writing.backbone.context_tokens:
            turns = turns[2:]
            ids = self._ids(turns)
        text = _written(self.writing, ids, self.decoding)
        self.turns = [*turns, {"role": "assistant", "content": text}]
        return text

    def _ids(self, turns: Sequence[Mapping[str, str]]) -> list[int]:
        try:
            text = self.template.prompt(turns)
        except ValueError as error:
            raise DataError(str(error)) from None
        return encode.prompt_ids(text, self.writing.tokenizer, is_chat=True)


@dataclass(frozen=True)
class Completing:
    """Prompts with the names of columns in braces, which a line fills in."""

    writing: Writing
    prompts: Sequence[str]
    decoding: Decoding

    def answer(self, line: str) -> str:
        """Complete the prompt of a line."""
        ids = encode.prompt_ids(self._prompt(line), self.writing.tokenizer, is_chat=False)
        return _written(self.writing, ids, self.decoding)

    def is_filled_by(self, line: str) -> bool:
        """Whether a line is an object that has the columns of a prompt."""
        given = _object(line)
        return given is not None and any(
            set(parsed(prompt).columns) == given.keys() for prompt in self.prompts if prompt
        )

    def _prompt(self, line: str) -> str:
        templates = [parsed(prompt) for prompt in self.prompts if prompt]
        if not templates:
            return line  # the adapter continues texts
        values = _values(line, [template.columns for template in templates])
        [template] = [one for one in templates if set(one.columns) == set(values)][:1]
        return template.fill(values)


@dataclass(frozen=True)
class Both:
    """Trained on conversations and prompts: an object of columns is a prompt, all else a turn."""

    conversation: Conversation
    completing: Completing

    def answer(self, line: str) -> str:
        """Answer a line."""
        is_prompt = self.completing.is_filled_by(line)
        return (self.completing if is_prompt else self.conversation).answer(line)


@dataclass(frozen=True)
class Classifying:
    """Texts and their classes, or values."""

    loaded: Loaded
    task: Task

    def answer(self, line: str) -> str:
        """Name the class of a line, or its value."""
        columns = self._columns()
        values = _values(line, [columns])
        texts = [values[column] for column in columns]
        pair = Pair(texts[0], texts[1] if len(texts) > 1 else "")
        limit = self.loaded.config.data.max_tokens
        [one] = encode.classified_texts([pair], self.loaded.tokenizer, limit)
        if not one.ids:
            raise DataError("an empty text has no class; give it at least a word")
        row = Row(np.array(one.ids, dtype=np.int32), one.prompt_length, float("nan"))
        context = self.loaded.backbone.context_tokens
        batch = batches.collate([[row]], 1, context=context).to(self.loaded.world.device)
        with torch.no_grad():
            [outputs] = self.loaded.backbone.outputs(
                batch.input_ids, batch.is_token, batch.is_second
            )
        labels = self.task.labels or self.task.classes
        return str(labels[int(outputs.argmax())]) if labels else f"{float(outputs[0]):.4f}"

    def _columns(self) -> tuple[str, ...]:
        data = self.loaded.config.data
        if data.task == "classification":
            return Columns(data.column_names).texts
        [written] = self.task.written
        texts = [parsed(text) for text in (written.prompt, written.completion) if text]
        return tuple(column for text in texts for column in text.columns)


def _values(line: str, forms: Sequence[Sequence[str]]) -> dict[str, str]:
    """The columns that a line fills in: a JSON object names them, any other line is the only one.

    Args:
        line: as it was typed.
        forms: the columns of each prompt.

    Raises:
        DataError: where several are needed and the line does not name them.
    """
    given = _object(line)
    if given is not None and any(set(form) == given.keys() for form in forms):
        return given
    single = [form for form in forms if len(form) == 1]
    if single:
        return {single[0][0]: line}
    shown = " or ".join(
        json.dumps(dict.fromkeys(form, "..."), ensure_ascii=False) for form in forms
    )
    raise DataError(f"the adapter reads {len(forms[0])} texts: write them as {shown} on one line")


def _object(line: str) -> dict[str, str] | None:
    """The texts of a JSON object; None where a line is none."""
    try:
        value: Any = json_text.parse(line)
    except ValueError:
        return None
    is_texts = isinstance(value, dict) and all(isinstance(text, str) for text in value.values())
    return value if is_texts else None


def _written(writing: Writing, ids: list[int], decoding: Decoding) -> str:
    """The text that follows some tokens.

    Raises:
        DataError: where nothing can follow them in the model's context.
    """
    context = writing.backbone.context_tokens
    if len(ids) >= context:
        raise DataError(f"the prompt has {len(ids)} tokens and the model's context is {context}")
    [text] = writing.texts([ids], decoding.max_new_tokens, decoding.temperature)
    return text.strip()
