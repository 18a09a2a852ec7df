"""What a user is told where a library cannot be imported."""

from __future__ import annotations

from pathlib import Path

import pytest

from sfed.utils import command
from sfed.utils.errors import UserError


def test_the_variable_that_leads_a_library_nowhere_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PWD", str(file))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(file / "cache"))
    with (
        pytest.raises(
            UserError, match=r"^TORCHINDUCTOR_CACHE_DIR=.*\(Not a directory\); set TORCH"
        ),
        command.importing(),
    ):
        (file / "cache" / "dynamo").mkdir()


def test_errors_of_no_folder_stay_as_they_are() -> None:
    with pytest.raises(OSError, match=r"libmissing\.so"), command.importing():
        raise OSError("libmissing.so: cannot open shared object file")
