"""Measure the mean of A over a slow cable: ``python -m tests.support.measure_wire [MEGABITS ...]``.

As root on Linux. For each rate, and without a limit, two processes on two nodes train a few rounds;
a line says what a round sent beside A, and how long the mean took beside A's bytes over the rate.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from pathlib import Path

from tests.support import cables, netns, runs, tiny

CLIENTS, ROUNDS = 8, 10


def line(folder: Path, rate: int | None) -> str:
    output = folder / f"at-{rate}"
    output.mkdir()
    short, long = (
        cables.settings(folder, output, CLIENTS, rounds, lora_rank=1024) for rounds in (1, ROUNDS)
    )
    with netns.two_nodes(output) as nodes:
        for node in nodes:
            if rate is not None:
                node.throttle(f"{rate}mbit")
        sent = cables.sent(nodes, output, [short, long])
    events = runs.rounds(output / long["output"]["name"])[1:]
    bytes_of_a = events[-1]["comm/uploaded_bytes"]
    most = max(of_long.since(of_short).sent for of_short, of_long in sent)
    share = most / (ROUNDS - 1) / bytes_of_a
    seconds = statistics.median(event["time/aggregate_seconds"] for event in events)
    least = "no limit" if rate is None else f"{8e-6 * bytes_of_a / rate:.3f} s"
    limit = "no limit" if rate is None else f"{rate} Mbit/s"
    return (
        f"{limit}: A has {bytes_of_a:,} bytes, a round sends {share:.4f} of them; "
        f"the mean takes {seconds:.3f} s, the bytes of A alone {least}\n"
    )


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny.save_model(folder / "model")
        tiny.save_rows(folder / "rows.jsonl", 80, kinds=4)
        for rate in [None, *map(int, sys.argv[1:])]:
            sys.stdout.write(line(folder, rate))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
