"""What no import contract can say: torch.distributed is used in two places, commands in none."""

from __future__ import annotations

import ast
from pathlib import Path

import sfed

PACKAGE = Path(sfed.__file__).parent


def imported(path: Path) -> set[str]:
    """Full names of what a file imports, wherever it stands in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def test_torch_distributed_is_used_in_distributed_and_models_deepspeed_only():
    users = {
        path.relative_to(PACKAGE).as_posix()
        for path in PACKAGE.rglob("*.py")
        if any(f"{name}.".startswith("torch.distributed.") for name in imported(path))
    }
    assert {user for user in users if not user.startswith("distributed/")} <= {
        "models/deepspeed.py"
    }
    assert users, "the test sees no user at all"


def test_every_folder_says_what_it_is_and_imports_nothing():
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"]
    assert folders
    for folder in folders:
        body = ast.parse((folder / "__init__.py").read_text(encoding="utf-8")).body
        assert len(body) == 1 and isinstance(body[0], ast.Expr), folder
