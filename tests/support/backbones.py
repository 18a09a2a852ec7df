"""What a test asks of a backbone's frozen weights."""

from __future__ import annotations

import hashlib

import torch

from sfed.models.backbone import Backbone


def stored_bytes(backbone: Backbone) -> int:
    """Bytes of frozen weights that this process stores between passes."""
    return sum(
        shard.numel() * shard.element_size()
        for shard in (getattr(p, "ds_tensor", p) for p in backbone.model.parameters())
    )


def digest(backbone: Backbone) -> str:
    """SHA-256 of the weights (this process's shards), to show that nothing changes them."""
    sha = hashlib.sha256()
    for name, parameter in sorted(backbone.model.named_parameters()):
        stored = getattr(parameter, "ds_tensor", parameter).detach().cpu().contiguous()
        sha.update(name.encode())
        sha.update(stored.view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
