"""Write the adapters of a finished run as PEFT folders, with how the model is to be prompted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from sfed.data.forms import chat
from sfed.data.forms.text import TextForms
from sfed.federated.context import Run
from sfed.files.names import GLOBAL, adapter_folder
from sfed.lora.card import ClassifierCard
from sfed.methods import aggregation
from sfed.storage.run_record import CLIENT_FILE
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask

_CHAT_FILE = "chat_template.jinja"

# What a tokenizer is given: a text, two texts, or two as one where it has no separator.
_EXAMPLES = ('"A text."', '"A text.", "A second text."', '"A text.\\nA second text."')


def export_adapters(run: Run, folder: Path) -> None:
    """Write every client's adapter, and the global one where it was asked for. Collective."""
    row_of_all, prompting = None, _prompting(run)
    if "global" in run.config.evaluation.adapters and run.method.has_global_adapter:
        weights = run.weights(run.everyone)
        row_of_all = aggregation.global_row(
            run.world, run.clients, weights, run.own_factors, run.gammas
        )
    try:
        for client in run.clients.own:
            path = folder / "adapters" / run.data.adapter_folders[client]
            _write_prompting(path, prompting)
            _write(run, path, run.clients.row(client), client)
            _remove_former(run, folder, client)
            if name := run.data.names[client]:  # the folder's may lack letters of it
                facts = json.dumps({"client": client, "name": mask(name)}, ensure_ascii=False)
                (path / CLIENT_FILE).write_text(facts + "\n", encoding="utf-8")
        if row_of_all is not None and run.world.is_main:
            _write_prompting(folder / "adapters" / GLOBAL, prompting)
            _write(run, folder / "adapters" / GLOBAL, row_of_all)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output.dir: the adapters cannot be written below {folder} ({error}); make room, "
            "then start again: the run is whole in its last checkpoint"
        ) from None


def _remove_former(run: Run, folder: Path, client: int) -> None:
    """Remove what an older version, which knew no names, has written of a client that has one."""
    former = adapter_folder(client)
    if former not in run.data.adapter_folders and (folder / "adapters" / former).is_dir():
        shutil.rmtree(folder / "adapters" / former)


def _prompting(run: Run) -> dict[str, str]:
    """Files that say how the model was prompted: name -> text."""
    task, section, used = run.task, run.config.data, run.data.used_columns
    has_chat = section.is_text and TextForms.of(section).has_conversations(used)
    template = chat.chat_template_of(section, run.tokenizer) if has_chat else None
    examples = [one for one in task.written if not section.is_text or one.columns <= used]
    names = ("first_text", "second_text") if task.is_classification else ("prompt", "completion")
    facts: dict[str, Any] = {
        "task": section.name or section.task,
        "examples": [
            {names[0]: one.prompt, names[1]: one.completion, "condition": one.condition}
            for one in examples
        ],
        "chat_template": _CHAT_FILE if template is not None else None,
        "bos_token": run.tokenizer.bos_token,
        "eos_token": run.tokenizer.eos_token,
    }
    files = {"prompt_template.json": json.dumps(facts, indent=2, ensure_ascii=False) + "\n"}
    if template is not None:
        files[_CHAT_FILE] = template.source
    return files


def _write_prompting(folder: Path, files: dict[str, str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _write(run: Run, folder: Path, row: torch.Tensor, client: int | None = None) -> None:
    """Write an adapter, a client's with its own rank; for a classifier how it is loaded."""
    if client is not None and run.has_mixed_ranks:
        lora_rank = run.clients.layout.rank_of(client)
        run.adapters.write_peft_folder(folder, row, lora_rank, run.gammas[client])
    else:
        run.adapters.write_peft_folder(folder, row)
    head, settings = run.adapters.head, run.backbone.model.config
    if head is None:
        return
    ClassifierCard(
        base_name=run.adapters.peft_config.base_model_name_or_path or "",
        labels=run.task.labels or run.task.classes or (),
        dtype=str(run.backbone.model.dtype).removeprefix("torch."),
        max_tokens=run.config.data.max_tokens,
        example=_EXAMPLES[run.task.has_pair and 1 + (run.tokenizer.sep_token_id is None)],
        pad_token_id=settings.pad_token_id,
        replaces_head=head.replaces_another,
    ).write(folder)
