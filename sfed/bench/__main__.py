"""Bench: ``python -m sfed.bench`` measures the trainer beside stock PEFT, in one run, in turns.

Five ways to make the same step of every client: (a) HF + PEFT as users write it, (b) the same with
adapters in the backbone's dtype, (c) sfed with one client after another, (d) sfed with all clients
in one pass, (e) the frozen model alone, the floor. Random weights and tokens; no download. Under
torchrun ``--collectives`` measures the links among the job's own processes, and ``--scaling`` whole
rounds on them.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from sfed.bench import scaling_tables
from sfed.bench.tables import show, show_clients
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch

MODELS = ("llama2-7b", "tinyllama", "llama-30m", "stories", "tiny")
_CLIENTS_PER_PASS = 32  # of --scaling-clients
_VALUES = {"clients": (1, 2, 4, 8, 16), "rank": (4, 16, 64, 256)}


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _compared(text: str) -> tuple[str, tuple[int, ...]]:
    what, _, listed = text.partition("=")
    if what not in _VALUES:
        raise argparse.ArgumentTypeError(
            f"{text!r}: say clients or rank, or values such as clients=1,2,4"
        )
    values = tuple(map(command.count, listed.split(","))) if listed else _VALUES[what]
    return what, tuple(sorted(set(values)))


def _counts(text: str) -> tuple[int, ...]:
    return tuple(sorted(set(map(command.count, text.split(",")))))


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m sfed.bench",
        description="Measure sfed beside HF + PEFT, in turns, on random weights of a given shape.",
    )
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument("--model", choices=MODELS, default="llama-30m", help="shape [llama-30m]")
    model.add_argument(
        "--model-config", metavar="FOLDER", type=Path, help="with the config.json of another shape"
    )
    add("--layers", metavar="K", type=command.count, help="so many layers of the shape [all]")
    add("--dtype", choices=("bf16", "fp32"), help="of the backbone [bf16 on a GPU, fp32 on a CPU]")
    add("--clients", metavar="C", type=command.count, default=8, help="clients [8]")
    add("--rows", metavar="B", type=command.count, default=1, help="rows of a client and step [1]")
    add("--tokens", metavar="T", type=command.count, default=128, help="tokens of a row [128]")
    add("--rank", metavar="r", type=command.count, default=16, help="LoRA rank [16]")
    add(
        "--targets",
        metavar="NAMES",
        default="all-linear",
        help="adapted layers: all-linear, or names such as q_proj,v_proj [all-linear]",
    )
    add("--repeat", metavar="n", type=command.count, default=7, help="counted turns [7]")
    add("--seconds", metavar="s", type=_seconds, help="begin no further turn after s seconds")
    parser.add_json("write everything here, every sample included")
    add(
        "--compare",
        metavar="WHAT",
        type=_compared,
        help="cost against clients or rank, such as clients=1,2,4,8 or rank=4,64",
    )
    add(
        "--collectives",
        action="store_true",
        help="measure all_reduce and all_gather among the processes of torchrun",
    )
    add(
        "--scaling",
        action="store_true",
        help="measure rounds on the processes of torchrun: C clients on each, and C on all",
    )
    add(
        "--scaling-clients",
        metavar="N,N,...",
        type=_counts,
        help="whole runs of the demo's model with so many clients on one process: CPU seconds of "
        "each part and peak memory, such as 64,512,4096",
    )
    add(
        "--cohort",
        metavar="C",
        type=command.count,
        help="with --scaling-clients: so many of the clients train and are evaluated [all]",
    )
    add(
        "--scaling-of",
        metavar="FILE",
        nargs="+",
        type=Path,
        help="measure nothing: show what --scaling --json of several jobs has written in one table",
    )
    return parser


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything heavy is imported."""
    if options.tokens < 2:
        raise UserError("--tokens 1: the first token of a row is never predicted; give at least 2")
    if options.collectives and launch().size < 2:
        raise UserError(
            "--collectives needs at least two processes: torchrun --nproc_per_node 2 -m sfed.bench "
            "--collectives"
        )
    asked = {
        "--collectives": options.collectives,
        "--compare": options.compare,
        "--scaling": options.scaling,
        "--scaling-of": options.scaling_of,
        "--scaling-clients": options.scaling_clients,
    }
    given = [name for name, value in asked.items() if value]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} exclude each other")
    if options.cohort and not options.scaling_clients:
        raise UserError("--cohort belongs to --scaling-clients; give it, such as 64,512,4096")
    if options.scaling_clients and launch().size > 1:
        raise UserError("--scaling-clients measures one process; start it without torchrun")
    command.check_json(options.json)


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, measure, show, write."""
    given = _parser().parse_args(list(arguments))
    _check(given)
    if given.scaling_of:
        results = scaling_tables.together(given.scaling_of)
        with scaling_tables.results_of(given.scaling_of):
            show(results)
        command.write_json(given.json, results)
        return
    if given.scaling_clients:
        from sfed.bench import scaling

        found = scaling.measure_clients(given.scaling_clients, _CLIENTS_PER_PASS, given.cohort)
        show_clients(found)
        command.write_json(given.json, found)
        return
    from sfed.bench import compare  # torch and all that is behind it

    varied, values = given.compare or (None, ())
    targets = given.targets
    results, is_main = compare.run(
        compare.Options(
            model=given.model,
            model_folder=given.model_config,
            num_layers=given.layers,
            dtype=given.dtype,
            num_clients=given.clients,
            rows=given.rows,
            tokens=given.tokens,
            lora_rank=given.rank,
            target_modules=targets if targets == "all-linear" else tuple(targets.split(",")),
            repeat=given.repeat,
            budget_seconds=given.seconds,
            collectives=given.collectives,
            scaling=given.scaling,
            compared=varied,
            compared_values=values,
        )
    )
    if is_main:
        show(results)
        command.write_json(given.json, results)


if __name__ == "__main__":
    command.run_command(main)
