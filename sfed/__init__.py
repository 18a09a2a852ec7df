"""Federated LoRA fine-tuning on GPU clusters: shared A, private B, one frozen backbone.

The names in ``__all__`` are the public API. Each is imported when it is first used, so that
``import sfed`` loads neither torch nor anything else that takes time. Names of the folders below
may be imported too; they carry no promise.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from sfed.utils.version import __version__

if TYPE_CHECKING:
    from sfed.clients.local_layer import LocalLayer
    from sfed.config.load import load as load_config
    from sfed.config.schema import Config
    from sfed.federated.preflight import check
    from sfed.federated.session import fit
    from sfed.methods.method import METHODS, Method
    from sfed.methods.scaling import effective_clients, lora_scaling
    from sfed.methods.server import CommonLayer, SentLayer
    from sfed.plan.estimate import estimate
    from sfed.report.page import write_report
    from sfed.storage.run_record import ClientRecord, RunRecord, open_run
    from sfed.utils.errors import (
        CheckpointError,
        ConfigError,
        DataError,
        DivergedError,
        MissingProcessError,
        TrainingFailedError,
        UserError,
    )

__all__ = [
    "METHODS",
    "CheckpointError",
    "ClientRecord",
    "CommonLayer",
    "Config",
    "ConfigError",
    "DataError",
    "DivergedError",
    "LocalLayer",
    "Method",
    "MissingProcessError",
    "RunRecord",
    "SentLayer",
    "TrainingFailedError",
    "UserError",
    "__version__",
    "check",
    "effective_clients",
    "estimate",
    "fit",
    "load_config",
    "lora_scaling",
    "open_run",
    "write_report",
]

# Public name -> its module, and its name there where that is another one.
PLACES = {
    "Config": "sfed.config.schema",
    "load_config": "sfed.config.load:load",
    "check": "sfed.federated.preflight",
    "fit": "sfed.federated.session",
    "METHODS": "sfed.methods.method",
    "Method": "sfed.methods.method",
    "CommonLayer": "sfed.methods.server",
    "LocalLayer": "sfed.clients.local_layer",
    "SentLayer": "sfed.methods.server",
    "effective_clients": "sfed.methods.scaling",
    "lora_scaling": "sfed.methods.scaling",
    "estimate": "sfed.plan.estimate",
    "write_report": "sfed.report.page",
    "ClientRecord": "sfed.storage.run_record",
    "RunRecord": "sfed.storage.run_record",
    "open_run": "sfed.storage.run_record",
    "CheckpointError": "sfed.utils.errors",
    "ConfigError": "sfed.utils.errors",
    "DataError": "sfed.utils.errors",
    "DivergedError": "sfed.utils.errors",
    "MissingProcessError": "sfed.utils.errors",
    "TrainingFailedError": "sfed.utils.errors",
    "UserError": "sfed.utils.errors",
}


def __getattr__(name: str) -> Any:
    """Import a public name on its first use (PEP 562)."""
    if name not in PLACES:
        raise AttributeError(f"module 'sfed' has no attribute {name!r}")
    module, _, there = PLACES[name].partition(":")
    value = getattr(importlib.import_module(module), there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
