"""Write the adapters of a finished run as PEFT folders."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from safetensors import SafetensorError

from sfed.federated.context import Run
from sfed.files.names import GLOBAL, adapter_folder
from sfed.methods import aggregation
from sfed.storage.run_record import CLIENT_FILE
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask


def export_adapters(run: Run, folder: Path) -> None:
    """Write every client's adapter, and the global one where it was asked for. Collective."""
    row_of_all = None
    if "global" in run.config.evaluation.adapters and run.method.has_global_adapter:
        weights = run.weights(run.everyone)
        row_of_all = aggregation.global_row(run.world, run.clients, weights, run.own_factors)
    try:
        for client in run.clients.own:
            path = folder / "adapters" / run.data.adapter_folders[client]
            run.adapters.write_peft_folder(path, run.clients.row(client))
            _remove_former(run, folder, client)
            if name := run.data.names[client]:  # the folder's may lack letters of it
                facts = json.dumps({"client": client, "name": mask(name)}, ensure_ascii=False)
                (path / CLIENT_FILE).write_text(facts + "\n", encoding="utf-8")
        if row_of_all is not None and run.world.is_main:
            run.adapters.write_peft_folder(folder / "adapters" / GLOBAL, row_of_all)
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
