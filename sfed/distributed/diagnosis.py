"""Which process the others wait for, told from what each of them says. Needs no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

GO_ON = "Start the same command again: it resumes from the last checkpoint"
"""Last line of a verdict; what trains nothing that is kept leaves it out."""


@dataclass
class Report:
    """Where a process was when it, or another, gave up."""

    place: str
    seconds: float = 0.0
    """How long it had been there."""
    is_waiting: bool = False
    """Whether it waited for others at a meeting."""
    collectives: int = 0
    """How many collectives it had begun: who has begun fewer than others keeps them waiting."""
    stack: list[str] = field(default_factory=list)
    """Stack of its main thread, the innermost call last."""
    reason: str | None = None
    """Why it ended, where it had a reason of its own."""
    pid: int | None = None
    host: str | None = None
    is_silent: bool | None = None
    """For a process that did not report: whether it gave no sign of life either."""

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self))

    @staticmethod
    def of_json(text: str | bytes) -> Report:
        """From text."""
        return Report(**json.loads(text))


def judge(reason: str, found: Mapping[int, Report], size: int, records: Path | None) -> str:
    """Name the processes that the others wait for, and where they are.

    Args:
        reason: why the process that speaks cannot continue.
        found: what is known of each process.
        size: number of processes.
        records: folder of what each process did last, where it could be written.
    """
    causes = _causes(found)
    lines = [reason]
    lines += [f"  process {peer}{_where(found[peer])} {_fate(found[peer])}" for peer in causes]
    unknown = [str(peer) for peer in range(size) if peer not in found]
    if unknown:
        lines.append(f"  process {', '.join(unknown)}: out of reach, and so is the store")
    if records is not None:
        lines.append(f"  what each process did last: {records}")
    return "\n".join([*lines, f"  {GO_ON}"])


def _causes(found: Mapping[int, Report]) -> list[int]:
    """The processes with a reason of their own; else the silent ones; else those waited for."""
    ended = [peer for peer, report in sorted(found.items()) if report.reason is not None]
    mute = [peer for peer, report in sorted(found.items()) if report.is_silent is not None]
    if ended or mute:
        return ended or mute
    busy = {peer: report for peer, report in found.items() if not report.is_waiting}
    fewest = min((report.collectives for report in busy.values()), default=0)
    return [peer for peer, report in sorted(busy.items()) if report.collectives == fewest]


def _where(report: Report) -> str:
    return "" if report.pid is None else f" (pid {report.pid} on {report.host})"


def _fate(report: Report) -> str:
    if report.reason is not None:
        return f"ended at {report.place}: {report.reason}"
    if report.is_silent is not None:
        life = "gives no sign of life" if report.is_silent else "is alive but did not answer"
        hint = f"; if it is still there, py-spy dump --pid {report.pid} shows what it does"
        return f"{life}; last seen at {report.place}{hint if report.pid else ''}"
    inner = report.stack[-1] if report.stack else "?"
    own = [line for line in report.stack if "/sfed/" in line]
    called = f", called by {own[-1]}" if own and own[-1] != inner else ""
    return f"has been at {report.place} for {report.seconds:.0f} s, in {inner}{called}"
