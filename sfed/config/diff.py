"""When two configurations are the same run: equal in all that its numbers depend on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sfed.config import own_method
from sfed.config.schema import Config
from sfed.utils.redaction import masked

# Keys that a resumed run may change: they do not change its numbers (beyond round-off).
_FREE_SECTIONS = ("output", "evaluation", "backbone")
_COUNTED_KEYS = ("backbone.compute",)
"""Keys of free sections that change numbers."""
_FREE_KEYS = (
    "data.on_small_client",  # N and the digests of the data say whom it has left out
    "data.max_row_characters",
    "federated.clients_per_pass",
    "federated.deadline_seconds",
    "federated.max_bad_rounds",
    "federated.num_rounds",  # finished rounds keep their learning rates (clients/schedule)
    "model.attention",
    "privacy.key_folder",
    "train.kernels",
)


def comparable(config: Config, num_clients: int) -> dict[str, Any]:
    """The settings that a run's numbers depend on, flat, with N filled in and no secret in them."""
    flat = {key: value for key, value in flatten(config).items() if not _is_free(key)}
    flat["federated.num_clients"] = num_clients
    flat["federated.method"] = own_method.identity(config.federated.method)
    if config.federated.optimizer_state == "auto":
        # The older name of the default; a method with which it is another refuses keep.
        flat["federated.optimizer_state"] = "keep"
    if config.data.is_text:
        flat["data.task"] = "jsonl"  # the older name, which older checkpoints hold
    return dict(masked(flat))


def _is_free(key: str) -> bool:
    if key in _COUNTED_KEYS:
        return False
    return key.partition(".")[0] in _FREE_SECTIONS or key in _FREE_KEYS


def flatten(config: Config) -> dict[str, Any]:
    """All keys of a configuration as dotted names."""
    flat: dict[str, Any] = {}
    for section, values in json.loads(config.model_dump_json()).items():
        inner = values.items() if isinstance(values, dict) else [(None, values)]
        flat.update({f"{section}.{key}" if key else section: value for key, value in inner})
    return flat


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Name each key that is not the same, with both values, a line each.

    A key that an older version does not know counts as its default. An older version may have
    written a key that may be changed now.
    """
    defaults = flatten(Config())
    values = {
        key: (before.get(key, defaults.get(key)), now.get(key, defaults.get(key)))
        for key in sorted({*before, *now})
        if key in now or not _is_free(key)
    }
    return [
        f"{key}: {old!r} there, {new!r} now" for key, (old, new) in values.items() if old != new
    ]
