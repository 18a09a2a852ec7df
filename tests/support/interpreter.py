"""Fresh Python interpreters: what a command prints, and which modules some code loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEAVY = {"torch", "transformers", "deepspeed", "peft", "datasets"}


def python(*words: str, folder: Path = ROOT) -> subprocess.CompletedProcess[str]:
    """Run ``python WORDS`` in a folder, with this checkout's sfed."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


def modules_after(code: str) -> set[str]:
    """The modules that a fresh interpreter has loaded after some code."""
    code += "\nimport json, sys\nsys.stderr.write(json.dumps(sorted(sys.modules)))"
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stderr))
