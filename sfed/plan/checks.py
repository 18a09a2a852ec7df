"""What cannot be planned is refused before anything heavy is imported. Needs no torch."""

from __future__ import annotations

from sfed.config.schema import Config
from sfed.files.silos import num_clients_of
from sfed.methods import method as methods
from sfed.utils.errors import ConfigError


def check_plan(config: Config, gpus: int) -> None:
    """Check that a configuration can be planned for a number of GPUs.

    Raises:
        ConfigError: where it has fewer clients than GPUs, or is the demo's.
        UserError: where the method is unstable with this scaling.
    """
    methods.resolve(config)
    if gpus < 1:
        raise ConfigError(f"gpus = {gpus} is less than 1: give the number of GPUs")
    num_clients = num_clients_of(config)
    if num_clients is not None and num_clients < gpus:
        raise ConfigError(
            f"federated.num_clients = {num_clients} is less than the {gpus} GPUs, and every "
            f"process holds at least one client: give --gpus {num_clients}, or raise it"
        )
    if config.data.task == "classification" and config.data.labels is None:
        raise ConfigError(
            "data.labels: the plan reads no data and so does not know the classes; name all "
            "labels, such as data.labels=[benign, malignant]"
        )
    if config.model.name == "demo":
        raise ConfigError(
            "model.name = 'demo' fits anywhere; give a CONFIG, or model.name=... data.task=..."
        )
