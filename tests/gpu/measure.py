"""Measurements on random weights: ``python -m tests.gpu.measure NAME [key=value ...]``.

They are those of ``sfed.doctor.measurements``, each in a process of its own. The last line of the
output is a JSON object. Keys are those of ``Size``; the device is a GPU where there is one. The
weights are random and nothing is downloaded.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import sys
from importlib import metadata
from types import ModuleType
from typing import Any

import torch

PACKAGES = ("torch", "transformers", "peft", "deepspeed", "datasets", "triton", "numpy")


def device_at_hand() -> torch.device:
    """The GPU, or the CPU where there is none."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def let_datasets_be_missing() -> None:
    """Let the trainer be imported without the package datasets; no measurement here reads data."""
    try:
        import datasets  # noqa: F401
    except ImportError:
        missing, errors = ModuleType("datasets"), ModuleType("datasets.exceptions")
        vars(errors)["DatasetGenerationError"] = RuntimeError
        sys.modules.update({"datasets": missing, "datasets.exceptions": errors})


def hardware(device: torch.device) -> dict[str, Any]:
    """The machine and the versions."""
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "cpu_cores": os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
        "versions": {name: _version(name) for name in PACKAGES},
        "device": str(device),
        "devices": torch.cuda.device_count(),
        "torch_cuda": torch.version.cuda,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "name": properties.name,
            "compute_capability": f"{properties.major}.{properties.minor}",
            "device_memory_bytes": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
            "free_bytes": torch.cuda.mem_get_info(device)[0],
            "bf16": torch.cuda.is_bf16_supported(),
            "cudnn": torch.backends.cudnn.version(),
            "nccl": ".".join(map(str, torch.cuda.nccl.version())),
        }
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def sized(words: list[str]) -> Any:
    """A ``Size`` with ``key=value`` over its defaults."""
    from sfed.doctor.measurements import Size

    pairs = dict(word.split("=", 1) for word in words)
    known = {field.name: field.type for field in dataclasses.fields(Size)}
    values = {key: value if known[key] == "str" else int(value) for key, value in pairs.items()}
    return Size(**values)


def main(words: list[str]) -> None:
    """Measure one thing and print it."""
    let_datasets_be_missing()
    name, *rest = words
    if name == "hardware":
        found = hardware(device_at_hand())
    else:
        from sfed.doctor.measurements import MEASUREMENTS

        found = MEASUREMENTS[name](device_at_hand(), sized(rest))
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
