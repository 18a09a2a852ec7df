"""Export: ``sfed export RUN [--round K] [--client NAME ... | --global] [--merge] [--out DIR]``.

Writes adapters of any checkpointed round as PEFT folders with a model card, or merged into the base
model as a folder for stock transformers. One process, which needs neither the data nor a GPU.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from sfed.export import hub
from sfed.export.checkpoints import checkpoint_after
from sfed.storage.run_record import open_run
from sfed.utils import command
from sfed.utils.command import count
from sfed.utils.errors import UserError
from sfed.utils.text import some_of

if TYPE_CHECKING:
    from sfed.export.folders import Chosen


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="sfed export",
        description="Write adapters of a run as PEFT folders with a model card, or merged into the "
        "base model.",
        epilog="Without --client and --global: every client, and the global adapter where the run "
        "evaluated it.",
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="a run folder, such as runs/demo")
    add("--round", metavar="K", type=count, help="a checkpointed round [the newest]")
    add(
        "--client",
        metavar="NAME",
        nargs="+",
        action="extend",
        default=[],
        help="clients, by name, adapter folder or number",
    )
    add("--global", dest="with_global", action="store_true", help="the global adapter")
    add("--merge", action="store_true", help="write the base model with the adapter in it")
    add("--out", metavar="DIR", type=Path, help="parent folder [RUN/export/round-K]")
    add(
        "--push-to-hub",
        metavar="ORG/NAME",
        help="push the one adapter that is chosen to a repository, private where it is new",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, read the checkpoint, write a folder for each adapter."""
    given = _parser().parse_args(list(arguments))
    record = open_run(given.run)
    checkpoint = checkpoint_after(given.run, given.round)
    for name in given.client:
        record.client_named(name)
    if given.push_to_hub:
        hub.check_name(given.push_to_hub)
    warnings.simplefilter("ignore")
    command.tell("loading PyTorch and transformers ...")
    from sfed.export import folders, source
    from sfed.lora.card import is_hub_id
    from sfed.observability.third_party import quieten

    quieten(0, "cpu", to_stderr=True)
    found = source.read(record, checkpoint)
    chosen = folders.choose(found, given.client, with_global=given.with_global)
    _require_one(given, chosen)
    kind = "merged" if given.merge else "round"
    out = given.out or given.run / "export" / f"{kind}-{found.finished_rounds:06d}"
    _refuse_existing([out / one.name for one in chosen])
    for one in chosen:
        command.tell(f"{'merging' if given.merge else 'writing'} {one.name} ...")
        folders.write(found, one, out / one.name, is_merged=given.merge)
        what = "model" if given.merge else "adapter"
        sys.stdout.write(f"{what:<8} {out / one.name}\n")
    if given.push_to_hub:
        command.tell(f"pushing to {given.push_to_hub} ...")
        sys.stdout.write(f"pushed   {hub.push(out / chosen[0].name, given.push_to_hub)}\n")
        if not given.merge and not is_hub_id(found.base):
            _warn_of_local_base(found.base)


def _warn_of_local_base(base: str) -> None:
    command.say_error(
        f"warning: the base model {base} is a folder of this machine; others can load the adapter "
        "once base_model_name_or_path in adapter_config.json names a model of the hub"
    )


def _require_one(given: argparse.Namespace, chosen: Sequence[Chosen]) -> None:
    """Refuse to push several adapters to one repository, or to write a model for every client."""
    options = {"--push-to-hub": given.push_to_hub, "--merge": given.merge}
    asked = [option for option, value in options.items() if value]
    is_named = bool(given.client or given.with_global)
    if len(chosen) == 1 or not asked or (is_named and asked == ["--merge"]):
        return
    names = some_of([one.name for one in chosen])
    raise UserError(
        f"{asked[0]}: {len(chosen)} adapters are chosen ({names}); name one with --client NAME or "
        "--global"
    )


def _refuse_existing(targets: Sequence[Path]) -> None:
    there = [target for target in targets if target.exists()]
    if there:
        raise UserError(
            f"--out: {there[0]} exists, and nothing is overwritten; remove it, or name another "
            "folder with --out"
        )


if __name__ == "__main__":
    command.run_command(main)
