"""Methods from files of users: found, checked, and told apart by their source."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from sfed.config import load as config_load
from sfed.config import own_method
from sfed.config.diff import comparable
from sfed.methods.method import resolve
from sfed.utils.errors import ConfigError

RECORD = """
from sfed import METHODS, Method, CommonLayer

def step(sent):
    return CommonLayer(dict(sent.before))

Mine = Method("mine", (("A", "B"),), (("A",),), (0.0, -1.0), False, 16.0, {rest})
Turns = Method("mine", ("AB",), (("A",),), (0.0, -1.0), False, 16.0)
Untrained = Method("mine", (("B",),), (("A",),), (0.0, -1.0), False, 16.0)
Negative = Method("mine", (("A", "B"),), (("A",),), (0.0, -1.0), False, -1.0)
Other = 3
"""


def config_of(method: str, **sections: object):
    federated = {"method": method, **sections.pop("federated", {})}
    return config_load.validate({"federated": federated, **sections})


def source(folder: Path, rest: str = "step", name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(RECORD.replace("{rest}", rest))
    return path


def test_a_record_in_a_file_is_the_method_with_the_overrides_of_the_configuration(tmp_path):
    path = source(tmp_path)
    method = resolve(config_of(f"{path}:Mine", lora={"alpha": 3.0}))
    assert (method.name, method.alpha) == ("mine", 3.0)
    assert method.server_step is not None
    assert resolve(config_of(f"{path}:Mine")).server_step is method.server_step, "imported once"


def test_a_module_on_the_path_is_found_too(tmp_path, monkeypatch):
    source(tmp_path, name="module_of_a_user.py")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert resolve(config_of("module_of_a_user:Mine")).name == "mine"
    assert own_method.OwnMethod.parse("module_of_a_user:Mine").digest()
    del sys.modules["module_of_a_user"]


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("Missing", "defines no Missing"),
        ("Other", "it is a int, not a sfed.Method"),
        ("Turns", "trained is ('AB',); it has to hold the factors of each round in turn"),
        ("Untrained", "a round averages a factor that it does not train"),
        ("Negative", "alpha is -1.0; it has to be above 0"),
    ],
)
def test_what_is_no_record_is_refused_with_the_reason(tmp_path, name, part):
    with pytest.raises(ConfigError) as caught:
        resolve(config_of(f"{source(tmp_path)}:{name}"))
    assert "federated.method = " in str(caught.value) and part in str(caught.value)


def test_a_file_that_fails_or_is_not_there_is_one_line(tmp_path):
    broken = tmp_path / "broken.py"
    broken.write_text("import nothing_of_this_name\n")
    for spec in (f"{broken}:Mine", f"{tmp_path}/missing.py:Mine", "no_such_module:Mine"):
        with pytest.raises(ConfigError) as caught:
            resolve(config_of(spec))
        message = str(caught.value)
        assert "cannot be imported (" in message and "\n" not in message


@pytest.mark.parametrize(
    "spec", ["fedavg", "file.py:", ":Mine", "a b:Mine", "file.py:_hidden", "a..b:Mine", "x:1y"]
)
def test_what_is_neither_a_name_nor_a_source_is_refused_before_anything_runs(spec):
    with pytest.raises(ConfigError, match=r"FILE\.py:NAME"):
        config_of(spec)


def test_a_near_name_is_suggested():
    with pytest.raises(ConfigError, match="did you mean fedsa-rslora"):
        config_of("fedsa_rslora")


def test_a_changed_source_is_another_run_and_a_moved_one_is_not(tmp_path):
    path = source(tmp_path)
    before = comparable(config_of(f"{path}:Mine"), 2)
    (tmp_path / "moved").mkdir()
    moved = source(tmp_path / "moved", name="elsewhere.py")
    assert comparable(config_of(f"{moved}:Mine"), 2) == before
    path.write_text(path.read_text() + "\n# another version\n")
    changed = comparable(config_of(f"{path}:Mine"), 2)
    assert changed["federated.method"] != before["federated.method"]
    assert changed["federated.method"].startswith("Mine@")


def test_the_default_of_the_moments_is_the_older_keep():
    old = comparable(config_of("sfed", federated={"optimizer_state": "keep"}), 2)
    assert comparable(config_of("sfed"), 2) == old


def test_moments_of_another_basis_are_not_kept(tmp_path):
    path = source(tmp_path, "step, keeps_moments=False")
    assert not resolve(config_of(f"{path}:Mine")).keeps_moments
    with pytest.raises(ConfigError, match=r"federated\.optimizer_state=keep: the server step of"):
        resolve(config_of(f"{path}:Mine", federated={"optimizer_state": "keep"}))


def test_the_factors_of_a_server_step_are_not_overridden(tmp_path):
    with pytest.raises(ConfigError, match=r"federated\.averaged"):
        resolve(config_of(f"{source(tmp_path)}:Mine", federated={"averaged": ["B"]}))


def test_a_source_in_a_configuration_file_follows_the_file(tmp_path, monkeypatch):
    source(tmp_path)
    path = tmp_path / "run.yaml"
    path.write_text("federated: {method: 'mine.py:Mine'}\ndata: {task: demo}\n")
    monkeypatch.chdir("/")
    config = config_load.load(str(path))
    assert config.federated.method == f"{tmp_path}/mine.py:Mine"
    assert config.run_name == "demo-Mine"
