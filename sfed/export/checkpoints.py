"""Which checkpoint of a run an export reads. Needs no torch.

Which rounds a run has on disk follows from ``output.checkpoint_every_rounds`` and
``output.keep_checkpoints``.
"""

from __future__ import annotations

from pathlib import Path

from sfed.storage.checkpoint_folder import CheckpointRef, age_of_name, by_age, metadata_of
from sfed.storage.resume import problem_of
from sfed.utils.errors import CheckpointError


def whole_rounds(run_folder: Path) -> dict[int, Path]:
    """Finished rounds -> the checkpoint after them, in order; what was stopped within one is none.

    Raises:
        CheckpointError: where the folder of the checkpoints cannot be read.
    """
    try:
        folders = by_age(run_folder / "checkpoints")
    except OSError as error:
        raise CheckpointError(
            f"{run_folder / 'checkpoints'} cannot be read ({error.strerror})"
        ) from None
    ages = [(age_of_name(folder.name), folder) for folder in folders]
    return {age[0]: folder for age, folder in ages if age is not None and not age[1]}


def checkpoint_after(run_folder: Path, finished_rounds: int | None) -> CheckpointRef:
    """Return the checkpoint after so many rounds; None = the newest.

    Every byte of it is compared with its digest.

    Raises:
        CheckpointError: where there is none, with those that are there; or where it is damaged.
    """
    there = whole_rounds(run_folder)
    if not there:
        raise CheckpointError(
            f"{run_folder / 'checkpoints'} holds no checkpoint of a finished round; the first is "
            "written after output.checkpoint_every_rounds rounds"
        )
    wanted = max(there) if finished_rounds is None else finished_rounds
    if wanted not in there:
        raise CheckpointError(
            f"--round {wanted}: {run_folder} keeps no checkpoint of that round; there are "
            f"{', '.join(map(str, there))} (output.keep_checkpoints says how many are kept)"
        )
    if problem := problem_of(there[wanted]):
        others = ", ".join(str(number) for number in there if number != wanted)
        raise CheckpointError(
            f"the checkpoint {there[wanted]} cannot be used: {problem}"
            + (f"; --round {others} may be whole" if others else "")
        )
    return CheckpointRef(there[wanted], metadata_of(there[wanted]))
