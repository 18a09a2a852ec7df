"""The numbers of the last round as a Prometheus text file, for node exporter's textfile collector.

Text exposition format 0.0.4: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from sfed.utils.files import replacing

FINISHED, PLANNED = "finished_rounds", "planned_rounds"
HELP = {
    FINISHED: "Rounds that are done.",
    PLANNED: "Rounds of the whole run.",
}
"""Of what stands under another name in metrics.jsonl."""
_LINE_ESCAPES = str.maketrans({"\\": r"\\", "\n": r"\n"})
_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})

Labels = Mapping[str, str]
Sample = tuple[str, Labels, float]
"""Name of a metric as metrics.jsonl has it, labels, value."""


def write(path: Path, samples: Iterator[Sample]) -> None:
    """Write the file anew; a reader sees the old one or the new one.

    Raises:
        OSError: where it cannot be written.
    """
    with replacing(path) as temporary:  # ends in .tmp, which no collector reads
        temporary.write_text(exposition(samples), encoding="utf-8", errors="replace")


def exposition(samples: Iterator[Sample]) -> str:
    """The text: all samples of a metric together, after its HELP and TYPE."""
    metrics: dict[str, list[tuple[Labels, float]]] = {}
    for name, labels, value in samples:
        metrics.setdefault(name, []).append((labels, value))
    lines = []
    for (source, found), name in zip(metrics.items(), _names(metrics), strict=True):
        told = (HELP.get(source) or f"{source} as in metrics.jsonl.").translate(_LINE_ESCAPES)
        lines += [f"# HELP {name} {told}", f"# TYPE {name} gauge"]
        lines += [f"{name}{{{_labels(labels)}}} {value!r}" for labels, value in found]
    return "".join(f"{line}\n" for line in lines)


def _names(sources: Mapping[str, object]) -> Iterator[str]:
    """A name for each metric: of letters, digits and underscores, and none twice."""
    taken: set[str] = set()
    for source in sources:
        stem = name = "sfed_" + re.sub(r"[^a-zA-Z0-9_]", "_", source)
        number = 2
        while name in taken:
            name, number = f"{stem}_{number}", number + 1
        taken.add(name)
        yield name


def _labels(labels: Labels) -> str:
    return ",".join(f'{key}="{value.translate(_ESCAPES)}"' for key, value in labels.items())
