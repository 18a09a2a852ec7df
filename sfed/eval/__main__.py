"""Evaluate: ``sfed eval RUN|ADAPTER data.eval_files=FILE [--client NAME ...] [key=value ...]``.

Scores adapters on new data as the run scored them on its held-out data, beside the base model.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sfed.storage import adapter_ref
from sfed.utils import command
from sfed.utils.errors import UserError
from sfed.utils.redaction import mask
from sfed.utils.text import counted, printable

_SETTING = re.compile(r"[a-z_]+\.\w+=")
"""What is no name of a client, though it stands behind --client."""
_FIXED = ("partition.", "federated.", "lora.", "train.", "output.")
"""Sections of keys that say how adapters are trained."""


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="sfed eval",
        description="Score adapters on new data, beside their base model.",
        epilog="key=value: those of the sections model, data, backbone and evaluation, such as "
        "data.max_eval_examples=500 or evaluation.generate=true; see sfed train --help. What is "
        "not given is as in training.",
    )
    add = parser.add_argument
    add("adapters", metavar="RUN | ADAPTER", type=Path, help="a run, or a folder of an adapter")
    add("settings", metavar="key=value", nargs="*", help="data.eval_files=FILE, and others")
    add(
        "--client",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="clients, by name, adapter folder or number; global = the global adapter [all]",
    )
    parser.add_json("write everything here")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, load the base model and the adapters, score, show."""
    given = _parser().parse_intermixed_args(list(arguments))
    names = [name for name in given.client if not _SETTING.match(name)]
    settings = [*given.settings, *(name for name in given.client if _SETTING.match(name))]
    for override in settings:
        if "=" not in override or override.startswith(_FIXED):
            raise UserError(
                f"{override!r}: after the run or adapter come key=value of the sections model, "
                "data, backbone and evaluation"
            )
        if override.startswith("evaluation.clients="):
            raise UserError(f"{override}: all adapters that are named are scored; remove it")
    command.check_json(given.json)
    chosen = adapter_ref.choose(adapter_ref.find_adapters(given.adapters), names)
    command.tell("loading PyTorch and transformers ...")
    from sfed.eval import scores
    from sfed.federated import loaded as loading
    from sfed.federated.loaded import spec_of
    from sfed.files.listing import files_of
    from sfed.storage import adapter_source

    folders = [one.folder for one in chosen]
    spec = loading.same_spec(folders, [spec_of(folder) for folder in folders])
    asked = ["evaluation.adapters=[personal]", "data.packing=false"]
    config = adapter_source.config_for(folders[0], spec.base_name, [*settings, *asked])
    if config.data.eval_files is None and config.data.task != "demo":
        raise UserError("name the rows to score: data.eval_files=FILE")
    files_of(config, "eval")
    command.tell(f"loading {config.model.name} ...")
    with loading.on_backbone(config, spec, folders) as loaded:
        command.tell(f"scoring {counted(len(chosen), 'adapter')} and the base model ...")
        results = scores.measure(loaded, [one.title for one in chosen])
    _show(results)
    command.write_json(given.json, results)


def _show(results: Mapping[str, Any]) -> None:
    """Print a line for each adapter, and how its loss differs from the base model's."""
    from rich.console import Console
    from rich.table import Table

    from sfed.observability.console import print_table

    for note in results["notes"]:
        command.tell(f"warning: {note}")
    base = results["adapters"][0]["loss"]
    extra = [name for name in ("perplexity", *results["scores"]) if name in results["adapters"][0]]
    # Not as the title of the table, which breaks lines at the table's width.
    sys.stdout.write(
        f"held-out examples: {results['examples']:,}; losses in {results['loss_unit']}\n"
    )
    table = Table()
    table.add_column("adapter")
    for column in ("loss", "change", *(name.replace("_", " ") for name in extra)):
        table.add_column(column, justify="right")
    for entry in results["adapters"]:
        loss = entry["loss"]
        change = "" if entry is results["adapters"][0] or not base else f"{loss / base - 1:+.1%}"
        values = [f"{loss:.4f}", change, *(_number(entry[name]) for name in extra)]
        table.add_row(printable(mask(entry["name"])), *values)
    print_table(Console(file=sys.stdout, highlight=False, markup=False, emoji=False), table)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    command.run_command(main)
