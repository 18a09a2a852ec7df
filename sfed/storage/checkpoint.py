"""Checkpoints: a round is on disk whole or not at all, and any number of processes resumes from it.

    checkpoints/round-000010/            after 10 finished rounds
    checkpoints/round-000010-partial/    stopped by SIGTERM within the 11th
        common.safetensors               what is common, the server's too: common/a, a_m, ...
        clients-0001-000010-0.safetensors
                                         what is the clients' own: clients/0003/b, a_control, ...
        server-0001.safetensors          the server step's state of process 1's layers, if any
        run.json                         rounds, sums, configuration, whose state is in which file,
                                         size and digest of each file

A client that has never taken part is in no file. In format 1 each client has a file of its own,
client-0003.safetensors. Tensors are in safetensors files: nothing is ever
pickled. ``checkpoint_writer`` writes the folders and ``resume`` finds the one that a run resumes
from; here is what they are, and how one is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from sfed.clients.state import Parts
from sfed.clients.store import ClientStore
from sfed.data.partition import place
from sfed.distributed.sync import raise_everywhere
from sfed.distributed.world import World
from sfed.storage.checkpoint_folder import COMMON, CheckpointRef, folder_name, packs_of
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


def pack_file(process: int, finished_rounds: int, number: int) -> str:
    """Name of a file that holds what is some clients' own, as a process wrote it after a round."""
    return f"clients-{process:04d}-{finished_rounds:06d}-{number}.safetensors"


def client_prefix(client: int) -> str:
    """What the names of a client's tensors begin with."""
    return f"clients/{client:04d}"


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
    clients.restore(common, _held(found, clients))
    # Which process has which layer may be another now: each takes all and uses its own.
    clients.server_state = {
        name.removeprefix("server/"): tensor
        for file in sorted(found.metadata["files"])
        if file.startswith("server-")
        for name, tensor in load_file(found.folder / file).items()
    }


def _held(found: CheckpointRef, clients: ClientStore) -> Iterator[tuple[int, Parts]]:
    """What this process's clients hold of their own, one client at a time."""
    for file, packed in packs_of(found.metadata).items():
        mine = [client for client in packed if client in clients.lines]
        if not mine:
            continue
        path = found.folder / file
        with safe_open(path, framework="pt") as opened:
            names: dict[str, list[str]] = {}
            for name in opened.keys():  # noqa: SIM118  (it is no mapping)
                names.setdefault(name.rpartition("/")[0], []).append(name)
            for client in mine:
                prefix = client_prefix(client)
                if prefix not in names:
                    raise ValueError(f"{file} lacks client {client}")
                tensors = {name: opened.get_tensor(name) for name in names[prefix]}
                yield client, _checked(path, f"{prefix}/", tensors, clients)


def _read(path: Path, prefix: str, clients: ClientStore) -> Parts:
    """Read one file.

    Raises:
        ValueError: where a tensor is none that the run knows.
    """
    return _checked(path, prefix, load_file(path), clients)


def _checked(path: Path, prefix: str, tensors: Parts, clients: ClientStore) -> Parts:
    parts: Parts = {}
    for name, tensor in tensors.items():
        short = name.removeprefix(prefix)
        if tensor.shape != (clients.widths.get(short),):
            raise ValueError(f"{path.name}: {name} of shape {tuple(tensor.shape)} has no place")
        parts[short] = tensor
    return parts
