"""What an export is refused for before torch is imported."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support import launchers

OLD_RUN = launchers.ROOT / "tests" / "support" / "old_run" / "runs" / "old"


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--round", "7"], "sfed: --round 7: RUN keeps no checkpoint of that round; there are 2 "),
        (["--client", "nobody"], "sfed: --client nobody: RUN has no such client; there are"),
        (["--push-to-hub", "name"], "sfed: --push-to-hub 'name': name the repository as ORG/NAME"),
    ],
)
def test_what_a_run_does_not_have_is_said_before_torch(words: list[str], part: str) -> None:
    done = launchers.python("-X", "importtime", "-m", "sfed.export", str(OLD_RUN), *words)
    assert done.returncode == 2
    assert part.replace("RUN", str(OLD_RUN)) in done.stderr
    assert "loading PyTorch" not in done.stderr
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "sfed.export.checkpoints" in imported and not launchers.HEAVY & imported


def test_a_damaged_checkpoint_is_said_before_torch(tmp_path: Path) -> None:
    run = shutil.copytree(OLD_RUN, tmp_path / "run")
    (run / "checkpoints" / "round-000002" / "common.safetensors").write_bytes(b"")
    done = launchers.python("-m", "sfed.export", str(run), "--round", "2")
    assert done.returncode == 2
    assert "round-000002 cannot be used: common.safetensors" in done.stderr
    assert "loading PyTorch" not in done.stderr
