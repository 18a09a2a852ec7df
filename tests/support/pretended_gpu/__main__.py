"""Run a module under pretended GPUs, with its own arguments and exit code.

    python -m tests.support.pretended_gpu [--devices N] [--no-races] [--report FILE.json]
        -m sfed.train CONFIG key=value ...

Under a launcher with several processes each writes a report of its own, FILE.0.json, FILE.1.json.
"""

from __future__ import annotations

import argparse
import json
import os
import runpy
import sys
from pathlib import Path
from typing import Any

from tests.support.pretended_gpu import PretendedGpu


def _parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(prog="python -m tests.support.pretended_gpu")
    parser.add_argument("--devices", metavar="N", type=int, default=1, help="GPUs [1]")
    parser.add_argument("--no-races", action="store_true", help="faster: look for no races")
    parser.add_argument("--report", metavar="FILE", type=Path, help="write what was noted as JSON")
    if "-m" not in words[:-1]:
        parser.error("name a module: -m sfed.train CONFIG")
    split = words.index("-m")
    return parser.parse_args(words[:split]), words[split + 1 :]


def _report_file(path: Path) -> Path:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return path
    return path.with_suffix(f".{os.environ['RANK']}{path.suffix}")


def main(words: list[str]) -> Any:
    """Returns the module's exit code."""
    options, (module, *arguments) = _parse(words)
    os.environ["DS_ACCELERATOR"] = "cuda"
    sys.argv = [module, *arguments]
    code: Any = 0
    gpu = PretendedGpu(options.devices, races=not options.no_races)
    try:
        with gpu:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code
    finally:
        _write(gpu, options.report)
    return code


def _write(gpu: PretendedGpu, report: Path | None) -> None:
    text = json.dumps(gpu.as_json(), indent=2) + "\n"
    if report is None:
        sys.stderr.write(text)
    else:
        _report_file(report).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
