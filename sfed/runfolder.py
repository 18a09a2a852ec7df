"""The folder of a run: whose it is, what it says about the run so far, and what a start puts in it.

Nothing is written before all mistakes have had their say.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

from sfed import checkpoint, records, trackers
from sfed.checkpoint import Found, State
from sfed.cli import UserError
from sfed.config import Config
from sfed.console import Console
from sfed.distributed import World
from sfed.lock import RunLock
from sfed.masking import masked
from sfed.meetings import gather_json, together
from sfed.run import Run
from sfed.sameness import comparable
from sfed.trackers import Journal


class RunFolder:
    """One run's folder; process 0 holds it from the first look to the end."""

    def __init__(self, config: Config) -> None:
        self.path = Path(config.output.dir) / config.run_name
        self._config = config
        self._lock = RunLock()

    def look(self, world: World, console: Console) -> tuple[Found | None, int]:
        """Return the checkpoint to go on from, and N. Collective; only the lock is written.

        Process 0 reads every byte of the checkpoint; the others believe it.

        Raises:
            UserError: on every process, where another run holds the folder, or the run in it is
                another one.
        """
        with together(world, "looking for checkpoints"):
            newest, notes = self._newest() if world.is_main else (None, [])
        for note in notes:
            console.warn(note)
        told = gather_json(world, "the newest checkpoint", newest and str(newest))[0]
        with together(world, "comparing with the run so far"):
            found = Found(Path(told), checkpoint.facts_of(Path(told))) if told else None
            num_clients = self._count_clients(found, world, console)
            if found is not None:
                checkpoint.refuse_other_run(found, self._config, num_clients)
        return found, num_clients

    def _newest(self) -> tuple[Path | None, list[str]]:
        self._lock.take(self.path)
        if self._config.output.resume == "never":
            return None, []
        found, notes = checkpoint.find(self.path, self._config.output.resume)
        return None if found is None else found.folder, notes

    def _count_clients(self, found: Found | None, world: World, console: Console) -> int:
        """N as configured; else that of the run's first start; else one client per process."""
        stated = self._config.federated.num_clients
        if self._config.output.resume == "never":
            return stated or world.size
        before: int | None
        if found is None:
            before = _began_with(self.path / "config.json", self._config)
        else:
            before = found.facts["config"].get("federated.num_clients")
        if stated is not None or before is None or before == world.size:
            return stated or world.size
        if before > world.size:
            console.say(
                f"N stays {before}, one client for each process of the first start; "
                f"{world.size} of them hold{'s' if world.size == 1 else ''} them now "
                "(federated.num_clients fixes N)"
            )
            return before
        if found is None:
            return world.size  # nothing was trained with fewer
        raise UserError(
            f"federated.num_clients is null, so the run in {self.path} has N = {before}, one "
            f"client for each process of its first start; there are {world.size} processes now and "
            f"each holds at least one client: start at most {before}, or choose another output.name"
        )

    def make(self, parts: Run, state: State | None, console: Console) -> Journal:
        """Make the folder, its own files and trackers; what an older run left is moved aside.

        Raises:
            UserError: where another run holds the folder, or it cannot be written.
        """
        folder = self.path
        self._lock.take(folder)  # another run may have made it meanwhile
        try:
            if self._config.output.resume == "never" and folder.exists():
                number = 1
                while (aside := folder.with_name(f"{folder.name}.old-{number}")).exists():
                    number += 1
                folder.rename(aside)
            if state is None:
                shutil.rmtree(folder / "checkpoints", ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.take(folder)
            facts = records.describe_run(parts)
            _write(folder / "config.json", json.dumps(masked(facts), indent=2))
            held = map(json.dumps, masked(parts.data.summary["clients"]))  # a line for each
            _write(folder / "partition.json", '{"clients": [\n' + ",\n".join(held) + "\n]}")
            told = None if state is None else state.finished_rounds - bool(state.unreported)
            names = self._config.output.trackers
            return trackers.open_journal(names, folder, facts, told, console.warn)
        except OSError as error:
            raise UserError(
                f"output.dir: the run folder {folder} cannot be written ({error.strerror})"
            ) from None

    def close(self) -> None:
        """Let go of it."""
        self._lock.free()


def _began_with(path: Path, config: Config) -> int | None:
    """N of an attempt of this very run that came to no checkpoint."""
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))
        num_clients = int(saved.pop("resolved")["num_clients"])
        del saved["versions"]
        before = Config.model_validate_json(json.dumps(saved))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None  # there is none, or it is not one that we wrote
    is_same = comparable(before, num_clients) == comparable(config, num_clients)
    return num_clients if is_same else None


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    os.replace(temporary, path)
