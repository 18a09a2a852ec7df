"""Untrusted files, other users of the machine, hostile names: what the code must never do."""

from __future__ import annotations

import ast
import importlib.metadata
import json
import re
import shutil
import stat
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from sfed import train
from sfed.config import load as config_load
from sfed.config import yaml_text
from sfed.report import __main__ as report
from sfed.utils import command
from sfed.utils.errors import UserError
from tests.support import launchers, run_folders, tiny

ROOT = launchers.ROOT

# --- the source -----------------------------------------------------------------------------------

_MODULES = {"pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"}
_CALLS = {"eval", "exec", "compile", "os.system", "os.popen", "tempfile.mktemp", "yaml.unsafe_load"}
_PICKLING = ("_object_list", "all_gather_object", "gather_object")


def names_of(node: ast.ImportFrom) -> set[str]:
    return {alias.name for alias in node.names}


def offences(source: str) -> list[str]:
    """What a source does that could run a file's or a peer's code, by line."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and names_of(node) != {"UnpicklingError"}:
            modules.append(node.module or "")
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
    files = sorted((ROOT / "sfed").rglob("*.py"))
    assert len(files) > 50
    found = {str(file): bad for file in files if (bad := offences(file.read_text("utf-8")))}
    assert not found
    assert issubclass(yaml_text._Loader, yaml.SafeLoader)


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
    # An extra may name other extras of the project itself.
    assert unpinned <= {"triton", "setuptools", project["name"]}


# --- what a run leaves and says -------------------------------------------------------------------

TOKEN = "hf_" + "aB3dE5gH7jK9mN1pQ3sT5vX7"
PASSWORD = "correct-horse-battery"
KEY = "0123456789abcdef0123456789abcdef01234567"


def trained(folder: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """``python -m sfed.train`` in ``folder``, by somebody whose umask forbids nothing."""
    own = launchers.environment(SFED_LOG_LEVEL="debug", **environment)
    return launchers.python("-m", "sfed.train", *words, cwd=folder, env=own, umask=0)


@pytest.fixture(scope="module")
def left(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run into which secrets were planted: its folder, and what it said."""
    folder = tmp_path_factory.mktemp("secrets")
    rows = f"row {PASSWORD} {TOKEN}"
    settings = tiny.settings(tiny_folder, output={"dir": str(folder / "runs"), "name": "run"})
    settings["output"]["trackers"] = ["tensorboard"]
    settings["federated"]["num_rounds"] = 1
    settings["evaluation"] = {"generate": True, "max_new_tokens": 2, "max_examples": 2}
    settings["backbone"] = {
        "deepspeed": {"comet": {"api_key": KEY}, "notes": f"https://ann:{PASSWORD}@host {TOKEN}"}
    }
    data = [
        {"prompt": f"{rows} {i}:", "completion": f" {i}", "kind": TOKEN if i % 2 else "x"}
        for i in range(40)
    ]
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in data), encoding="utf-8")
    settings["data"] |= {"train_files": str(path), "max_tokens": 120}
    settings["partition"] = {"kind": "dirichlet", "key": "kind"}
    (folder / "run.json").write_text(json.dumps(settings))
    done = trained(folder, "run.json", HF_TOKEN=TOKEN, WANDB_API_KEY=KEY, ADMIN_PASSWORD=PASSWORD)
    assert done.returncode == 0, done.stdout + done.stderr
    report.main([str(folder / "runs" / "run")])
    return folder / "runs", done.stdout + done.stderr


def test_nothing_that_a_run_writes_or_says_holds_a_secret(left: tuple[Path, str]):
    folder, said = left
    files = [path for path in folder.rglob("*") if path.is_file()]
    names = {path.name for path in files}
    expected = ("config.json", "partition.json", "metrics.jsonl", "report.html", "run.json")
    assert names.issuperset((*expected, "adapter_config.json"))
    assert any(name.startswith("events.out.tfevents") for name in names)
    for secret in (TOKEN, PASSWORD, KEY):
        assert secret not in said
        assert not [path for path in files if secret.encode() in path.read_bytes()]
    assert "***" in (folder / "run" / "config.json").read_text()
    assert "***" in (folder / "run" / "partition.json").read_text()


def test_nothing_that_a_run_writes_can_be_written_by_everybody(left: tuple[Path, str]):
    folder, _ = left
    found = [folder, *folder.rglob("*")]
    assert len(found) > 10
    assert not [path for path in found if path.stat().st_mode & stat.S_IWOTH]


def test_a_mistake_with_a_secret_in_it_is_said_without(tmp_path: Path):
    done = trained(
        tmp_path, f"model.name=https://ann:{PASSWORD}@host/{TOKEN}", f"modle={KEY}",
        WANDB_API_KEY=KEY,
    )  # fmt: skip
    assert done.returncode == command.EXIT_MISTAKE
    assert "modle" in done.stderr and "***" in done.stderr
    assert not [s for s in (TOKEN, PASSWORD, KEY) if s in done.stdout + done.stderr]


# --- untrusted files ------------------------------------------------------------------------------


@pytest.mark.parametrize("trusted", [False, True])
def test_code_of_a_model_runs_only_where_it_is_trusted_and_then_that_is_said(
    trusted, tiny_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    tiny.plant_code(tmp_path / "model", tmp_path / "proof")
    settings = tiny.settings(
        tmp_path,
        backbone={"trust_remote_code": trusted},
        data={"train_files": str(tiny_folder / "rows.jsonl")},
        federated={"num_rounds": 1},
    )
    if trusted:
        train.run(config_load.validate(settings))
        assert "Python code that comes with" in capsys.readouterr().out
    else:
        with pytest.raises(UserError, match="trust_remote_code"):
            train.run(config_load.validate(settings))
    assert (tmp_path / "proof").exists() == trusted


class _Payload:
    def __init__(self, proof: str) -> None:
        self._proof = proof

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return open, (self._proof, "w")


def test_weights_that_are_a_pickle_with_code_do_not_run_it(tiny_folder, tmp_path):
    shutil.copytree(tiny_folder / "model", tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"x": _Payload(str(tmp_path / "proof"))}, tmp_path / "model" / "pytorch_model.bin")
    settings = tiny.settings(
        tmp_path, data={"train_files": str(tiny_folder / "rows.jsonl")}, federated={"num_rounds": 1}
    )
    with pytest.raises(UserError, match=r"model\.name .* convert it to safetensors"):
        train.run(config_load.validate(settings))
    assert not (tmp_path / "proof").exists()


@pytest.mark.parametrize("name", ["../x", "/x", "a/b", "..", ".x", "", "a\nb"])
def test_a_run_folder_cannot_be_outside_of_its_place(name):
    with pytest.raises(UserError, match=r"output\.name"):
        config_load.validate({"output": {"name": name}})


# --- the page -------------------------------------------------------------------------------------

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(1)>&amp;"


class _Page(HTMLParser):
    """Notes what a browser would run or load."""

    def __init__(self) -> None:
        super().__init__()
        self.bad: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("script", "iframe", "object", "embed", "form", "base"):
            self.bad.append(tag)
        for name, value in attrs:
            is_loading = name in ("src", "href", "action") and not (value or "").startswith(
                ("data:", "#")
            )
            if name.startswith("on") or is_loading:
                self.bad.append(f"{tag} {name}={value}")


def poisoned(value: object) -> object:
    """The same with a hostile text for every text, in keys of labels too."""
    if isinstance(value, str):
        return HOSTILE
    if isinstance(value, list):
        return [poisoned(one) for one in value]
    if isinstance(value, dict):
        keep = ("event", "method")
        found = {k: v if k in keep else poisoned(v) for k, v in value.items()}
        if isinstance(found.get("labels"), dict):
            found["labels"] = {f"{k}{HOSTILE}": v for k, v in found["labels"].items()}
        return found
    return value


def test_a_report_of_hostile_texts_runs_and_loads_nothing(tmp_path: Path):
    folders = []
    for i in range(2):
        folder = run_folders.write_run(tmp_path / f"run-{i}", seed=i, samples=True)
        for name in ("config.json", "partition.json"):
            data = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(poisoned(data)))
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        events = [poisoned(json.loads(line)) for line in lines]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in events))
        hostile = folder.with_name("<b onclick=x>" + folder.name)
        folder.rename(hostile)
        folders.append(str(hostile))
    report.main([*folders, "--out", str(tmp_path / "out")])
    text = (tmp_path / "out" / "report.html").read_text()
    page = _Page()
    page.feed(text)
    assert not page.bad
    assert "&lt;script&gt;" in text and "<b onclick" not in text
    assert "default-src 'none'" in text
