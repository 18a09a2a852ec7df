"""What Python's garbage collector visits: not the objects that live as long as a run.

A full collection visits every object that may be in a cycle. With torch, transformers, PEFT and
DeepSpeed imported that takes 0.3 to 0.4 s of a CPU core, for nothing, and in a sharded run all
processes wait for the one that collects.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def permanent() -> Iterator[None]:
    """Collect nothing in the body, and never visit what it made; for imports, and for the end."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if was_enabled:
            gc.enable()


@contextmanager
def only_of_the_body() -> Iterator[None]:
    """Let collections in the body pass over what was made before it; for the rounds of a run."""
    gc.collect()  # what is garbage by now would otherwise stay until the end of the body
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
