"""Tests of finding the adapters that a person names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from sfed.storage.adapter_ref import choose, find_adapters
from sfed.utils.errors import CheckpointError, UserError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder of two clients, of which one has a name, and the global adapter."""
    for name in ("global", "client-0000", "sud", "zoo"):
        (tmp_path / "adapters" / name).mkdir(parents=True)
        (tmp_path / "adapters" / name / "adapter_model.safetensors").touch()
    facts = {"client": 1, "name": "süd"}
    (tmp_path / "adapters" / "sud" / "client.json").write_text(json.dumps(facts))
    (tmp_path / "adapters" / "no-adapter").mkdir()
    (tmp_path / "metrics.jsonl").touch()
    return tmp_path


def names(run: Path, *asked: str) -> list[str]:
    return [one.title for one in choose(find_adapters(run), asked)]


def test_a_run_has_its_clients_and_then_the_global_adapter(run: Path):
    assert names(run) == ["client-0000", "süd", "zoo", "global"]
    assert names(run / "adapters") == names(run)
    assert names(run / "adapters" / "sud") == ["süd"]


@pytest.mark.parametrize("asked", ["süd", "sud", "1", "client-0001"])
def test_a_client_goes_by_name_folder_and_number(run: Path, asked: str):
    assert names(run, asked) == ["süd"]
    assert names(run, "global", asked, "0", asked) == ["global", "süd", "client-0000"]


def test_what_is_not_there_is_refused_with_what_is(run: Path, tmp_path: Path):
    with pytest.raises(
        UserError, match=r"--client x\\x1b: .* 'client-0000', 'sud', 'zoo', 'global'"
    ):
        names(run, "x\x1b")
    with pytest.raises(UserError, match="does not exist; name a run folder"):
        find_adapters(tmp_path / "nowhere")
    with pytest.raises(UserError, match="neither a run folder nor a folder of an adapter"):
        find_adapters(run / "adapters" / "no-adapter")


def test_a_run_without_adapters_is_refused_with_what_to_do(tmp_path: Path):
    (tmp_path / "metrics.jsonl").touch()
    with pytest.raises(UserError, match=r"has written no adapters yet.*sfed export"):
        find_adapters(tmp_path)


@pytest.mark.parametrize("content", ["[]", "{", '{"a": ' * 200])
def test_a_damaged_file_is_named(run: Path, content: str):
    (run / "adapters" / "sud" / "client.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"client\.json"):
        find_adapters(run)
