"""Chat: ``sfed chat ADAPTER [--prompt TEXT]`` talks to an adapter in the terminal.

What is typed goes into the prompt with which the adapter was trained. Without a terminal each line
of stdin gets one line in return.
"""

from __future__ import annotations

import argparse
import io
import math
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from sfed.files.names import GLOBAL
from sfed.storage import adapter_ref
from sfed.utils import command
from sfed.utils.command import count
from sfed.utils.errors import DataError, UserError
from sfed.utils.text import printable, some_of

if TYPE_CHECKING:
    from sfed.chat.answers import Answer
    from sfed.storage.adapter_ref import AdapterRef

_LAYOUT = "\n\t"


def _temperature(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 up")
    return value


def _parser() -> command.Parser:
    parser = command.Parser(
        prog="sfed chat",
        description="Talk to an adapter through the prompt with which it was trained; a classifier "
        "names the class of a text.",
        epilog="Where a prompt has several columns, a line is a JSON object of them. key=value: "
        "those of the sections model, data and backbone, such as backbone.trust_remote_code=true.",
    )
    add = parser.add_argument
    add("adapter", metavar="ADAPTER | RUN", type=Path, help="a folder of an adapter, or a run")
    add("settings", metavar="key=value", nargs="*", help="over what the folder says")
    add("--client", metavar="NAME", help="a client of a run [global, or the only one]")
    add("--prompt", metavar="TEXT", help="answer this one, then end")
    add("--max-new-tokens", metavar="N", type=count, default=256, help="of an answer [256]")
    add(
        "--temperature",
        metavar="T",
        type=_temperature,
        default=0.0,
        help="0 = always the likeliest token [0]",
    )
    return parser


def main(arguments: Sequence[str]) -> None:
    """Check the arguments, load the adapter, answer."""
    given = _parser().parse_intermixed_args(list(arguments))
    for override in given.settings:
        if "=" not in override:
            raise UserError(f"{override!r}: after the adapter come key=value; see sfed chat --help")
    found = adapter_ref.find_adapters(given.adapter)
    folder = _one(adapter_ref.choose(found, [given.client] if given.client else [])).folder
    command.tell("loading PyTorch and transformers ...")
    from sfed.chat import answers
    from sfed.federated.loaded import on_backbone, spec_of
    from sfed.storage import adapter_source

    spec = spec_of(folder)
    config = adapter_source.config_for(folder, spec.base_name, given.settings)
    decoding = answers.Decoding(given.max_new_tokens, given.temperature)
    is_terminal = given.prompt is None and sys.stdin.isatty()
    command.tell(f"loading {config.model.name} with {folder} ...")
    with on_backbone(config, spec, [folder]) as loaded:
        answer = answers.answerer(loaded, folder, decoding, keeps_turns=is_terminal)
        if given.prompt is not None:
            sys.stdout.write(f"{printable(answer(_whole(given.prompt)), keep=_LAYOUT)}\n")
        elif is_terminal:
            with suppress(KeyboardInterrupt):
                _talk(answer)
            sys.stdout.write("\n")
        else:
            _answer_lines(answer)


def _one(chosen: Sequence[AdapterRef]) -> AdapterRef:
    """The global adapter of several, or the only one."""
    for one in chosen:
        if len(chosen) == 1 or one.folder.name == GLOBAL:
            return one
    names = some_of([one.folder.name for one in chosen])
    raise UserError(f"there are {len(chosen)} adapters ({names}); name one with --client")


def _talk(answer: Answer) -> None:
    """Answer what is typed until Ctrl-D or Ctrl-C."""
    with suppress(ImportError):
        import readline  # noqa: F401  (lines can be edited)
    command.tell("Ctrl-D ends")
    while True:
        try:
            line = _whole(input("> ")).strip()
        except EOFError:
            return
        if not line:
            continue
        try:
            sys.stdout.write(f"{printable(answer(line), keep=_LAYOUT)}\n")
        except DataError as mistake:
            command.tell(str(mistake))


def _answer_lines(answer: Answer) -> None:
    """Answer each line of stdin by one line; line breaks within an answer are written out.

    Raises:
        DataError: naming the line that cannot be answered.
    """
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    for number, line in enumerate(sys.stdin, start=1):
        try:
            text = answer(_whole(line).strip())
        except DataError as mistake:
            raise DataError(f"line {number}: {mistake}") from None
        sys.stdout.write(f"{printable(text)}\n")
        sys.stdout.flush()


def _whole(text: str) -> str:
    """A text without halves of surrogate pairs, which stand for bytes that are no UTF-8."""
    return text.encode("utf-8", "replace").decode()


if __name__ == "__main__":
    command.run_command(main)
