"""What a person sees of a bench: tables of its results. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from sfed.bench import scaling_tables
from sfed.bench.against import tables as against_tables
from sfed.utils.text import size_text

_STEPS_OF_A_ROUND = 10
_WIDEST = 1000

Json = Mapping[str, Any]


def show(results: Json) -> None:
    """Print the tables that these results have."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    for line in _heading(results):
        console.print(line, markup=False, soft_wrap=True)
    _print(console, _tables(results))
    for note in (*_explanations(results), *results["notes"]):
        console.print(note, markup=False, soft_wrap=True)


def show_clients(results: Json) -> None:
    """Print the tables of runs against the number of clients."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)
    for line in _machine(results["machine"]):
        console.print(line, markup=False, soft_wrap=True)
    _print(console, scaling_tables.clients_tables(results["points"]))
    if results["cohort"] is not None:
        console.print(f"{results['cohort']} clients train and are evaluated in the round")
    for note in scaling_tables.CLIENTS_EXPLANATIONS:
        console.print(note, markup=False, soft_wrap=True)


def _print(console: Console, tables: Iterable[Table]) -> None:
    for table in tables:
        if not console.is_terminal:  # nothing bounds a file
            console.width = _WIDEST
            console.width = console.measure(table).maximum
        console.print(table)


def _tables(results: Json) -> Sequence[Table]:
    """The tables of what was measured."""
    if "variants" in results:
        return [_speed(results), _memory(results), _ratios(results), _parts(results)]
    if "compare" in results:
        return [_comparison(results["compare"])]
    if "against" in results:
        return [against_tables.table(results["against"])]
    if "scaling" in results:
        return scaling_tables.tables(results["scaling"])
    return [_collectives(results["collectives"])]


def _heading(results: Json) -> list[str]:
    machine, asked = results["machine"], results["configuration"]
    shape = asked["shape"]
    name = asked["model_folder"] or asked["model"]
    targets = asked["target_modules"]
    adapters = f"r = {asked['lora_rank']}, "
    adapters += targets if isinstance(targets, str) else ", ".join(targets)
    clients = f"{asked['rows']} rows x {asked['tokens']} tokens of each of "
    clients += f"{asked['num_clients']} clients"
    clients = asked.get("about_rows", clients)
    return [
        *_machine(machine),
        f"model    {name}, {shape['num_hidden_layers']} x {shape['hidden_size']}, "
        f"{asked['dtype']}; {adapters}: A has {asked['a_bytes']:,} bytes",
        *([] if "collectives" in results else [f"step     {clients}"]),
    ]


def _machine(machine: Json) -> list[str]:
    versions = "  ".join(f"{name} {number}" for name, number in machine["versions"].items())
    return [
        f"machine  {machine['device']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{size_text(machine['memory_bytes'], 2)} of memory, {machine['processes']} processes; "
        f"load {machine['load_average']:.1f} at the start",
        f"versions {versions}",
    ]


def _speed(results: Json) -> Table:
    table = _table("a step of every client: forward, backward, optimizer")
    table.add_column("")
    table.add_column("variant")
    for column in ("passes", "ms/step", "min..max", "tokens/s", "MFU"):
        table.add_column(column, justify="right")
    has_datasheet = results["matmul"]["datasheet_flops_per_second"] is not None
    if has_datasheet:
        table.add_column("of datasheet", justify="right")
    for key, one in results["variants"].items():
        seconds = one["seconds_per_step"]
        cells = [
            key,
            one["name"],
            str(one["passes_per_step"]),
            _ms(seconds["median"]),
            _range(seconds),
            f"{one['tokens_per_second']:,.0f}",
            f"{100 * one['mfu_of_measured_matmul']:.0f} %",
        ]
        cells += [f"{100 * one['mfu_of_datasheet']:.0f} %"] if has_datasheet else []
        table.add_row(*cells)
    return table


def _memory(results: Json) -> Table:
    table = _table("memory and operations")
    table.add_column("")
    has_peak = any(one["peak_bytes"] is not None for one in results["variants"].values())
    columns = ["bytes kept per token and layer", "per client and layer", "by a pass"]
    columns += ["peak of the device"] if has_peak else []
    columns += ["operations per layer and pass", "per layer and step"]
    for column in columns:
        table.add_column(column, justify="right")
    for key, one in results["variants"].items():
        cells = [
            key,
            f"{one['saved_bytes_per_token_and_layer']:,.0f}",
            f"{one['saved_bytes_per_client_and_layer']:,.0f}",
            size_text(one["saved_bytes_of_pass"], 2),
        ]
        cells += [size_text(one["peak_bytes"], 2)] if has_peak else []
        operations = one["operations_per_layer"]
        cells += [f"{operations:,}", f"{operations * one['passes_per_step']:,}"]
        table.add_row(*cells)
    return table


def _ratios(results: Json) -> Table:
    table = _table("how many times as fast")
    table.add_column("")
    for column in ("median", "min..max"):
        table.add_column(column, justify="right")
    for pair, ratio in results["ratios"].items():
        slow, fast = pair.split("/")
        table.add_row(
            f"{fast} as {slow}",
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f}..{ratio['max']:.2f}",
        )
    return table


def _parts(results: Json) -> Table:
    steps = _STEPS_OF_A_ROUND
    table = _table(f"parts of a round of {steps} steps, all clients of this process")
    table.add_column("")
    table.add_column("part")
    for column in ("times", "ms each", "min..max", "of the steps"):
        table.add_column(column, justify="right")
    for part in results["parts"]:
        whole = steps * results["variants"][part["variant"]]["seconds_per_step"]["median"]
        times, seconds = steps if part["in_every_step"] else 1, part["seconds"]
        table.add_row(
            part["variant"],
            part["name"],
            str(times),
            _ms(seconds["median"]),
            _range(seconds),
            f"{100 * times * seconds['median'] / whole:.1f} %",
        )
    return table


def _comparison(compared: Json) -> Table:
    what = "clients" if compared["varied"] == "clients" else "LoRA rank"
    table = _table(f"cost of a step against {what}")
    table.add_column(what, justify="right")
    names = {"a": "a PEFT", "c": "c one by one", "d": "d one pass"}
    for name in names.values():
        table.add_column(f"{name} ms", justify="right")
    table.add_column("d as a", justify="right")
    table.add_column("min..max", justify="right")
    for point in compared["points"]:
        ratio = point["ratios"]["a/d"]
        medians = [point["variants"][key]["seconds_per_step"]["median"] for key in names]
        table.add_row(
            str(point["value"]),
            *map(_ms, medians),
            f"{ratio['median']:.2f}",
            f"{ratio['min']:.2f}..{ratio['max']:.2f}",
        )
    if compared["slopes"]:
        slopes = (f"{compared['slopes'][key]:.2f}" for key in names)
        table.add_section()
        table.add_row("slope", *slopes, "", "")
    return table


def _collectives(found: list[dict[str, Any]]) -> Table:
    table = _table("collectives of this job's processes")
    table.add_column("kind")
    for column in ("bytes", "ms", "min..max", "MB/s on the bus"):
        table.add_column(column, justify="right")
    for one in found:
        seconds = one["seconds"]
        table.add_row(
            one["kind"] + (" of A" if one["is_a_of_a_round"] else ""),
            f"{one['bytes']:,}",
            _ms(seconds["median"]),
            _range(seconds),
            f"{one['bus_bytes_per_second'] / 1e6:,.0f}",
        )
    return table


def _explanations(results: Json) -> list[str]:
    """How to read the tables."""
    if "variants" in results:
        rate = results["matmul"]["flops_per_second"]
        count = next(iter(results["variants"].values()))["seconds_per_step"]["count"]
        return [
            f"median of {count} turns, a b c d e in each; ratios are taken turn by turn.",
            f"MFU: 4 FLOPs per token and matmul weight, of {rate['median'] / 1e12:,.3f} TFLOP/s "
            f"({rate['min'] / 1e12:,.3f} .. {rate['max'] / 1e12:,.3f}) that a large matrix product "
            "reached in the same turns.",
            "bytes kept: unique storages that autograd saves, frozen weights excluded; "
            "operations: dispatched to the device, forward and backward, views excluded. Both are "
            "counted, not timed.",
            "of the steps: beside the variant's own steps, which hold the optimizer and nothing "
            "else of these parts. Steps of many widths are in place of them: for as many computed "
            "tokens, 100 % where new shapes and masks cost nothing.",
        ]
    if "compare" in results:
        return [
            "medians; d as a: how many times as fast, turn by turn.",
            "slope: log-log, over all values; 1 = in proportion, 0 = free.",
        ]
    if "against" in results:
        return [*against_tables.notes(results["against"]), *against_tables.EXPLANATIONS]
    if "scaling" in results:
        return list(scaling_tables.EXPLANATIONS)
    return [
        "bus: what each link must carry a second, 2 (W - 1) / W of the bytes for all_reduce and "
        "(W - 1) / W for all_gather."
    ]


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left")


def _ms(seconds: float) -> str:
    """Milliseconds with three digits that matter."""
    ms = 1e3 * seconds
    decimals = 0 if ms >= 100 else 1 if ms >= 10 else 2
    return f"{ms:,.{decimals}f}"


def _range(spread: Json) -> str:
    """Lowest and highest, on one line."""
    return f"{_ms(spread['min'])}..{_ms(spread['max'])}"
