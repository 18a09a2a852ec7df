"""The command ``sfed``: ``sfed train``, ``sfed report`` and others, also as ``python -m sfed``.

Each command is a module with a ``main`` of its own, which ``python -m sfed.train`` runs too. Only
the module of the command that is asked for is imported, so ``sfed --help`` loads no torch.
"""

from __future__ import annotations

import difflib
import importlib
import sys
from collections.abc import Sequence

from sfed.utils import command, versions
from sfed.utils.errors import UserError

# Name of a command -> its module, and what it does.
COMMANDS = {
    "train": ("sfed.train", "train a configuration; without one, the demo"),
    "sweep": ("sfed.sweep.__main__", "train every configuration of a grid and compare them"),
    "report": ("sfed.report.__main__", "turn run folders into one HTML page"),
    "export": ("sfed.export.__main__", "write adapters of a round, or a merged model"),
    "eval": ("sfed.eval.__main__", "score adapters on new data"),
    "chat": ("sfed.chat.__main__", "talk to an adapter in the terminal"),
    "plan": ("sfed.plan.__main__", "predict memory and time of a run; needs no GPU"),
    "bench": ("sfed.bench.__main__", "measure a training step beside stock PEFT"),
    "conformance": (
        "sfed.conformance.__main__",
        "is an aggregation function of yours the method that it says it is?",
    ),
    "doctor": (
        "sfed.doctor.__main__",
        "examine the machines of a job; first thing on a new cluster",
    ),
}
USAGE = f"""usage: sfed COMMAND [ARGUMENT ...]

Federated LoRA fine-tuning on GPU clusters.

commands:
{chr(10).join(f"  {name:<11} {text}" for name, (_, text) in COMMANDS.items())}

  sfed COMMAND --help   arguments of a command
  sfed --version        versions of sfed and of the libraries that it stands on

Several processes: torchrun --nproc_per_node 8 -m sfed.train [CONFIG.yaml] [key=value ...]
"""


def main(arguments: Sequence[str]) -> None:
    """Run the command that the first argument names.

    Raises:
        UserError: where there is no such command.
    """
    word, *rest = arguments or ["--help"]
    if word in ("-h", "--help"):
        sys.stdout.write(USAGE)
    elif word in ("-V", "--version"):
        lines = (f"{name} {version}\n" for name, version in versions.about().items())
        sys.stdout.writelines(lines)
    elif word in COMMANDS:
        importlib.import_module(COMMANDS[word][0]).main(rest)
    else:
        raise UserError(_unknown(word))


def _unknown(word: str) -> str:
    near = difflib.get_close_matches(word, COMMANDS, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return f"unknown command {word!r}; the commands are {', '.join(COMMANDS)}{hint}"


def run() -> None:
    """Run ``sfed`` with the arguments of this process; the console script calls it."""
    command.run_command(main)
    sys.exit(0)
