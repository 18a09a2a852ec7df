"""Whether values and tensors are the same on all processes: only digests are sent."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from sfed.distributed.sync import gather_json
from sfed.distributed.world import World
from sfed.utils.errors import UserError

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_MOST_AT_A_TIME = 2**24  # whole numbers of eight bytes are made of them


def bit_sum(values: torch.Tensor) -> int:
    """The sum of all elements, read as whole numbers, modulo 2^64: any single bit changes it.

    Args:
        values: of any shape and number format, on any device.
    """
    whole = values.detach().contiguous().view(-1).view(_INTEGERS[values.element_size()])
    sums = [part.sum(dtype=torch.int64) for part in torch.split(whole, _MOST_AT_A_TIME)]
    return sum(int(one) for one in sums) % 2**64


def require_same(world: World, name: str, facts: Mapping[str, Any]) -> None:
    """Compare facts with all other processes. Collective.

    Args:
        world: the processes.
        name: what the facts are about.
        facts: anything that JSON knows, by name.

    Raises:
        UserError: on every process, with each fact that differs and both values.
    """
    own = digest(json.dumps(facts, sort_keys=True))
    if len(set(gather_json(world, f"comparing {name}", own))) == 1:
        return
    found = gather_json(world, f"differences of {name}", dict(facts))
    keys = sorted({key for one in found for key in one})
    lines = [
        f"  {key}: {values}"
        for key in keys
        if (values := by_value([json.dumps(one.get(key)) for one in found]))
    ]
    raise UserError(
        "\n".join([f"the processes do not agree, so nothing was trained ({name}):", *lines])
        + "\n  give all nodes the same configuration, installation, model and data"
    )


def digest(text: str) -> str:
    """A short digest of a text."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def by_value(values: Sequence[str]) -> str:
    """Say who has which value; nothing where all have the same."""
    holders: dict[str, list[str]] = {}
    for process, value in enumerate(values):
        holders.setdefault(value, []).append(str(process))
    if len(holders) == 1:
        return ""
    return "; ".join(f"{value} on process {', '.join(who)}" for value, who in holders.items())
