"""What a person sees: a header, progress with an ETA, and a closing table. Needs no torch.

On a terminal a bar moves; in a log there is a plain line per round, and one every half minute
within a long round.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sfed import metrics

_SECONDS_BETWEEN_REDRAWS = 0.5
_SECONDS_BETWEEN_LINES = 30.0
_MOST_CLIENTS_IN_TABLE = 32


class Console:
    """Speaks on process 0; the same calls are silent elsewhere."""

    def __init__(self, *, speaks: bool) -> None:
        self.speaks = speaks
        self._rich = RichConsole(file=sys.stdout, highlight=False, soft_wrap=True)
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._rounds = (0, 0)
        self._scores: tuple[str, ...] = ()
        self._started = self._drawn = time.monotonic()
        self._round_started = self._started
        self._tokens = 0
        self._seconds_of_rounds: list[float] = []

    def say(self, text: str) -> None:
        """Print a line."""
        if self.speaks:
            self._rich.print(text, markup=False)

    def warn(self, text: str) -> None:
        """Print a line that a person should not overlook."""
        self.say(f"warning: {text}")

    def begin_rounds(self, finished: int, total: int, scores: Sequence[str] = ()) -> None:
        """Show that rounds are under way; ``scores`` are shown too, the main one first."""
        self._rounds, self._scores = (finished, total), tuple(scores)
        if self.speaks and self._rich.is_terminal and finished < total:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                console=self._rich,
                transient=True,
            )
            self._task = self._bar.add_task("", total=float(total), completed=finished, facts="")
            self._bar.start()

    def begin_round(self, round_index: int) -> None:
        """A round begins."""
        self._round_started = self._drawn = time.monotonic()
        self._tokens = 0
        self._rounds = (round_index, self._rounds[1])

    def step(self, step: int, last: int, read_loss: Callable[[], float], tokens: int) -> None:
        """A local step is done. The loss is read only when it is shown: reading it waits."""
        self._tokens += tokens
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_REDRAWS if self._bar else _SECONDS_BETWEEN_LINES
        if not self.speaks or now - self._drawn < pause:
            return
        self._drawn = now
        finished, total = self._rounds
        speed = self._tokens / max(now - self._round_started, 1e-9)
        fraction = step / last
        facts = f"step {step}/{last}  loss {read_loss():.3f}  {speed:,.0f} tokens/s"
        eta = self._eta(finished + fraction)
        if self._bar is not None and self._task is not None:
            text = f"{facts}  ETA {eta}"
            label = f"round {finished + 1}/{total}"
            done = finished + fraction
            self._bar.update(self._task, completed=done, description=label, facts=text)
        else:
            self.say(f"  round {finished + 1}/{total}  {facts}  ETA {eta}")

    def end_round(self, event: Mapping[str, Any]) -> None:
        """A round is done: one line that stays."""
        finished, total = event["round"], self._rounds[1]
        self._rounds = (finished, total)
        if finished:
            self._seconds_of_rounds.append(event[metrics.ROUND_SECONDS])
        parts = [f"round {finished}/{total}" if finished else "before training"]
        parts += [
            f"{name} {event[key]:.4f}"
            for name, key in (
                ("train", metrics.TRAIN_LOSS),
                ("personal", "eval/personal_loss"),
                ("global", "eval/global_loss"),
            )
            if event.get(key) is not None
        ]
        parts += [
            f"{kind} {name} {event[key]:.4f}"
            for name in self._scores[:1]
            for kind in ("personal", "global")
            if event.get(key := f"eval/{kind}_{name}_unweighted") is not None
        ]
        if finished:
            parts.append(f"{event[metrics.ROUND_SECONDS]:.1f} s")
            if event[metrics.TOKENS_PER_SECOND]:
                parts.append(f"{event[metrics.TOKENS_PER_SECOND]:,.0f} tokens/s")
            if finished < total:
                parts.append(f"ETA {self._eta(finished)}")
        self.say("  ".join(parts))

    def _eta(self, finished: float) -> str:
        if not self._seconds_of_rounds:
            within = finished - int(finished)
            if within <= 0:
                return "?"
            per_round = (time.monotonic() - self._round_started) / within
        else:
            per_round = sum(self._seconds_of_rounds) / len(self._seconds_of_rounds)
        return duration(per_round * (self._rounds[1] - finished))

    def end_rounds(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def closing_table(
        self, before: Mapping[str, Any] | None, after: Mapping[str, Any], names: Mapping[int, str]
    ) -> None:
        """Each client before and after, and the global adapter beside it.

        Args:
            before: the event before training, where it was evaluated.
            after: the event of the last evaluated round.
            names: what a client holds, where that is one thing with a name.
        """
        if not self.speaks:
            return
        what = "held-out loss and scores" if self._scores else "held-out loss"
        table = Table(title=f"{what} after round {after['round']}", title_justify="left")
        table.add_column("client")
        scores = [
            (kind, name)
            for name in self._scores[:2]
            for kind in ("personal", "global")
            if f"eval/{kind}_{name}" in after
        ]
        for column in ("examples", "before", "after", "change", "global adapter"):
            table.add_column(column, justify="right")
        for kind, name in scores:  # on words of their own, so that a narrow terminal breaks lines
            table.add_column(f"{kind} {name.replace('_', ' ')}", justify="right")
        first = {} if before is None else {entry["client"]: entry for entry in before["clients"]}
        shown: Sequence[Mapping[str, Any]] = after["clients"]
        for entry in shown[:_MOST_CLIENTS_IN_TABLE]:
            old, new = first.get(entry["client"], {}).get("eval_loss"), entry.get("eval_loss")
            change = f"{100 * (new / old - 1):+.1f} %" if old and new is not None else ""
            table.add_row(
                f"{entry['client']} {names.get(entry['client'], '')}".strip(),
                str(entry["examples"]),
                _number(old),
                _number(new),
                change,
                _number(entry.get("global_loss")),
                *(_number(entry.get(f"{kind}_{name}")) for kind, name in scores),
            )
        self._rich.print(table)
        if len(shown) > _MOST_CLIENTS_IN_TABLE:
            self.say(f"and {len(shown) - _MOST_CLIENTS_IN_TABLE} more clients in metrics.jsonl")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def duration(seconds: float) -> str:
    """Say a duration in words: 45 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
