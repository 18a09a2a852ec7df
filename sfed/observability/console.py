"""What a person sees: a header, progress with an ETA, and a closing table. Needs no torch.

On a terminal a bar moves; in a log there is a plain line per round, and one every half minute
within a long round. With ``--log-level debug`` every process says each of its steps.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console as RichConsole
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from sfed.observability import logs, metrics
from sfed.observability.logs import LOG
from sfed.utils.redaction import mask
from sfed.utils.text import duration, printable

_SECONDS_BETWEEN_REDRAWS = 0.5
_SECONDS_BETWEEN_LINES = 30.0
_MOST_CLIENTS_IN_TABLE = 32
_BEST_OR_WORST = 8
_WIDEST = 1000
_LONG_WAIT = 0.2  # of the seconds of local steps

# Of a round, for logs that are read by programs; metrics.jsonl has all.
_FACTS = (
    metrics.TRAIN_LOSS,
    metrics.EVAL_LOSS,
    metrics.ROUND_SECONDS,
    metrics.TOKENS_PER_SECOND,
)


class Console:
    """Speaks on process 0; the same calls are silent elsewhere."""

    def __init__(self, *, is_main: bool, import_seconds: float = 0.0) -> None:
        self.is_main = is_main
        self._rich = RichConsole(
            file=sys.stdout, highlight=False, markup=False, emoji=False, soft_wrap=True
        )
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._rounds = (0, 0)
        self._scores: tuple[str, ...] = ()
        self._started = self._drawn = time.monotonic()
        self._round_started = self._started
        self._tokens = 0
        self._earlier_share: float | None = None  # of the round's steps, before this start
        self._seconds_of_rounds: list[float] = []
        self._start_up = {metrics.IMPORTS_SECONDS: import_seconds}
        self._phase, self._phase_began = metrics.STARTING_SECONDS, self._started

    def say(self, text: str, facts: Mapping[str, Any] | None = None) -> None:
        """Print a line; ``facts`` are its numbers, for logs that are read by programs."""
        if self.is_main:
            LOG.info(text, extra={"facts": facts or {}})

    def warn(self, text: str) -> None:
        """Print a line that a person should not overlook."""
        if self.is_main:
            LOG.warning(text)

    def enter(self, phase: str, text: str) -> None:
        """The next phase of starting up begins, and ends the one before."""
        self._leave_phase()
        self._phase = phase
        self.say(text)

    def _leave_phase(self) -> None:
        now = time.monotonic()
        earlier = self._start_up.get(self._phase, 0.0)
        self._start_up[self._phase] = earlier + now - self._phase_began
        self._phase_began = now

    def end_of_start(self) -> dict[str, float]:
        """How long each phase of starting up took, now that it is over."""
        self._leave_phase()
        return self._start_up

    def begin_rounds(self, finished: int, total: int, scores: Sequence[str] = ()) -> None:
        """Show that rounds are under way; ``scores`` are shown too, the main one first."""
        self._rounds, self._scores = (finished, total), tuple(scores)
        is_seen = self.is_main and LOG.isEnabledFor(logging.INFO) and not logs.is_json()
        if is_seen and self._rich.is_terminal and finished < total:
            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=30),
                TextColumn("{task.fields[facts]}"),
                TimeElapsedColumn(),
                console=self._rich,
                transient=True,
            )
            waiting = "" if finished else "evaluating"
            self._task = self._bar.add_task(
                waiting, total=float(total), completed=finished, facts=""
            )
            self._bar.start()

    def begin_round(self, round_index: int) -> None:
        """A round begins."""
        self._round_started = self._drawn = time.monotonic()
        self._tokens, self._earlier_share = 0, None
        self._rounds = (round_index, self._rounds[1])

    def step(self, step: int, last: int, read_loss: Callable[[], float], tokens: int) -> None:
        """A local step is done. The loss is read only when it is shown: reading it waits."""
        self._tokens += tokens
        if self._earlier_share is None:
            self._earlier_share = (step - 1) / last
        now = time.monotonic()
        pause = _SECONDS_BETWEEN_REDRAWS if self._bar else _SECONDS_BETWEEN_LINES
        is_shown = self.is_main and now - self._drawn >= pause
        is_detailed = LOG.isEnabledFor(logging.DEBUG)
        if not is_shown and not is_detailed:
            return
        finished, total = self._rounds
        loss, speed = read_loss(), self._tokens / max(now - self._round_started, 1e-9)
        seconds_left = self._seconds_left(finished + step / last)
        eta = "?" if seconds_left is None else duration(seconds_left)
        label = f"round {finished + 1}/{total}"
        text = f"step {step}/{last}  loss {loss:.3f}  {speed:,.0f} tokens/s  ETA {eta}"
        if is_shown:
            self._drawn = now
        if is_shown and self._bar is not None and self._task is not None:
            done = finished + step / last
            self._bar.update(self._task, completed=done, description=label, facts=text)
            is_shown = False
        facts = {
            "round": finished + 1,
            "step": step,
            "loss": loss,
            "tokens_per_second": speed,
            "eta_seconds": seconds_left,
        }
        level = logging.INFO if is_shown else logging.DEBUG
        LOG.log(level, f"{label}  {text}", extra={"facts": facts})

    def end_round(self, event: Mapping[str, Any]) -> None:
        """A round is done: one line that stays."""
        finished, total = event["round"], self._rounds[1]
        self._rounds = (finished, total)
        if finished:
            share = 1 - (self._earlier_share or 0.0)
            self._seconds_of_rounds.append(event[metrics.ROUND_SECONDS] / share)
        parts = [f"round {finished}/{total}" if finished else "before training"]
        parts += [
            f"{name} {event[key]:.4f}"
            for name, key in (
                ("train", metrics.TRAIN_LOSS),
                ("personal", metrics.held_out_key("personal", "loss")),
                ("global", metrics.held_out_key("global", "loss")),
            )
            if event.get(key) is not None
        ]
        parts += [
            f"{kind} {name} {event[key]:.4f}"
            for name in self._scores[:1]
            for kind in ("personal", "global")
            if event.get(key := metrics.held_out_key(kind, name, metrics.UNWEIGHTED)) is not None
        ]
        if (sample := event.get(metrics.SAMPLE)) is not None:
            parts.append(f"({_of_sample(sample, event['clients'])})")
        if finished:
            parts.append(f"{event[metrics.ROUND_SECONDS]:.1f} s")
            if event[metrics.TOKENS_PER_SECOND]:
                parts.append(f"{event[metrics.TOKENS_PER_SECOND]:,.0f} tokens/s")
            if (seconds_left := self._seconds_left(finished)) and finished < total:
                parts.append(f"ETA {duration(seconds_left)}")
        facts = {key: event[key] for key in _FACTS if event.get(key) is not None}
        self.say("  ".join(parts), {"round": finished, **facts})

    def _seconds_left(self, finished: float) -> float | None:
        """At the speed so far, that of this start; None before there is one."""
        made = finished - self._rounds[0] - (self._earlier_share or 0.0)
        if self._seconds_of_rounds:
            per_round = sum(self._seconds_of_rounds) / len(self._seconds_of_rounds)
        elif made > 0:
            per_round = (time.monotonic() - self._round_started) / made
        else:
            return None
        return per_round * (self._rounds[1] - finished)

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
        if not self.is_main:
            return
        what = "held-out loss and scores" if self._scores else "held-out loss"
        clients: Sequence[Mapping[str, Any]] = after["clients"]
        title, sample = f"{what} after round {after['round']}", after.get(metrics.SAMPLE)
        if sample is not None:
            title += f", {_of_sample(sample, clients)}"
            clients = [entry for entry in clients if entry["client"] in set(sample)]
        table = Table(title=title, title_justify="left")
        table.add_column("client")
        scores = self._scores_in(after)
        for column in ("train examples", "before", "after", "change", "global adapter"):
            table.add_column(column, justify="right")
        for kind, name in scores:  # on words of their own, so that a narrow terminal breaks lines
            table.add_column(f"{kind} {name.replace('_', ' ')}", justify="right")
        first = {} if before is None else {entry["client"]: entry for entry in before["clients"]}
        shown = _best_and_worst(clients)
        for position, entry in enumerate(shown):
            if len(shown) < len(clients) and position == len(shown) // 2:
                table.add_section()
            old, new = first.get(entry["client"], {}).get("eval_loss"), entry.get("eval_loss")
            change = f"{100 * (new / old - 1):+.1f} %" if old and new is not None else ""
            table.add_row(
                printable(mask(f"{entry['client']} {names.get(entry['client'], '')}".strip())),
                str(entry["examples"]),
                _number(old),
                _number(new),
                change,
                _number(entry.get("global_loss")),
                *(_number(entry.get(f"{kind}_{name}")) for kind, name in scores),
            )
        self.print_table(table)
        if len(shown) < len(clients):
            self.say(
                f"the {_BEST_OR_WORST} clients with the lowest held-out loss and the "
                f"{_BEST_OR_WORST} with the highest, of {len(clients):,}; all are in metrics.jsonl"
            )

    def _scores_in(self, event: Mapping[str, Any]) -> list[tuple[str, str]]:
        """Kind and name of the scores that the closing table has a column for."""
        return [
            (kind, name)
            for name in self._scores[:2]
            for kind in ("personal", "global")
            if metrics.held_out_key(kind, name) in event
        ]

    def where_the_time_went(self, events: Sequence[Mapping[str, Any]]) -> None:
        """The phases of a run, the longest first, in a line; and CPU seconds of process 0."""
        spent = sorted(metrics.time_spent(events).items(), key=lambda pair: -pair[1])
        shown = [f"{phase} {duration(seconds)}" for phase, seconds in spent if seconds >= 0.5]
        total = duration(sum(seconds for _, seconds in spent))
        used = sum(event.get(metrics.CPU_SECONDS) or 0.0 for event in events)
        self.say(f"time       {total} ({duration(used)} of CPU): {', '.join(shown)}")

    def where_processes_waited(self, events: Iterable[Mapping[str, Any]]) -> None:
        """How long processes waited for others in the local steps, where that was long."""
        shares = metrics.idle_shares(events)
        worst = max(range(len(shares)), key=shares.__getitem__, default=0)
        if len(shares) < 2 or shares[worst] < _LONG_WAIT:
            return
        mean = sum(shares) / len(shares)
        self.say(
            f"waiting    in the local steps processes waited for others {100 * mean:.0f} % of the "
            f"time on average, process {worst} the longest: {100 * shares[worst]:.0f} %"
        )

    def print_table(self, table: Table) -> None:
        """Print a table on process 0; see ``print_table``."""
        if not self.is_main or logs.is_json() or not LOG.isEnabledFor(logging.INFO):
            return
        print_table(self._rich, table)


def print_table(rich: RichConsole, table: Table) -> None:
    """Print a table; where there is no terminal that bounds it, as wide as it is, in ASCII."""
    if not rich.is_terminal:
        table.box = box.ASCII2
        rich.width = _WIDEST
        rich.width = rich.measure(table).maximum
    rich.print(table)


def _of_sample(sample: Sequence[int], clients: Sequence[Mapping[str, Any]]) -> str:
    """Which clients were evaluated, where not all were."""
    return f"a sample of {len(sample):,} of {len(clients):,} clients"


def _best_and_worst(clients: Sequence[Mapping[str, Any]]) -> Sequence[Mapping[str, Any]]:
    """All clients where they fit a table, else those of the lowest and of the highest losses."""
    if len(clients) <= _MOST_CLIENTS_IN_TABLE:
        return clients
    measured = [entry for entry in clients if entry.get("eval_loss") is not None]
    ordered = sorted(measured, key=lambda entry: float(entry["eval_loss"]))
    rest = ordered[_BEST_OR_WORST:]
    return [*ordered[:_BEST_OR_WORST], *rest[-_BEST_OR_WORST:]]


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"
