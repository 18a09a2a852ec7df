"""The package and its forge: one version, declared imports, a workflow that calls ``.ci/run``.

``.ci/run package`` builds and installs; here is what files alone can tell.
"""

from __future__ import annotations

import ast
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import sfed

tomllib = pytest.importorskip("tomllib")  # Python 3.11, the oldest that constraints.txt allows

ROOT = Path(__file__).resolve().parents[2]
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"
TEMPLATES = ROOT / ".github" / "ISSUE_TEMPLATE"
# Each with the extra that installs it, and the distribution that it is of.
IMPORTED_ONLY_WHERE_ASKED_FOR = {
    "tensorboard": ("tensorboard", "tensorboard"),
    "wandb": ("wandb", "wandb"),
    "mlflow": ("mlflow", "mlflow-skinny"),
    "dp_accounting": ("privacy", "dp-accounting"),
    "bitsandbytes": ("quantization", "bitsandbytes"),
    "triton": ("kernels", "triton"),
}


def load_yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def pins() -> dict[str, str]:
    """Version of each package in constraints.txt, by its canonical name."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pairs}


def requirements() -> list[Requirement]:
    """Those of the package and of all its extras, without those that name the package itself."""
    extras = PROJECT["optional-dependencies"].values()
    lines = [*PROJECT["dependencies"], *(line for extra in extras for line in extra)]
    return [one for one in map(Requirement, lines) if one.name != PROJECT["name"]]


def pythons_of_the_workflow() -> list[str]:
    versions: list[str] = load_yaml(WORKFLOW)["jobs"]["test"]["strategy"]["matrix"]["python"]
    return versions


# --- metadata ------------------------------------------------------------------------------------


def test_the_version_stands_in_one_place_and_in_the_citation():
    assert "version" in PROJECT["dynamic"] and "version" not in PROJECT
    assert load_yaml(ROOT / "CITATION.cff")["version"] == sfed.__version__


def test_every_requirement_has_its_version_in_the_constraints():
    versions = pins()
    for requirement in requirements():
        pinned = versions.get(canonicalize_name(requirement.name))
        assert pinned is not None, requirement
        assert requirement.specifier.contains(pinned, prereleases=True), requirement


def imported_packages() -> set[str]:
    """First names of what the package imports, wherever in a file, without Python's own."""
    names: set[str] = set()
    for path in (ROOT / "sfed").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.partition(".")[0] for alias in node.names}
            if isinstance(node, ast.ImportFrom) and node.module:
                names.add(node.module.partition(".")[0])
    return names - set(sys.stdlib_module_names) - {"sfed"}


def test_everything_that_is_imported_is_declared():
    """A package that is there only because another needs it may be gone in the next version."""
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    sources = metadata.packages_distributions()
    undeclared = {
        name
        for name in imported_packages() - IMPORTED_ONLY_WHERE_ASKED_FOR.keys()
        if not declared & {canonicalize_name(source) for source in sources.get(name, [name])}
    }
    assert undeclared == set()
    extras = PROJECT["optional-dependencies"]
    for extra, distribution in IMPORTED_ONLY_WHERE_ASKED_FOR.values():
        assert distribution in {Requirement(one).name for one in extras[extra]}


# --- the forge -----------------------------------------------------------------------------------


def test_the_workflow_calls_every_stage_and_nothing_runs_forever():
    jobs = load_yaml(WORKFLOW)["jobs"]
    (stages,) = re.findall(r"\.ci/run \[all\|([\w|]+)\]", (ROOT / ".ci" / "run").read_text())
    called = {*jobs["checks"]["strategy"]["matrix"]["stage"], "test"}
    assert called <= set(stages.split("|"))
    assert {"lint", "types", "layers", "docs", "package", "test"} <= called
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    assert commands == [".ci/run ${{ matrix.stage }}", ".ci/run test"]
    assert all(0 < job["timeout-minutes"] <= 120 for job in jobs.values())


def test_the_workflow_tests_the_pythons_that_the_package_names():
    prefix = "Programming Language :: Python :: 3."
    named = [line for line in PROJECT["classifiers"] if line.startswith(prefix)]
    assert [f"3.{line.removeprefix(prefix)}" for line in named] == pythons_of_the_workflow()
    supported = SpecifierSet(PROJECT["requires-python"])
    assert all(supported.contains(version) for version in pythons_of_the_workflow())


@pytest.mark.parametrize("version", pythons_of_the_workflow())
def test_the_constraints_allow_the_pythons_of_the_workflow(version: str):
    """As far as the packages say that are installed here."""
    versions, refused, seen = pins(), [], 0
    for package in metadata.distributions():
        allowed = package.metadata.get("Requires-Python")
        if versions.get(canonicalize_name(package.metadata["Name"])) != package.version:
            continue
        seen += 1
        # The newest of its line: some packages exclude a single patch release.
        if allowed and not SpecifierSet(allowed).contains(f"{version}.99"):
            refused.append(package.metadata["Name"])
    assert refused == []
    assert seen > 50


def test_pre_commit_runs_the_linter_of_the_constraints():
    (repository,) = load_yaml(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["rev"] == f"v{pins()['ruff']}"
    assert [hook["id"] for hook in repository["hooks"]] == ["ruff-check", "ruff-format"]


def test_a_bug_report_asks_for_what_is_needed():
    fields = {
        field["id"]: field
        for field in load_yaml(TEMPLATES / "bug.yml")["body"]
        if field["type"] != "markdown"
    }
    required = {name for name, field in fields.items() if field.get("validations")}
    assert {"version", "command", "configuration", "observed"} <= required
    assert "`sfed --version`" in fields["version"]["attributes"]["description"]
    assert "`config.json`" in fields["configuration"]["attributes"]["description"]
    for name in ("`metrics.jsonl`", "`debug/`"):
        assert name in fields["files"]["attributes"]["description"]
