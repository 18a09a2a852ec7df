"""Runs steps one after another, each in a process of its own, and writes what they found."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tests.gpu.steps import ANSWER, Step

ROOT = Path(__file__).resolve().parents[2]
_TAIL = 2000
_LEAST_SECONDS = 5.0
_SECONDS_TO_END = 10.0
Result = dict[str, Any]


class Runner:
    """Steps, the time that is left for all of them, and the results so far."""

    def __init__(self, path: Path, seconds: float, say: Callable[[str], None]) -> None:
        self._path, self._say = path, say
        self._end = time.monotonic() + seconds
        self.report: Result = {"steps": []}

    def run(self, steps: Sequence[Step]) -> None:
        """Run each step, whatever became of those before it."""
        for step in steps:
            result = self._run(step)
            self.report["steps"].append(result)
            self._say(line_of(result))
            self.write()

    def write(self) -> None:
        """Write the report as far as it goes."""
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.report, indent=1) + "\n", encoding="utf-8")
        temporary.replace(self._path)

    def _run(self, step: Step) -> Result:
        result: Result = {"name": step.name, "command": list(step.command), "status": "skipped"}
        missing = [name for name in step.needs if importlib.util.find_spec(name) is None]
        if missing:
            return result | {"reason": f"not installed: {', '.join(missing)}"}
        left = self._end - time.monotonic()
        if left < _LEAST_SECONDS:
            return result | {"reason": "no time is left (--minutes)"}
        start = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            ended = run_process(step, Path(folder), min(left, step.deadline_seconds))
        return result | ended | {"seconds": round(time.monotonic() - start, 1)}


def run_process(step: Step, folder: Path, deadline_seconds: float) -> Result:
    """Run a step's command in a folder and read its figures."""
    answer, log = folder / "answer.json", folder / "log"
    command = [str(answer) if word == ANSWER else word for word in step.command]
    place = folder / "place"
    place.mkdir()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=place,
            env=_environment(),
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(timeout=deadline_seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end_group(process)
    text = log.read_text(encoding="utf-8", errors="replace")
    if code is None:
        reason = f"still running after {deadline_seconds:.0f} s"
        return {"status": "timeout", "reason": reason, "output": text[-_TAIL:]}
    if code != 0:
        return {"status": "failed", "exit_code": code, "output": text[-_TAIL:]}
    figures = _figures(answer.read_text(encoding="utf-8") if answer.is_file() else text)
    return {"status": "ok", "figures": figures}


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End the step's process and whatever it started and left.

    A launcher is asked first, since its workers have sessions of their own.
    """
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=_SECONDS_TO_END)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _environment() -> dict[str, str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **ours, "PYTHONUNBUFFERED": "1"}


def _figures(text: str) -> Any:
    """A whole file of JSON, or the last line that is a JSON object."""
    for candidate in (text, *reversed(text.splitlines())):
        try:
            found = json.loads(candidate)
        except ValueError:
            continue
        if isinstance(found, dict):
            return found
    return None


def line_of(result: Result) -> str:
    """A step's result in a line."""
    seconds = f"{result['seconds']:6.1f} s" if "seconds" in result else " " * 8
    if result["status"] == "ok":
        told = json.dumps(result["figures"])
    else:
        last = result.get("output", "").strip().splitlines()[-1:]
        told = " ".join(filter(None, [result.get("reason"), *last]))
    return f"{result['status']:8}{seconds}  {result['name']:32} {told[:160]}"
