"""What other libraries say: only what a person who trains can use."""

from __future__ import annotations

import logging
import os
import sys
import warnings

import datasets
import transformers

from sfed.distributed import World

_HARMLESS_WARNINGS = (
    # Gradients are strided views of one flat buffer by design.
    "grad and param do not obey the gradient layout contract",
    # Each process writes and reads its own clients of a checkpoint, without a word to others.
    "torch.distributed is disabled, unavailable or uninitialized",
)


class _Prefixed(logging.Formatter):
    """Says which process a warning comes from."""

    def __init__(self, world: World) -> None:
        super().__init__(f"[process {world.rank}] %(levelname)s %(name)s: %(message)s")


def quieten(world: World) -> None:
    """Only process 0 chats; a warning of any process is kept, with its number."""
    # DeepSpeed, which other libraries import too, otherwise announces its own guess.
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    transformers.utils.logging.disable_progress_bar()
    # A table of weights that are new: a new head is expected, anything else is refused by name.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "LOAD REPORT" not in record.getMessage()
    )
    datasets.disable_progress_bars()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Prefixed(world))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    logging.captureWarnings(True)
    # Announcements of other libraries' futures are no business of a person who trains.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for known in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=known)
