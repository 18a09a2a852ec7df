"""What other libraries say: only what a person who trains can use."""

from __future__ import annotations

import logging
import os
import warnings

import datasets
import transformers

from sfed.observability import logs

_HARMLESS_WARNINGS = (
    # Gradients are strided views of one flat buffer by design.
    "grad and param do not obey the gradient layout contract",
)


# Libraries that print their own log lines, each in a form of its own.
_OWN_HANDLERS = ("transformers", "datasets", "huggingface_hub", "DeepSpeed")


def quieten(
    process: int, device_type: str, run: str | None = None, *, to_stderr: bool = False
) -> None:
    """Only process 0 chats; a warning of any process is kept, with its number (``logs``)."""
    logs.begin(process, run, to_stderr=to_stderr)
    # DeepSpeed, which other libraries import too, otherwise announces its own guess.
    os.environ.setdefault("DS_ACCELERATOR", device_type)
    transformers.utils.logging.disable_progress_bar()
    # A table of weights that are new: a new head is expected, anything else is refused by name. One
    # of weights that could not be converted or quantised is the only place that says why.
    logging.getLogger("transformers.modeling_utils").addFilter(
        lambda record: "LOAD REPORT" not in (text := record.getMessage()) or "CONVERSION" in text
    )
    datasets.disable_progress_bars()
    for name in _OWN_HANDLERS:
        library = logging.getLogger(name)
        library.handlers.clear()
        library.setLevel(logging.NOTSET)  # as the level of all of them is
        library.propagate = True
    # A home without room for a cache of fonts costs the report a second, and nothing else.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    logging.captureWarnings(True)
    # Announcements of other libraries' futures are no business of a person who trains.
    warnings.simplefilter("ignore", FutureWarning)
    warnings.simplefilter("ignore", DeprecationWarning)
    for known in _HARMLESS_WARNINGS:
        warnings.filterwarnings("ignore", message=known)
