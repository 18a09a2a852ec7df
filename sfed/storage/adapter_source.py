"""The keys by which sfed reads rows for an adapter, wherever its folder is.

They are in ``prompt_template.json`` beside it; those of an older version are taken from the run
folder around it. Of an adapter that other software wrote, a person gives them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfed.config import load as config_load
from sfed.config.schema import Config
from sfed.storage.adapter_folder import CHAT_FILE, KEPT_KEYS, LEFT_OUT, PROMPT_FILE, kept_keys
from sfed.storage.adapter_ref import read_object
from sfed.storage.run_record import CONFIG_FILE, METRICS_FILE, RunRecord, open_run


def config_of(record: RunRecord) -> Config:
    """The configuration of a run, with its labels.

    Raises:
        ConfigError: where a version wrote it that knew other keys.
    """
    sections: dict[str, Any] = json.loads(json.dumps(record.config))
    resolved: Mapping[str, Any] = sections.pop("resolved", {})
    sections.pop("versions", None)
    config = config_load.validate(sections)
    if config.data.task == "classification" and config.data.labels is None:
        labels = tuple(resolved.get("labels") or resolved.get("classes") or ())
        data = config.data.model_copy(update={"labels": labels})
        config = config.model_copy(update={"data": data})
    return config


def config_for(folder: Path, base_name: str, overrides: Sequence[str]) -> Config:
    """The configuration with which rows are read for an adapter.

    Args:
        folder: of the adapter.
        base_name: hub id or folder of its base model.
        overrides: ``key=value``, which go over what the folder says.

    Raises:
        ConfigError: for errors in the arguments, or where nothing says the task.
        UserError: where the files of the folder cannot be read.
    """
    settings = kept_sections(folder)
    settings = config_load.put(settings, "model.name", base_name, "adapter_config.json")
    if (folder / CHAT_FILE).is_file():
        file = str(folder / CHAT_FILE)
        settings = config_load.put(settings, "data.chat_template", file, PROMPT_FILE)
    for override in overrides:
        settings = config_load.overridden(settings, override)
    data = settings.get("data", {})
    if isinstance(data, dict) and data.get("task") not in ("demo", None):
        # Own data need a training file in a configuration; none is read here.
        files = data.get("train_files") or data.get("eval_files") or str(folder)
        settings = config_load.put(settings, "data.train_files", files, "data.eval_files")
    return config_load.complete(settings)


def kept_sections(folder: Path) -> dict[str, Any]:
    """The sections of keys that a folder of an adapter says; none where nothing does.

    Only the keys of ``KEPT_KEYS`` are taken: an adapter is a file of somebody else.
    """
    kept = read_object(folder / PROMPT_FILE).get("config")
    around = folder.parent.parent
    if kept is None and (around / CONFIG_FILE).is_file() and (around / METRICS_FILE).is_file():
        kept = kept_keys(config_of(open_run(around)))
    sections: dict[str, Any] = {}
    for section, keys in KEPT_KEYS.items():
        values = kept.get(section) if isinstance(kept, dict) else None
        if isinstance(values, dict):
            sections[section] = {
                key: value
                for key, value in values.items()
                if (keys is None or key in keys) and key not in LEFT_OUT.get(section, ())
            }
    return sections


def prompts_of(folder: Path) -> list[str] | None:
    """The prompts of ``prompt_template.json``; None where the folder has no such file."""
    examples = read_object(folder / PROMPT_FILE).get("examples")
    if not isinstance(examples, list):
        return None
    return [
        prompt
        for one in examples
        if isinstance(one, dict) and isinstance(prompt := one.get("prompt"), str)
    ]
