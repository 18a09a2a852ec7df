"""Rounds of the trainer beside loops that people write, as a table. Needs no torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table

from sfed.utils.text import size_text

Json = Mapping[str, Any]
_PARTS = ("steps", "similarity", "mean")
EXPLANATIONS = (
    "median (lowest..highest) of the turns, one round of every contestant in each; ratios turn by "
    "turn, of whole rounds. CPU: seconds of all threads of the process, which other work on the "
    "machine changes least.",
    "memory: peak of a process of its own, on a CPU resident, and beyond what it has imported.",
    "lean: one client after another on one frozen model, own factors swapped in, rows padded "
    "to the longest of a step, logits of learned tokens only, torch's fused AdamW. trainer: HF's "
    "Trainer with PEFT, one for each client and round. Only sfed measures how alike clients are.",
)


def table(found: Json) -> Table:
    """The contestants, one in a row."""
    made = Table(
        title=f"a round of {found['steps_of_a_round']} steps of every client, and the mean of A",
        title_justify="left",
    )
    others = list(found["contestants"][-1]["beside"])
    speeds = [f"as fast as {other}{by}" for other in others for by in ("", ", CPU")]
    memory = [f"of {other}'s" for other in others]
    made.add_column("")
    for column in ("s a round", "CPU s", *_PARTS, *speeds, "peak", "beyond imports", *memory):
        made.add_column(column, justify="right")
    beyond = {
        one["key"]: max(0, one["peak_bytes"] - one["imported_bytes"])
        for one in found["contestants"]
    }
    for one in found["contestants"]:
        parts, beside, key = one["parts"], one["beside"], one["key"]
        made.add_row(
            one["name"],
            _spread(one["seconds"]),
            _spread(one["cpu_seconds"]),
            *(f"{parts[name]['median']:.3f}" if name in parts else "" for name in _PARTS),
            *(
                _spread(beside[other][ratio]) if other in beside else ""
                for other in others
                for ratio in ("as_fast_as", "as_fast_as_by_cpu")
            ),
            size_text(one["peak_bytes"], 2),
            size_text(beyond[key], 2),
            *(
                f"{beyond[key] / beyond[other]:.2f}" if other in beside and beyond[other] else ""
                for other in others
            ),
        )
    return made


def notes(found: Json) -> list[str]:
    """How many clients shared a pass, and that all did the same."""
    return [
        *(f"{one['name']}: {one['about']}" for one in found["contestants"] if one["about"]),
        f"losses of all clients and rounds agree within {found['losses_apart']:.1e} of themselves",
    ]


def _spread(found: Json) -> str:
    return f"{found['median']:.2f} ({found['min']:.2f}..{found['max']:.2f})"
