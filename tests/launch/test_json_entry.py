"""JSON files that Python is asked to run, in an environment made of the wheel."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.support import launchers

ROOT = launchers.ROOT
START_UP = "sfed_script.pth"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel that pip would make of this project."""
    folder = tmp_path_factory.mktemp("wheel")
    code = f"from hatchling.build import build_wheel; build_wheel({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter that has the wheel unpacked, and what it depends on from here."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    ask = "import sysconfig; print(sysconfig.get_path('purelib'))"
    packages = Path(subprocess.check_output([python, "-I", "-c", ask], text=True).strip())
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib"))
    return python


def run(python: Path, *words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return launchers.run(str(python), "-u", *words, cwd=folder, env=environment)


def test_what_python_reads_at_start_lies_beside_the_package_and_goes_with_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        assert [name for name in names if name.endswith("script.pth")] == [START_UP]
        record = next(name for name in names if name.endswith(".dist-info/RECORD"))
        # pip takes away on uninstall what stands in RECORD; Python runs single lines only.
        assert f"\n{START_UP}," in archive.read(record).decode()
        assert len(archive.read(START_UP).splitlines()) == 1


def test_this_environment_has_it_too() -> None:
    """As the README's command made it: an editable install."""
    files = importlib.metadata.files("sfed") or []
    assert START_UP in map(str, files), "install the project: pip install -c constraints.txt -e ."


def test_a_configuration_that_python_is_asked_to_run_is_run_with_its_overrides(
    python: Path, tmp_path: Path
) -> None:
    shipped = run(python, str(ROOT / "launch" / "sfed.json"), "train.lrr=1", folder=tmp_path)
    assert shipped.returncode == 2
    assert "train.lrr = 1: unknown key; did you mean train.lr?" in shipped.stderr
    (tmp_path / "mine.json").write_text('{"federated": {"num_rounds": 0}}')
    mine = run(python, "./mine.json", "--local_rank=0", folder=tmp_path)
    assert mine.returncode == 2
    assert "federated.num_rounds = 0" in mine.stderr
    usage = run(python, "mine.json", "--help", folder=tmp_path)
    assert usage.returncode == 0
    assert "usage: python -m sfed.train" in usage.stdout


def test_a_slip_in_the_json_is_told_and_does_not_pass_for_a_program(
    python: Path, tmp_path: Path
) -> None:
    slip = '{"federated": {"num_rounds": 3}, "lora": {"rank": 4}'
    (tmp_path / "slip.json").write_text(slip)
    told = run(python, "slip.json", folder=tmp_path)
    assert told.returncode == 2
    assert "slip.json is not readable as YAML or JSON" in told.stderr


@pytest.mark.parametrize("text", ['{"bf16": {"enabled": true}}', '{"a": ', "\xff", None])
def test_any_other_json_file_is_what_it_was(python: Path, tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "other.json").write_bytes(text.encode("latin-1"))
    with_sfed = run(python, "other.json", folder=tmp_path)
    without = run(python, "-S", "other.json", folder=tmp_path)
    assert with_sfed.returncode == without.returncode != 0
    assert with_sfed.stderr == without.stderr


def test_other_interpreters_import_nothing_of_it(python: Path, tmp_path: Path) -> None:
    (tmp_path / "program.py").write_text(
        "import sys; print([m for m in sys.modules if 'sfed' in m], len(sys.path_hooks))"
    )
    for words in (
        ["program.py"],
        ["-c", (tmp_path / "program.py").read_text(), "launch/sfed.json"],
    ):
        assert run(python, *words, folder=tmp_path).stdout == "[] 2\n"


def test_the_shipped_file_is_strict_json_and_fails_loudly_without_the_package(
    python: Path, tmp_path: Path
) -> None:
    shipped = ROOT / "launch" / "sfed.json"
    json.loads(shipped.read_text(), parse_constant=pytest.fail)
    alone = run(python, "-S", str(shipped), folder=tmp_path)
    assert alone.returncode == 1
    assert "NameError" in alone.stderr
