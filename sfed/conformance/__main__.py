"""Conformance: ``sfed conformance FILE.py:FUNCTION --method fedsa``: is it what it says it is?

Exit codes: 0 the function is the method, 1 it is not, 2 an error.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from sfed.config import own_method
from sfed.conformance.definitions import DEFINITIONS
from sfed.conformance.verdict import Verdict, examine
from sfed.methods.own import load_named
from sfed.utils import command
from sfed.utils.errors import UserError

_DIFFERS = 1


def _parser() -> command.Parser:
    rules = "\n".join(f"  {one.name:<9} {one.rule} ({one.source})" for one in DEFINITIONS.values())
    parser = command.Parser(
        prog="python -m sfed.conformance",
        description="Try an aggregation function of yours on worked cases, and name the class of "
        "bug that it shows. FUNCTION(states, weights, scaling) gets a list of state dicts "
        "(LAYER.lora_A.weight, LAYER.lora_B.weight), the weights of the clients and the factor s "
        "of B A; it may take the first one or two only. It returns one dict for all clients or a "
        "list with one for each, and, where frozen weights change, a pair of that and a dict "
        "LAYER -> change. The code of the file is run.",
        epilog=f"methods:\n{rules}\n\nExit codes: 0 it is the method, 1 it is not, 2 an error.",
    )
    parser.add_argument("function", metavar="FILE.py:FUNCTION", help="or package.module:FUNCTION")
    parser.add_argument("--method", choices=tuple(DEFINITIONS), required=True, help="what it is")
    parser.add_json("write the findings here")
    return parser


def main(arguments: Sequence[str]) -> None:
    """Examine, say what was found; exit code 1 where the function is not the method."""
    options = _parser().parse_args(list(arguments))
    command.check_json(options.json)
    if not own_method.is_own(options.function):
        raise UserError(f"{options.function}: write FILE.py:FUNCTION or package.module:FUNCTION")
    function = load_named(options.function, "FILE.py:FUNCTION")
    if not callable(function):
        raise UserError(f"{options.function}: it is a {type(function).__name__}, not a function")
    verdict = examine(function, DEFINITIONS[options.method])
    sys.stdout.writelines(f"{line}\n" for line in _lines(options.function, verdict))
    command.write_json(options.json, _as_data(verdict))
    if not verdict.conforms:
        sys.exit(_DIFFERS)


def _lines(name: str, verdict: Verdict) -> Iterator[str]:
    width = max(len(finding.case) for finding in verdict.findings)
    for found in verdict.findings:
        what = f"differs by {found.difference:.2g}: {found.place}" if found.place else "as defined"
        yield f"  {found.case:<{width}}  {what}"
    for effect in verdict.side_effects:
        yield f"side effect: {effect}"
    for bug in verdict.bugs:
        yield f"bug: {bug.name} ({bug.meaning})"
    if verdict.conforms:
        yield f"{name} is {verdict.method}, as far as these cases show"
        return
    if any(found.place for found in verdict.findings) and not verdict.bugs:
        yield "bug: none of the known classes explains it alone"
    rule = DEFINITIONS[verdict.method].rule
    yield f"{name} is not {verdict.method}: {rule}"


def _as_data(verdict: Verdict) -> dict[str, Any]:
    return {
        "method": verdict.method,
        "conforms": verdict.conforms,
        "bugs": [bug.name for bug in verdict.bugs],
        "side_effects": list(verdict.side_effects),
        "findings": [vars(finding) for finding in verdict.findings],
    }


if __name__ == "__main__":
    command.run_command(main)
