"""What a person sees of a plan. Needs no torch."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from sfed.utils.text import counted, size_text

Json = Mapping[str, Any]


def show(results: Json) -> None:
    """Print a plan."""
    console = Console(file=sys.stdout, highlight=False, markup=False, emoji=False)

    def say(line: str) -> None:
        console.print(line, markup=False, soft_wrap=True)

    for line in _heading(results):
        say(line)
    console.print(_memory(results))
    for line in (*_verdict(results), *_round(results)):
        say(line)


def _heading(results: Json) -> list[str]:
    work, targets = results["work"], results["targets"]
    adapted = targets if isinstance(targets, str) else ", ".join(targets)
    return [
        f"model    {results['model']}, {results['weights']:,} weights; r = {results['lora_rank']}"
        f"{' (the largest)' if results['mixed_ranks'] else ''}, "
        f"{adapted}: {results['adapter_numbers']:,} parameters per client",
        f"run      {counted(results['num_clients'], 'client')} on "
        f"{counted(results['gpus'], 'GPU')} of {size_text(results['gpu_memory_bytes'])}, up to "
        f"{work['own_clients']} on each"
        + (", where they have equal work" if results["num_clients"] > results["gpus"] else ""),
        f"pass     {counted(results['clients_per_pass'], 'client')} x "
        f"{counted(work['train_rows'], 'row')} x up to {work['tokens']} tokens",
        f"backbone {results['sharding']['kind']} ({results['sharding']['reason']})",
    ]


def _memory(results: Json) -> Table:
    needs = results["needs"]
    kept = f"{results['kept_per_token_and_layer']:,.0f} bytes per token and layer"
    parts = [
        ("driver, kernels, NCCL", results["context_bytes"], "assumed"),
        ("backbone", results["backbone_bytes"], results["sharding"]["kind"]),
        ("backbone, gathered layers", results["gathered_bytes"], ""),
        ("adapters: values", needs["values"], ""),
        ("adapters: moments", needs["moments"], ""),
        ("adapters: gradients", needs["gradients"], ""),
        ("adapters: the round's start", needs["round_start"], ""),
        ("pass: copies of A and B", needs["copies"], "in the backbone's dtype"),
        ("pass: kept for backward", needs["activations"], kept),
        ("pass: transient buffers", max(needs["logits"], needs["transient"]), ""),
        ("or the optimizer's step", needs["optimizer"], "in place of the pass"),
        ("or evaluation", needs["evaluation"], "in place of the pass"),
        ("or writing answers", needs["writing"], "in place of the pass"),
        ("gaps of the allocator", results["spare_for_gaps_bytes"], "assumed: 10 %"),
    ]
    table = Table(title="memory of a GPU that holds most clients", title_justify="left")
    table.add_column("part")
    table.add_column("size", justify="right")
    table.add_column("")
    for name, num_bytes, note in parts:
        if num_bytes >= 2**16:
            table.add_row(name, size_text(num_bytes), note)
    table.add_section()
    table.add_row(
        "needed", size_text(results["needed_bytes"]), "of " + size_text(results["gpu_memory_bytes"])
    )
    return table


def _verdict(results: Json) -> list[str]:
    auto = results["auto_clients_per_pass"]
    if results["fits"]:
        return [
            f"It fits. At most {results['most_clients_per_pass']:,} clients would fit into a pass; "
            f"or {results['most_rows_per_client_and_pass']:,} rows of a client with "
            f"{results['clients_per_pass']} of them.",
            *([_auto(auto)] if auto else []),
        ]
    lines = [f"It does not fit: GPUs of {size_text(results['needed_bytes'])} would do."]
    if results["remedies"]:
        return [*lines, "Or change one of these:", *(f"  {one}" for one in results["remedies"])]
    return [*lines, "No setting alone or with others makes it fit: take more or larger GPUs."]


def _auto(found: Json) -> str:
    """How many clients would share a pass, and how fast that is, in words."""
    return (
        f"Were all rows of {found['tokens_per_row']} tokens, "
        f"{counted(found['clients_per_pass'], 'client')} would share a pass: {found['reason']}. "
        "A run goes by its own rows and says so at its start (federated.clients_per_pass=auto)."
    )


def _round(results: Json) -> list[str]:
    one, upload = results["round"], results["upload"]
    promised = one["datasheet_flops_per_second"] / 1e12
    rate = f"{100 * one['used_share']:.0f} % of {promised:,.0f} TFLOP/s"
    if one["tokens_per_second"] is not None:
        rate = f"{one['tokens_per_second']:,.0f} tokens/s"
    gather = ""
    if one["gather_seconds_per_pass"]:
        hidden = one["gather_seconds_per_pass"] <= one["compute_seconds_per_pass"]
        gather = f", gathering weights {one['gather_seconds_per_pass']:.3f} s" + (
            " (hidden behind it)" if hidden else " (which it waits for)"
        )
    whole = "the number of steps depends on the data (train.local_epochs)"
    if one["seconds"] is not None:
        whole = f"a round of {one['steps']} steps {one['seconds']:,.2f} s, without evaluation"
    return [
        f"sends    {sent(upload)}: {upload['bytes']:,} bytes per "
        f"process and round, {1e3 * one['mean_seconds']:.2f} ms over {one['link']}",
        f"time     {whole}: a pass {one['compute_seconds_per_pass']:.3f} s{gather}, "
        f"{one['passes_per_step']} passes a step; assuming {rate}, rows of {one['tokens_per_row']} "
        f"tokens, {one['link_bytes_per_second'] / 1e9:.1f} GB/s",
        f"host     {size_text(results['host_bytes'])} a process for what rests there; a checkpoint "
        f"has at most {size_text(results['checkpoint_bytes'])}",
    ]


def sent(upload: Json) -> str:
    """What a round sends, in words."""
    factors = " and ".join(upload["factors"]) or "nothing"
    return factors + (", and changes of the frozen weights" if upload["changes_weights"] else "")
