"""Checkpoints: a round is on disk whole or not at all, and any number of processes resumes from it.

    checkpoints/round-000010/            after 10 finished rounds
    checkpoints/round-000010-partial/    stopped by SIGTERM within the 11th
        common.safetensors               what is common, the server's too: common/a, a_m, ...
        client-0003.safetensors          what is client 3's own: clients/0003/b, a_control, ...
        server-0001.safetensors          the server step's state of process 1's layers, if any
        run.json                         rounds, sums, configuration, size and digest of each file

A client that has never taken part has no file. Tensors are in safetensors files: nothing is ever
pickled. ``checkpoint_writer`` writes the folders and ``resume`` finds the one that a run resumes
from; here is what they are, and how one is read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file

from sfed.clients.state import Parts
from sfed.clients.store import ClientStore
from sfed.data.partition import place
from sfed.distributed.sync import raise_everywhere
from sfed.distributed.world import World
from sfed.storage.checkpoint_folder import COMMON, CheckpointRef, folder_name
from sfed.utils.errors import CheckpointError
from sfed.utils.text import one_line


@dataclass(frozen=True)
class State:
    """Where a run is, beside what its clients hold."""

    finished_rounds: int
    stats: NDArray[np.float64] | None
    """(N, columns): sums of the round in flight where a run was stopped within it."""
    bad_rounds: int
    """Rounds so far in which some client turned non-finite."""
    unreported: dict[str, Any] | None = None
    """Where a run was stopped while it evaluated the last finished round: what was measured of that
    round until then. The sums are of that round, which has no event yet."""

    @property
    def is_within(self) -> bool:
        """Whether a round is in flight."""
        return self.stats is not None and self.unreported is None

    @property
    def name(self) -> str:
        """Name of the folder."""
        return folder_name(self.finished_rounds, is_within=self.is_within)


def file_of(client: int) -> str:
    """Name of the file that holds what is a client's own."""
    return f"client-{client:04d}.safetensors"


def server_file(process: int) -> str:
    """Name of the file that holds what the server step keeps for the layers of a process."""
    return f"server-{process:04d}.safetensors"


def keyed(prefix: str, parts: Parts) -> Parts:
    """The tensors of a file; with prefixes, names are unique over all files of a checkpoint."""
    return {f"{prefix}/{name}": tensor for name, tensor in parts.items()}


def clients_per_pass(found: CheckpointRef | None, placement: Sequence[Sequence[int]]) -> int | None:
    """How many clients shared a pass when the same clients were on each process, None otherwise.

    Args:
        found: the checkpoint; one of an earlier version placed its clients by number.
        placement: the clients of each process now.
    """
    if found is None or found.metadata.get("processes") != len(placement):
        return None
    by_number = place(sum(map(len, placement)), len(placement))
    before = found.metadata.get("placement", [list(own) for own in by_number])
    if before != [list(own) for own in placement]:
        return None
    shared = found.metadata.get("clients_per_pass")
    return shared if type(shared) is int and shared > 0 else None


def load(found: CheckpointRef, world: World, clients: ClientStore) -> State:
    """Read this process's clients from a checkpoint of any number of processes. Collective.

    Raises:
        CheckpointError: where the files do not hold what the run needs.
    """
    facts = found.metadata
    with raise_everywhere(world, "loading the checkpoint"):
        if facts["layout_size"] != clients.layout.size:
            raise CheckpointError(
                f"{found.folder} holds adapters of {facts['layout_size']} numbers and this model "
                f"has {clients.layout.size}; it belongs to another model"
            )
        try:
            _restore(found, clients)
        except OSError as error:
            raise CheckpointError(
                f"the checkpoint {found.folder} cannot be read ({error.strerror or error}); mend "
                "what keeps it from being read and start again"
            ) from None
        except (SafetensorError, KeyError, ValueError) as error:
            reason = one_line(error)
            raise CheckpointError(
                f"the checkpoint {found.folder} cannot be read ({reason}); output.resume=FOLDER "
                "resumes from another one"
            ) from None
    stats = facts["ledger"]
    return State(
        facts["finished_rounds"],
        None if stats is None else np.asarray(stats, dtype=np.float64),
        facts["bad_rounds"],
        facts.get("unreported"),
    )


def _restore(found: CheckpointRef, clients: ClientStore) -> None:
    common = _read(found.folder / COMMON, "common/", clients)
    if missing := {factor.lower() for factor in clients.layout.factors} - common.keys():
        raise ValueError(f"{COMMON} lacks {', '.join(sorted(missing))}")
    held: dict[int, Parts] = {}
    for client in clients.own:
        if file_of(client) in found.metadata["files"]:
            path = found.folder / file_of(client)
            held[client] = _read(path, f"clients/{client:04d}/", clients)
    clients.restore(common, held)
    # Which process has which layer may be another now: each takes all and uses its own.
    clients.server_state = {
        name.removeprefix("server/"): tensor
        for file in sorted(found.metadata["files"])
        if file.startswith("server-")
        for name, tensor in load_file(found.folder / file).items()
    }


def _read(path: Path, prefix: str, clients: ClientStore) -> Parts:
    """Read one file.

    Raises:
        ValueError: where a tensor is none that the run knows.
    """
    parts: Parts = {}
    for name, tensor in load_file(path).items():
        short = name.removeprefix(prefix)
        if tensor.shape != (clients.widths.get(short),):
            raise ValueError(f"{path.name}: {name} of shape {tuple(tensor.shape)} has no place")
        parts[short] = tensor
    return parts
