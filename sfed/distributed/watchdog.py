"""Where each process is, for whoever waits for it; and an end for a process that hangs.

The training loop says where it is. One background thread repeats that to the others through the
store and hears whether one of them has ended; it also looks after the next process, so that a
process that dies without a word is noticed within seconds. A second one only looks at the clock:
calls into the store or into a collective may never come back when the network is gone, and it must.

A heartbeat file is renewed by the loop itself, never by a thread, which would beat on while the
loop hangs.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sfed.distributed.diagnosis import Report, judge
from sfed.distributed.liveness import Identity, Silence
from sfed.utils.command import say_error
from sfed.utils.errors import UserError
from sfed.utils.launcher import Launch

HEARTBEAT_VARIABLE = "SFED_HEARTBEAT_FILE"
_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_BETWEEN_POSTS = 2.0
_SECONDS_BETWEEN_LOOKS = 0.5
_SECONDS_FOR_OTHERS = 4.0
"""For the others to say where they are once somebody has given up; more than two posts apart."""
_SECONDS_TO_TELL = 2.0
_SECONDS_TO_LEAVE = 20.0
"""For the main thread to end after another process has, or after it has given up itself."""
_SECONDS_TO_LEAVE_THE_DEAD = 2.0
"""Time to leave where another process is gone: nothing can come from it any more."""
_SLACK_SECONDS = 3.0
"""Where the main thread has a deadline of its own it comes first, because it can tidy up."""


class Heartbeat:
    """A file that is touched while the loop gets on; where nobody asked for one, nothing."""

    def __init__(self, path: str | None) -> None:
        """Make the file.

        Raises:
            UserError: where it cannot be made.
        """
        self._path = Path(path) if path else None
        self._last = time.monotonic()
        try:
            self._touch()
        except OSError as error:
            raise UserError(
                f"{HEARTBEAT_VARIABLE} = {path!r} cannot be written ({error.strerror}); name a "
                "file in a folder that this process may write to, or unset it"
            ) from None

    @staticmethod
    def of_environment(local_rank: int) -> Heartbeat:
        """The one that the environment names; the first process of each node keeps it."""
        return Heartbeat(os.environ.get(HEARTBEAT_VARIABLE) if local_rank == 0 else None)

    def renew(self) -> None:
        """Touch the file, at most once a second."""
        now = time.monotonic()
        if now - self._last > _SECONDS_BETWEEN_BEATS:
            self._last = now
            with suppress(OSError):  # it exists; whoever probes it sees that it grows old
                self._touch()

    def _touch(self) -> None:
        if self._path is not None:
            self._path.touch()


@dataclass(frozen=True)
class _Ending:
    """Why this process has to end, whatever it does."""

    reason: str
    grace_seconds: float
    """For the main thread to end by itself."""
    since: float = field(default_factory=time.monotonic)


class Watchdog:
    """Where this process is, and the threads that look after it."""

    def __init__(
        self,
        here: Launch,
        deadline_seconds: float,
        store: Any,
        heartbeat: Heartbeat,
        flight_record: Callable[[], dict[str, Any]],
    ) -> None:
        """Begin to watch.

        Args:
            here: this process among all.
            deadline_seconds: longest stay at one place of the loop, and longest wait for others.
            store: shared by all processes, over a connection that no wait holds.
            heartbeat: renewed whenever the loop gets on.
            flight_record: what torch remembers of the collectives of this process.
        """
        self.debug_folder: Path | None = None
        self.on_pause: Callable[[], None] = lambda: None
        self.is_asked_to_stop = False
        """Whether some process has been asked to stop (``shutdown``)."""
        self._process, self._size, self._deadline = here.rank, here.size, deadline_seconds
        self._store, self._heartbeat, self._flight_record = store, heartbeat, flight_record
        self._place, self._since, self._is_waiting = "starting", time.monotonic(), False
        self._is_bounded = False
        self._endings: dict[str, _Ending] = {}
        self._gave_up_since: float | None = None
        self._last_words = ""
        self._is_told_to_stop = False
        self._signals: int | None = None
        self._identities: dict[int, Identity] = {}
        self._silences: dict[int, Silence] = {}
        self._one_gives_up = threading.Lock()
        self._left = threading.Event()
        self._main = threading.main_thread()
        if here.size > 1:
            own = Identity.of_this_process(socket.gethostname())
            store.set(f"who/{here.rank}", json.dumps(own.as_json()))
            for work in (self._talk, self._look_at_the_clock):
                threading.Thread(target=work, name=f"sfed{work.__name__}", daemon=True).start()

    def at(self, place: str, *, is_bounded: bool = True) -> None:
        """The loop has come to a place; staying there is bounded by the deadline, or is not."""
        self._place, self._since, self._is_bounded = place, time.monotonic(), is_bounded
        self._heartbeat.renew()

    @contextmanager
    def waiting(self, name: str) -> Iterator[None]:
        """While the loop waits for others; after an error it is where it waited in vain."""
        before = self._place, self._is_bounded
        self._place, self._since, self._is_waiting = f"{name} (waiting)", time.monotonic(), True
        yield
        self._is_waiting = False
        self.at(before[0], is_bounded=before[1])

    def pause(self) -> None:
        """Called about once a second while the loop waits."""
        self._heartbeat.renew()
        self.on_pause()

    def whereabouts(self, peer: int) -> str:
        """Where another process was when it last said so, and how to look at it."""
        who = self._identity(peer)
        pid, host = ("?", "?") if who is None else (who.pid, who.host)
        return (
            f"process {peer} is at {_posted(self._store, peer)[1]} (py-spy dump --pid {pid} on "
            f"{host} shows what it does)"
        )

    @property
    def has_somebody_ended(self) -> bool:
        """Whether another process has ended badly, or early."""
        return "ended" in self._endings

    def leave(self) -> None:
        """Stop watching, and tell the others that this process may go."""
        if self._size > 1 and not self._left.is_set():
            key = f"left/{self._process}"
            self._ask_store(lambda: self._store.set(key, ""), _SECONDS_TO_TELL)
        self._left.set()

    def hear_signals(self) -> None:
        """Hear of signals also while the main thread is inside a call that never comes back."""
        self._signals, written = os.pipe()
        for end in (self._signals, written):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(written, warn_on_full_buffer=False)

    def report(self, reason: str | None = None) -> Report:
        """Where this process is now, and why it ends, where it has a reason of its own."""
        frame = sys._current_frames().get(self._main.ident or 0)
        stack = traceback.extract_stack(frame) if frame else []
        stack = [one for one in stack if one.filename != __file__]
        return Report(
            place=self._place,
            seconds=time.monotonic() - self._since,
            is_waiting=self._is_waiting,
            collectives=_enqueued(self._flight_record()),
            stack=[f"{one.filename}:{one.lineno} in {one.name}" for one in stack],
            reason=reason,
        )

    def tell_mistake(self, mistake: str) -> None:
        """Tell the others about an error of a user that only this process met.

        They come to hear of it at the meeting that follows, but for those that wait inside a
        collective for this process: they end, and say why.
        """
        if self._size > 1:
            said = json.dumps([self._process, mistake])
            self._ask_store(lambda: self._store.set("mistake", said), _SECONDS_TO_TELL)

    def tell_end(self, reason: str) -> None:
        """Tell the others that this process ends, so that they do not wait for it.

        From here on it has some seconds to end by itself; a clean-up may hang.
        """
        error = sys.exc_info()[1]
        self._last_words = "" if error is None else "".join(traceback.format_exception(error))
        self._gave_up_since = time.monotonic()
        if self._size > 1:
            report = self.report(reason)
            self._ask_store(lambda: self._publish(report), _SECONDS_TO_TELL)

    def _publish(self, report: Report, *, of: int | None = None) -> None:
        """Say that a process has ended: this one, or one that is gone without having said so."""
        self._store.set(f"ended/{self._process if of is None else of}", report.to_json())
        self._store.set("ended", "")
        if of is not None:
            self._store.set("gone", "")

    def mistake_was_met(self) -> None:
        """Every process has met the mistake that one told of, and the job goes on.

        A later mistake reaches the others at the meeting that follows, and no sooner.
        """
        self._endings["mistake"] = _Ending("a mistake that was met", math.inf)

    def give_up(self, reason: str) -> str:
        """Find out which processes are waited for and where they are; keep a record of this one.

        Takes some seconds, in which the others say where they are.

        Args:
            reason: why this process cannot continue.
        """
        self._gave_up_since = time.monotonic()
        with self._one_gives_up:
            own = self.report()
            kept = self._keep_record(own)
            found: dict[int, Report] = {self._process: own}
            self._ask_store(lambda: self._ask(own, found), 2 * _SECONDS_FOR_OTHERS)
            return judge(reason, dict(found), self._size, kept)

    def _ask_store(self, work: Callable[[], None], seconds: float) -> None:
        """Run work in a thread for a bounded time: without a network it never returns."""

        def ask() -> None:
            with suppress(RuntimeError):  # whoever serves the store has gone
                work()

        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        thread.join(seconds)

    def _ask(self, own: Report, found: dict[int, Report]) -> None:
        """Tell the others where this process is, and fill in where they are."""
        store = self._store
        self._publish(own)
        others = [peer for peer in range(self._size) if peer != self._process]
        first = {peer: _posted(store, peer) for peer in others}
        end = time.monotonic() + _SECONDS_FOR_OTHERS
        while others and time.monotonic() < end:
            for peer in [peer for peer in others if store.check([f"ended/{peer}"])]:
                found[peer] = Report.of_json(store.get(f"ended/{peer}"))
                others.remove(peer)
            time.sleep(_SECONDS_BETWEEN_LOOKS / 5)
        for peer in others:
            last = _posted(store, peer)
            found[peer] = Report(place=last[1], is_silent=last == first[peer])
        for peer, report in found.items():
            who = self._identity(peer)
            report.pid, report.host = (None, None) if who is None else (who.pid, who.host)

    def _keep_record(self, own: Report) -> Path | None:
        """Write what this process did last into the run folder, for whoever looks for the cause."""
        if self.debug_folder is None or not self.debug_folder.parent.is_dir():
            return None
        facts = {"report": json.loads(own.to_json()), "flight_recorder": self._flight_record()}
        try:
            self.debug_folder.mkdir(parents=True, exist_ok=True)
            path = self.debug_folder / f"process-{self._process:04d}.json"
            path.write_text(json.dumps(facts, indent=1), encoding="utf-8")
        except OSError as error:
            logging.getLogger(__name__).warning("no record of this process: %s", error)
            return None
        return self.debug_folder

    def _talk(self) -> None:
        """Repeat where this process is; hear what has become of the others."""
        count = 0
        try:
            while not self._left.is_set():
                count += 1
                self._store.set(f"at/{self._process}", json.dumps([count, self._place]))
                self._look_after_others()
                self._hear()
                self._left.wait(_SECONDS_BETWEEN_POSTS)
        except RuntimeError:  # whoever serves the store has gone
            gone = "the process that serves the launcher's store has gone"
            self._endings["store"] = _Ending(gone, _SECONDS_TO_LEAVE_THE_DEAD)

    def _hear(self) -> None:
        """Whether some process has ended, met a mistake or was asked to stop."""
        store = self._store
        if not self.has_somebody_ended and store.check(["ended"]):
            is_gone = store.check(["gone"])
            grace = _SECONDS_TO_LEAVE_THE_DEAD if is_gone else _SECONDS_TO_LEAVE
            self._endings["ended"] = _Ending("another process has ended", grace)
        if "mistake" not in self._endings and store.check(["mistake"]):
            process, text = json.loads(store.get("mistake"))
            if process != self._process:
                self._endings["mistake"] = _Ending(f"process {process}: {text}", _SECONDS_TO_LEAVE)
        self.is_asked_to_stop = self.is_asked_to_stop or store.check(["stop"])

    def _look_after_others(self) -> None:
        """Say of a process that is gone that it has ended, because it did not.

        Each process looks after the next one; one that was told to stop, after all others: its
        launcher has missed somebody.
        """
        peers = {(self._process + 1) % self._size}
        if self._is_told_to_stop:
            peers = set(range(self._size))
        for peer in peers - {self._process}:
            reason = self._why_gone(peer)
            # Asked afterwards: a process says that it leaves before it is gone.
            if reason is not None and not self._is_over(peer):
                place = str(_posted(self._store, peer)[1])
                self._publish(Report(place=place, reason=reason), of=peer)

    def _is_over(self, peer: int) -> bool:
        """Whether a process has said that it ends or leaves."""
        return any(self._store.check([f"{key}/{peer}"]) for key in ("ended", "left"))

    def _identity(self, peer: int) -> Identity | None:
        """Which process another one is; None where it has not said so yet."""
        key = f"who/{peer}"
        if peer not in self._identities and self._store.check([key]):
            self._identities[peer] = Identity(**json.loads(self._store.get(key)))
        return self._identities.get(peer)

    def _why_gone(self, peer: int) -> str | None:
        """What shows that a process is gone; None where nothing does."""
        who = self._identity(peer)
        is_gone = None if who is None else who.is_gone()
        if is_gone:
            return "it is gone without a word, as after kill -9 or out of memory"
        if is_gone is not None:
            return None
        silence = self._silences.setdefault(peer, Silence())
        count = int(_posted(self._store, peer)[0])
        if silence.is_too_long(count, is_told_to_stop=self._is_told_to_stop):
            return "it gives no sign of life: it, its machine or the network is gone"
        return None

    def _look_at_the_clock(self) -> None:
        """End this process where its main thread stays anywhere for too long."""
        while not self._left.wait(_SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            self._hear_signals()
            if self._gave_up_since is not None:
                if now - self._gave_up_since > _SECONDS_TO_LEAVE:
                    say_error(self._last_words.rstrip())  # which nobody has seen yet
                    os._exit(1)
                continue
            stays = now - self._since
            limit = self._deadline + (_SLACK_SECONDS if self._is_waiting else 0.0)
            if (self._is_bounded or self._is_waiting) and stays > limit:
                self._end(f"no progress for {self._deadline:g} s (federated.deadline_seconds)")
            for ending in list(self._endings.values()):
                if min(stays, now - ending.since) > ending.grace_seconds:
                    self._end(ending.reason)

    def _hear_signals(self) -> None:
        with suppress(BlockingIOError):
            if self._signals is not None and os.read(self._signals, 64):
                self._is_told_to_stop = True

    def _end(self, reason: str) -> NoReturn:
        verdict = self.give_up(reason)
        say_error(f"sfed: process {self._process}: {verdict}")
        os._exit(1)


def _posted(store: Any, peer: int) -> list[Any]:
    """What a process said last: [how often it has, where it was]."""
    key = f"at/{peer}"
    said: list[Any] = json.loads(store.get(key)) if store.check([key]) else [0, "starting"]
    return said


def _enqueued(record: dict[str, Any]) -> int:
    """How many collectives a process has begun."""
    groups = record.get("pg_status", {})
    return max((int(one["last_enqueued_collective"]) for one in groups.values()), default=0)
