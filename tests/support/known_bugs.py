"""Bugs that public code of federated LoRA has shown, each put into a copy of sfed on purpose.

    python -m tests.support.known_bugs [WORD ...]     all, or those whose name holds a WORD
    python -m tests.support.known_bugs --table        the table of docs/known-bugs.md

A bug is a replacement of one text of one file. It is caught where the named test fails with it.
"""

from __future__ import annotations

import argparse
import importlib
import os
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml


@dataclass(frozen=True)
class Bug:
    """One bug."""

    group: str
    name: str
    effect: str
    """On the numbers."""
    file: str
    old: str
    """Text that is once in the file."""
    new: str
    test: str
    """File::test of pytest, and perhaps, after a space, what -k selects of its cases."""
    conformance: str = ""
    """Name under which `sfed conformance` knows it in somebody else's function."""


ROOT = Path(__file__).resolve().parents[2]
BUGS = [
    Bug(**one)
    for one in yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
]
_NEEDED = ("sfed", "tests", "configs", "docs", "pyproject.toml", "README.md")
_IMPORTED_ONCE = ("torch", "transformers", "peft", "deepspeed", "datasets", "sklearn", "hypothesis")
"""For the tests of all bugs."""
_TESTS_FAILED = 1
"""Exit code of pytest where tests ran and one failed."""


def spoiled(bug: Bug, folder: Path) -> None:
    """Put a bug into the copy in this folder."""
    path = folder / bug.file
    text = path.read_text(encoding="utf-8")
    if text.count(bug.old) != 1:
        raise SystemExit(f"{bug.name}: its text is {text.count(bug.old)} times in {bug.file}")
    path.write_text(text.replace(bug.old, bug.new), encoding="utf-8")


def run_test(bug: Bug, folder: Path) -> None:
    """Run the test of a bug in the copy; in a process of its own, which ends with pytest's code."""
    os.chdir(folder)
    os.environ["PYTHONPATH"] = str(folder)
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    for name in [name for name in sys.modules if name.split(".")[0] in ("sfed", "tests")]:
        del sys.modules[name]
    with (folder / "log").open("w", encoding="utf-8") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    file, _, cases = bug.test.partition(" ")
    chosen = ["-k", cases] if cases else []
    always = ["-n", "0", "-x", "-q", "-p", "no:cacheprovider", "-m", "full or not full"]
    os._exit(int(pytest.main([*always, file, *chosen])))


def failures(bug: Bug, folder: Path) -> tuple[int, str]:
    """The exit code of the test of a bug, and what pytest says of it in the end."""
    child = os.fork()
    if child == 0:
        run_test(bug, folder)
    _, status = os.waitpid(child, 0)
    said = (folder / "log").read_text(encoding="utf-8").splitlines()
    failed = [line for line in said if line.startswith(("FAILED", "ERROR"))]
    return os.waitstatus_to_exitcode(status), (failed or said)[-1]


def attempt(bug: Bug) -> bool:
    """Whether the test of a bug fails with it; says so."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for needed in _NEEDED:
            source, ignored = ROOT / needed, shutil.ignore_patterns("__pycache__")
            if source.is_dir():
                shutil.copytree(source, folder / needed, ignore=ignored)
            else:
                shutil.copy(source, folder / needed)
        spoiled(bug, folder)
        code, said = failures(bug, folder)
    is_caught = code == _TESTS_FAILED
    verdict = "caught" if is_caught else f"NOT CAUGHT ({code})"
    sys.stdout.write(f"{verdict}: {bug.name}: {said}\n")
    sys.stdout.flush()
    return is_caught


def table() -> str:
    """The rows of docs/known-bugs.md, by group."""
    lines: list[str] = []
    for group in dict.fromkeys(bug.group for bug in BUGS):
        lines += ["", f"## {group}", "", "| bug | effect | test of sfed | `sfed conformance` |"]
        lines += ["|---|---|---|---|"]
        for bug in BUGS:
            if bug.group == group:
                test = bug.test.split(" ", 1)[0].removeprefix("tests/")
                file, _, function = test.partition("::")
                named = bug.conformance or "-"
                lines.append(f"| {bug.name} | {bug.effect} | `{file}`: `{function}` | {named} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.support.known_bugs")
    parser.add_argument("words", nargs="*", help="parts of names; none = all bugs")
    parser.add_argument("--table", action="store_true", help="print the table and try nothing")
    given = parser.parse_args()
    if given.table:
        sys.stdout.write(table())
        return 0
    chosen = [
        bug for bug in BUGS if not given.words or any(word in bug.name for word in given.words)
    ]
    for name in _IMPORTED_ONCE:
        importlib.import_module(name)
    verdicts = [attempt(bug) for bug in chosen]
    return 0 if all(verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
