"""Rounds of the trainer beside loops that people write, as a table. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sfed.utils.text import size_text

Json = Mapping[str, Any]
_PARTS = ("steps", "similarity", "mean")
EXPLANATIONS = (
    "seconds: median, lowest and highest of the turns, one round of every contestant in each; as "
    "fast as: ratio of whole rounds, turn by turn. CPU s: of all threads of the process, which "
    "other work on the machine changes least.",
    "memory: peak of a process of its own, on a CPU resident, and beyond what it has imported.",
    "lean loop: one client after another on one frozen model, own factors swapped in, rows padded "
    "to the longest of a step, logits of learned tokens only, torch's fused AdamW. HF Trainer + "
    "PEFT: a Trainer for each client and round. Only sfed measures how alike the clients are.",
)


def table(found: Json) -> Table:
    """The contestants, one in a row."""
    made = Table(
        title=f"a round of {found['steps_of_a_round']} steps of every client, and the mean of A",
        title_justify="left",
    )
    made.add_column("")
    others = list(found["contestants"][-1]["as_fast_as"])
    for column in ("s a round", "min..max", "CPU s", "min..max", *_PARTS):
        made.add_column(column, justify="right")
    for other in others:
        made.add_column(f"as fast as {other}", justify="right")
    for column in ("peak memory", "beyond imports"):
        made.add_column(column, justify="right")
    for one in found["contestants"]:
        seconds, cpu, parts = one["seconds"], one["cpu_seconds"], one["parts"]
        made.add_row(
            one["name"],
            f"{seconds['median']:.2f}",
            f"{seconds['min']:.2f}..{seconds['max']:.2f}",
            f"{cpu['median']:.2f}",
            f"{cpu['min']:.2f}..{cpu['max']:.2f}",
            *(f"{parts[name]['median']:.3f}" if name in parts else "" for name in _PARTS),
            *(_ratio(one["as_fast_as"].get(other)) for other in others),
            size_text(one["peak_bytes"], 2),
            size_text(max(0, one["peak_bytes"] - one["imported_bytes"]), 2),
        )
    return made


def notes(found: Json) -> list[str]:
    """How many clients shared a pass, and that all did the same."""
    return [
        *(f"{one['name']}: {one['about']}" for one in found["contestants"] if one["about"]),
        f"losses of all clients and rounds agree within {found['losses_apart']:.1e} of themselves",
    ]


def _ratio(ratio: Json | None) -> str:
    if ratio is None:
        return ""
    return f"{ratio['median']:.2f} ({ratio['min']:.2f}..{ratio['max']:.2f})"
