"""Federated LoRA fine-tuning on GPU clusters: shared A, private B, one frozen backbone."""

from sfed.utils.version import __version__

__all__ = ["__version__"]
