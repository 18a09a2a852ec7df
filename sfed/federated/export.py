"""Write the adapters of a finished run as PEFT folders."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from sfed.federated.context import Run
from sfed.methods import aggregation
from sfed.utils.errors import UserError


def export_adapters(run: Run, folder: Path) -> None:
    """Write every client's adapter, and the global one where it was asked for. Collective."""
    row_of_all = None
    if "global" in run.config.evaluation.adapters and run.method.has_global_adapter:
        weights = run.weights(run.everyone)
        row_of_all = aggregation.global_row(run.world, run.clients, weights, run.own_factors)
    try:
        for client in run.clients.own:
            path = folder / "adapters" / f"client-{client:04d}"
            run.adapters.write_peft_folder(path, run.clients.row(client))
        if row_of_all is not None and run.world.is_main:
            run.adapters.write_peft_folder(folder / "adapters" / "global", row_of_all)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output.dir: the adapters cannot be written below {folder} ({error}); make room, "
            "then start again: the run is whole in its last checkpoint"
        ) from None
