"""Write the adapters of a finished run as PEFT folders."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError

from sfed.federated.context import Run
from sfed.methods import aggregation
from sfed.utils.errors import UserError


def export_adapters(parts: Run, folder: Path) -> None:
    """Write every client's adapter, and the global one where it was asked for. Collective."""
    row_of_all = None
    if "global" in parts.config.evaluation.adapters and parts.method.has_global_adapter:
        weights = parts.weights(parts.everyone)
        row_of_all = aggregation.global_row(parts.world, parts.clients, weights)
    try:
        for client in parts.clients.own:
            path = folder / "adapters" / f"client-{client:04d}"
            parts.adapters.write_peft_folder(path, parts.clients.row(client))
        if row_of_all is not None and parts.world.is_main:
            parts.adapters.write_peft_folder(folder / "adapters" / "global", row_of_all)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"output.dir: the adapters cannot be written below {folder} ({error}); make room, "
            "then start again: the run is whole in its last checkpoint"
        ) from None
