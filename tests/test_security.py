"""Untrusted files, other users of the machine, hostile names: what the code must never do."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sfed import cli

ROOT = Path(__file__).resolve().parents[1]

# --- the source -----------------------------------------------------------------------------------

_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "tempfile.mktemp", "yaml.unsafe_load"}
_PICKLING = ("_object_list", "all_gather_object", "gather_object")


def offences(source: str) -> list[str]:
    """What a source does that could run a file's or a peer's code, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        found += [f"{node.lineno}: {m}" for m in modules if m.partition(".")[0] in _MODULES]
        if isinstance(node, ast.Call):
            name, given = (
                ast.unparse(node.func),
                {k.arg: ast.unparse(k.value) for k in node.keywords},
            )
            loader = ast.unparse(node.args[1]) if len(node.args) > 1 else given.get("Loader")
            bad = (
                name in _CALLS
                or name.endswith(_PICKLING)
                or (name == "torch.load" and given.get("weights_only") != "True")
                or given.get("allow_pickle", "False") != "False"
                or given.get("shell", "False") != "False"
                or (
                    name in ("yaml.load", "yaml.load_all")
                    and loader not in ("_Loader", "yaml.SafeLoader")
                )
            )
            found += [f"{node.lineno}: {ast.unparse(node)}"] if bad else []
    return found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from dill import loads",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
        "dist.broadcast_object_list(some)",
        "os.system(text)",
        "tempfile.mktemp()",
    ],
)
def test_the_scan_finds_what_it_looks_for(source):
    assert len(offences(source)) == 1


def test_the_source_runs_nobody_elses_code():
    files = sorted((ROOT / "sfed").glob("*.py"))
    assert len(files) > 50
    found = {file.name: bad for file in files if (bad := offences(file.read_text("utf-8")))}
    assert not found
    assert issubclass(cli._Loader, yaml.SafeLoader)


# --- what is installed ----------------------------------------------------------------------------


def closure(name: str, extras: frozenset[str]) -> set[str]:
    """Names of all installed distributions that one needs, itself included."""
    found: set[str] = set()
    waiting = [(name, extras)]
    seen: set[tuple[str, frozenset[str]]] = set()
    while waiting:
        one = waiting.pop()
        if one in seen:
            continue
        seen.add(one)
        name, extras = one
        try:
            required = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        found.add(canonicalize_name(name))
        for requirement in map(Requirement, required):
            marker = requirement.marker
            environments = [{"extra": extra} for extra in (*extras, "")]
            if marker is None or any(map(marker.evaluate, environments)):
                waiting.append((requirement.name, frozenset(requirement.extras)))
    return found


def test_every_dependency_is_pinned():
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [re.fullmatch(r"([A-Za-z0-9._-]+)==([^=*]+)", line) for line in lines if line[0] != "#"]
    assert all(pins)
    pinned = {canonicalize_name(pin[1]) for pin in pins if pin}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [name for some in project["optional-dependencies"].values() for name in some]
    asked = map(Requirement, [*project["dependencies"], *extras])
    needed = {name for one in asked for name in closure(one.name, frozenset(one.extras))}
    assert {"torch", "peft", "markupsafe", "pytest"} <= needed
    # On GPUs torch brings CUDA's libraries, in the versions that it pins itself.
    unpinned = {name for name in needed - pinned if not name.startswith(("nvidia-", "cuda-"))}
    assert unpinned <= {"triton", "setuptools"}
