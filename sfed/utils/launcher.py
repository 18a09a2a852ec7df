"""This process's place among those that a launcher started, from its environment variables."""

from __future__ import annotations

import os
from dataclasses import dataclass

from sfed.utils.errors import UserError
from sfed.utils.text import shown

STARTED = (os.getpid(), os.getppid())
"""This process and its parent when this file was imported, which is before torch is."""


@dataclass(frozen=True)
class Launch:
    """Place of this process; without a launcher it is the only one."""

    rank: int
    """Number of this process, from 0."""
    size: int
    """Number of processes."""
    local_rank: int
    """Number of this process on its node, from 0."""
    local_size: int
    """Number of processes on this node."""


def launch() -> Launch:
    """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE as they are now.

    Raises:
        UserError: where they are no numbers, or do not belong together.
    """
    size = _count("WORLD_SIZE", 1, least=1)
    rank = _count("RANK", 0)
    if "RANK" not in os.environ and size > 1:
        raise UserError(
            f"WORLD_SIZE={size} is set and RANK is not, so this process does not know its place "
            f"among {size}; start them with torchrun, or unset WORLD_SIZE"
        )
    if rank >= size:
        raise UserError(
            f"RANK={rank} and WORLD_SIZE={size} (1 where it is not set): ranks are 0 to "
            f"{size - 1}; start the processes with torchrun, or unset RANK"
        )
    # torchrun says LOCAL_WORLD_SIZE, deepspeed says LOCAL_SIZE.
    name = "LOCAL_WORLD_SIZE" if os.environ.get("LOCAL_WORLD_SIZE") else "LOCAL_SIZE"
    return Launch(rank, size, _count("LOCAL_RANK", 0), _count(name, size, least=1))


def lost_torchrun() -> int | None:
    """The number of torchrun's process where it has ended without this one, else None.

    It is the parent of its processes and ends them at its own end, unless it is killed. Processes
    of other launchers may be left to themselves in order, and keep the store among themselves.
    """
    process, parent = STARTED
    keeps_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not keeps_store or process != os.getpid() or parent == os.getppid():
        return None
    return parent


def rank_or_first() -> int:
    """The number of this process; 0 where its variables are wrong, so that somebody speaks."""
    try:
        return launch().rank
    except UserError:
        return 0


def _count(name: str, default: int, least: int = 0) -> int:
    """A whole number of the environment; one that is empty is as one that is not set."""
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or len(text) > 9 or int(text) < least:
        raise UserError(
            f"{name}={shown(text)} of the environment is no whole number from {least} up; "
            "launchers set it: start with torchrun, or unset it"
        )
    return int(text)
