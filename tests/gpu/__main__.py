"""``python -m tests.gpu``: everything that is asked of a GPU, in at most ten minutes, as one JSON.

Run it from the root of the repository. It needs torch, transformers and PEFT and no network; what
needs DeepSpeed, datasets or pytest is skipped by name where they are missing. Without a GPU the
same steps run on the CPU, in small sizes. Exit codes: 0 every step that ran was ok, 1 one was not.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from tests.gpu import steps
from tests.gpu.runner import Runner


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.gpu", description=__doc__)
    add = parser.add_argument
    add("--json", type=Path, default=Path("gpu-report.json"), help="the report [gpu-report.json]")
    add("--minutes", type=float, default=10.0, help="begin no step after these [10]")
    add("--only", metavar="NAME,...", help="steps whose names begin so")
    add("--size", choices=("full", "small"), help="of models [full on a GPU, small on a CPU]")
    add("--list", action="store_true", help="print the names of the steps and end")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the steps; returns the exit code."""
    given = _parser().parse_args(list(arguments))
    if given.list:
        say("\n".join(step.name for step in steps.all_steps(full=True)))
        return 0
    start = time.monotonic()
    runner = Runner(given.json, 60.0 * given.minutes, say)
    runner.run([steps.hardware()])
    found = runner.report["steps"][0].get("figures") or {}
    full = given.size == "full" or (given.size is None and "name" in found)
    runner.report |= {"hardware": found, "size": "full" if full else "small"}
    prefixes = tuple(given.only.split(",")) if given.only else ("",)
    runner.run([step for step in steps.all_steps(full=full) if step.name.startswith(prefixes)])
    counts = {
        status: sum(step["status"] == status for step in runner.report["steps"])
        for status in ("ok", "failed", "timeout", "skipped")
    }
    runner.report |= {"summary": counts, "seconds": round(time.monotonic() - start, 1)}
    runner.write()
    told = ", ".join(f"{count} {status}" for status, count in counts.items())
    say(f"{told} in {runner.report['seconds']:.0f} s; {given.json}")
    return int(counts["failed"] + counts["timeout"] > 0)


def say(line: str) -> None:
    """Print a line at once."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
