"""Federated LoRA fine-tuning on GPU clusters: shared A, private B, one frozen backbone."""

__version__ = "0.1.0"
