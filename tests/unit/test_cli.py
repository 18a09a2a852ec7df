"""Tests of the command ``sfed``."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sfed import cli
from sfed.utils import versions
from sfed.utils.errors import UserError
from tests.support import tiny
from tests.support.launchers import HEAVY, ROOT, modules_after, python


def sfed(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return python("-m", "sfed", *words, cwd=cwd)


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_the_help_names_every_command(words: list[str], capsys: pytest.CaptureFixture[str]):
    cli.main(words)
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {name} ", shown, re.MULTILINE) for name in cli.COMMANDS)


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_help_and_versions_load_nothing_heavy(word: str):
    loaded = modules_after(f"from sfed import cli\ncli.main([{word!r}])")
    assert "sfed.cli" in loaded and not {"numpy", *HEAVY} & loaded


def test_the_versions_are_what_a_report_of_a_bug_needs(capsys: pytest.CaptureFixture[str]):
    cli.main(["--version"])
    shown = dict(line.split(" ", 1) for line in capsys.readouterr().out.splitlines())
    assert list(shown) == [
        "sfed", "python", "torch", "transformers", "peft", "deepspeed", "platform",
    ]  # fmt: skip
    torch = sys.modules.get("torch")
    assert torch is None or shown["torch"] == torch.__version__
    assert shown["python"] == sys.version.split()[0]


def test_a_library_that_is_not_installed_is_said_to_be_so():
    assert versions.installed("no-such-library") == {"no-such-library": "not installed"}


def test_an_unknown_command_is_one_line_with_the_known_ones():
    ended = sfed("trian", "configs/demo.yaml")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == (
        "sfed: unknown command 'trian'; the commands are train, sweep, report, export, eval, "
        "chat, plan, bench, conformance, doctor; did you mean train?\n"
    )
    with pytest.raises(UserError, match=r"doctor$"):
        cli.main(["configs/demo.yaml"])


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_is_the_module_that_python_runs(name: str):
    by_word, by_module = (
        sfed(name, "--help"),
        python("-m", f"sfed.{name}", "--help"),
    )
    assert by_word.returncode == by_module.returncode == 0
    assert by_word.stdout == by_module.stdout != ""


def test_an_error_of_a_command_has_its_message_and_exit_code():
    ended = sfed("train", "data.task=demo", "lora.rnak=3")
    assert ended.returncode == 2
    assert "lora.rnak = 3: unknown key; did you mean lora.rank?" in ended.stderr


def test_the_console_script_is_this_command():
    assert '[project.scripts]\nsfed = "sfed.cli:run"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_a_sweep_runs_from_the_command_word_and_is_reported(tiny_folder: Path, tmp_path: Path):
    """Its fork server starts children from a process whose main module is the script."""
    base = tiny.settings(tiny_folder, federated={"num_clients": 2, "num_rounds": 1})
    del base["output"]
    grid = {"name": "seeds", "set": base, "grid": {"seed": [0, 1]}}
    (tmp_path / "grid.json").write_text(json.dumps(grid))
    script = tmp_path / "sfed-script"
    script.write_text(
        "import sys\nfrom sfed.cli import run\nif __name__ == '__main__':\n    run()\n"
    )
    done = python(str(script), "sweep", "grid.json", "output.dir=runs", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    reported = sfed("report", "runs/seeds", cwd=tmp_path)
    assert reported.returncode == 0, reported.stderr
    assert (tmp_path / "runs" / "seeds" / "report.html").is_file()
