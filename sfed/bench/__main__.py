"""Bench: ``python -m sfed.bench`` measures the trainer beside stock PEFT, in one run, in turns.

Five ways to make the same step of every client: (a) HF + PEFT as users write it, (b) the same with
adapters in the backbone's dtype, (c) sfed with one client after another, (d) sfed with all clients
in one pass, (e) the frozen model alone, the floor. Random weights and tokens; no download. Under
torchrun ``--collectives`` measures the links among the job's own processes, and ``--scaling`` whole
rounds on them. ``--against`` measures whole rounds on rows of unequal length beside a lean loop and
HF's Trainer, each in a process of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfed.bench import scaling_tables
from sfed.bench.tables import show, show_clients
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.launcher import launch

MODELS = ("llama2-7b", "tinyllama", "llama-30m", "stories", "tiny")
_CLIENTS_PER_PASS = 32  # of --scaling-clients
AGAINST = ("lean", "trainer")
TASKS = ("text", "gsm8k", "alpaca")
_ONLY_AGAINST = ("passes", "steps", "data", "task")
_KINDS = {"data": "file", "model": "folder"}
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


def _names(text: str) -> tuple[str, ...]:
    names = tuple(dict.fromkeys(text.split(",")))
    if unknown := [name for name in names if name not in AGAINST]:
        raise argparse.ArgumentTypeError(f"{unknown[0]!r} is none of {', '.join(AGAINST)}")
    return names


def _passes(text: str) -> tuple[str, ...]:
    given = dict.fromkeys(text.split(","))
    return tuple(one if one in ("auto", "all") else str(command.count(one)) for one in given)


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="python -m sfed.bench",
        description="Measure sfed beside HF + PEFT, in turns, on random weights of a given shape.",
    )
    _add_step(parser)
    _add_against(parser.add_argument_group("whole rounds beside other loops"))
    _add_scaling(parser.add_argument_group("several processes, many clients"))
    return parser


def _add_step(parser: command.Parser) -> None:
    """What is in a step, and how often it is measured."""
    add = parser.add_argument
    model = parser.add_mutually_exclusive_group()
    model.add_argument(
        "--model",
        default="llama-30m",
        help=f"shape: {', '.join(MODELS)}; with --data the folder of a model [llama-30m]",
    )
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


def _add_against(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add(
        "--against",
        metavar="NAMES",
        type=_names,
        help=f"whole rounds beside other loops: {', '.join(AGAINST)}",
    )
    add(
        "--passes",
        metavar="LIST",
        type=_passes,
        help="with --against: values of federated.clients_per_pass [auto,1,8,all]",
    )
    add("--steps", metavar="n", type=command.count, help="with --against: steps of a round [10]")
    add(
        "--data",
        metavar="FILE",
        type=Path,
        help="with --against: real examples, of at most T tokens, and not random ones",
    )
    add("--task", choices=TASKS, help="form of these examples, as data.task [text]")


def _add_scaling(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
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


def _check(options: argparse.Namespace) -> None:
    """Refuse what cannot work, before anything heavy is imported."""
    if options.tokens < 2:
        raise UserError("--tokens 1: the first token of a row is never predicted; give at least 2")
    if options.collectives and launch().size < 2:
        raise UserError(
            "--collectives needs at least two processes: torchrun --nproc_per_node 2 -m sfed.bench "
            "--collectives"
        )
    _check_against(options)
    asked = {
        "--against": options.against,
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


def _check_against(options: argparse.Namespace) -> None:
    """Refuse options that only ``--against`` has, and a model that is neither shape nor folder."""
    given = [name for name in _ONLY_AGAINST if getattr(options, name) is not None]
    if given and not options.against:
        raise UserError(f"--{given[0]} belongs to --against lean,trainer")
    if options.against and launch().size > 1:
        raise UserError("--against measures on one process: start it without a launcher")
    if options.data is None:
        if options.model not in MODELS:
            raise UserError(
                f"--model {options.model}: say {', '.join(MODELS)}, --model-config FOLDER for "
                "another shape, or the folder of a model with --against and --data FILE"
            )
        return
    if options.model_config is not None or options.layers is not None:
        raise UserError("--data: real examples need a whole model; give its folder as --model")
    for name, is_there in (("data", Path.is_file), ("model", Path.is_dir)):
        path = Path(getattr(options, name))
        if not is_there(path):
            raise UserError(f"--{name} {path}: there is no such {_KINDS[name]}")


def _against(given: argparse.Namespace) -> dict[str, Any]:
    """Measure whole rounds."""
    from sfed.bench.against import contest, job  # torch and all that is behind it

    per_pass = given.passes or ("auto", "1", "8", "all")
    return contest.run(
        contest.Contest(
            job=job.job_of(vars(given)),
            against=given.against,
            passes=tuple(
                one for one in per_pass if not one.isdecimal() or int(one) <= given.clients
            ),
            repeat=given.repeat,
            budget_seconds=given.seconds,
        )
    )


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
    if given.against:
        results = _against(given)
        show(results)
        command.write_json(given.json, results)
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
