"""The sweep's own processes, one for each of the launcher's: they agree on what to run, and run it.

Every process starts a child for each run. None of them ever waits without looking: for the life
of its child, and for a sign of life of the others.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from types import FrameType
from typing import Any

from sfed.config.schema import Config
from sfed.distributed.store import LocalStore, Store
from sfed.files.silos import num_clients_of
from sfed.sweep.run_process import End, RunProcess, prepare
from sfed.utils.launcher import launch

_SECONDS_BETWEEN_LOOKS = 0.1
_SECONDS_BETWEEN_BEATS = 1.0
_SECONDS_TO_START = 600.0
_SECONDS_OF_SILENCE = 60.0
"""A process of the sweep that gave no sign of life for so long is gone."""
_SECONDS_OF_GRACE = 5.0
"""After a failure elsewhere: for the own child to notice, and again after SIGTERM."""
_SECONDS_OF_LAG = 120.0
"""Longest time between the ends of the children of one run, where none of them failed."""


class LostProcessError(RuntimeError):
    """Another process of the sweep is gone, so the sweep ends."""


class Workers:
    """The sweep's own processes, one for each of the launcher's."""

    def __init__(self) -> None:
        here = launch()
        self.rank, self.size = here.rank, here.size
        self.local_rank, self.local_size = here.local_rank, here.local_size
        self._is_stopping = False
        self._store: Store = LocalStore()
        self._left = threading.Event()
        self._beats: dict[int, tuple[int, float]] = {}

    @property
    def is_main(self) -> bool:
        """Whether this is process 0, which decides and speaks."""
        return self.rank == 0

    @contextmanager
    def met(self) -> Iterator[None]:
        """Start the fork server, meet the others, and take note of requests to stop."""
        handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
        prepare()
        for number in handlers:
            signal.signal(number, self._on_signal)
        beating = threading.Thread(target=self._beat, daemon=True)
        if self.size > 1:
            self._store = self._meet()
            beating.start()
        try:
            yield
        finally:
            self._left.set()
            if beating.is_alive():
                beating.join(2 * _SECONDS_BETWEEN_BEATS)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def _meet(self) -> Store:
        from sfed.distributed import rendezvous

        store = rendezvous.open_store(self.rank, self.size, _SECONDS_TO_START)
        return rendezvous.prefixed(store, "sweep")

    def _on_signal(self, _signal: int, _frame: FrameType | None) -> None:
        self._is_stopping = True  # nothing else: the handler may interrupt any line

    def _beat(self) -> None:
        # Where whoever serves the store is gone, the main thread says so.
        with suppress(RuntimeError):
            while not self._left.wait(_SECONDS_BETWEEN_BEATS):
                self._store.add(f"beats/{self.rank}", 1)

    def tell(self, key: str, value: Any = None) -> None:
        """Tell the other processes."""
        self._store.set(key, json.dumps(value))

    def is_told(self, key: str) -> bool:
        """Whether somebody has told."""
        return self._store.check([key])

    def is_asked_to_stop(self) -> bool:
        """Whether this or another process was asked to stop; lets the others know."""
        if self._is_stopping:
            self.tell("stop")
        return self.is_told("stop")

    def count(self, key: str) -> int:
        """One more than anybody was told before, over all processes."""
        return self._store.add(key, 1)

    def hear(self, key: str, speaker: int = 0) -> Any:
        """Wait until it is told, for as long as its speaker lives."""
        while not self.is_told(key):
            self.is_asked_to_stop()
            self._must_live(speaker)
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        return json.loads(self._store.get(key))

    def is_lost(self, error: RuntimeError) -> bool:
        """Whether an error says that another process of the sweep, or their store, is gone."""
        if isinstance(error, LostProcessError) or self.size == 1:
            return isinstance(error, LostProcessError)
        from sfed.distributed import shutdown

        return shutdown.is_lost_contact(error)

    def _must_live(self, process: int) -> None:
        count, now = self._store.add(f"beats/{process}", 0), time.monotonic()
        known, since = self._beats.get(process, (-1, now))
        if process != self.rank and count == known and now - since > _SECONDS_OF_SILENCE:
            raise LostProcessError(
                f"process {process} of the sweep gave no sign of life for {_SECONDS_OF_SILENCE:g} s"
            )
        if count != known:
            self._beats[process] = (count, now)

    def run(self, index: int, config: Config) -> list[End]:
        """Run one configuration to its end. Collective.

        Returns:
            On process 0 how each child ended, the cause of a failure first; elsewhere nothing.
        """
        taking_part = min(self.size, num_clients_of(config) or self.size)
        cell = f"cell-{index}"
        if self.rank < taking_part:
            child = RunProcess(config, self._environment(cell, taking_part))
            end = self._watch(cell, taking_part, child)
            self.tell(
                f"{cell}/end/{self.rank}", asdict(end) | {"order": self.count(f"{cell}/ends")}
            )
        if not self.is_main:
            return []
        ends = [self.hear(f"{cell}/end/{peer}", speaker=peer) for peer in range(taking_part)]
        ends.sort(key=lambda end: (end["code"] >= 0, end["is_consequence"], end.pop("order")))
        return [End(**end) for end in ends]

    def _environment(self, cell: str, taking_part: int) -> dict[str, str]:
        """Where a child stands: as its parent, among those that take part."""
        first_of_node = self.rank - self.local_rank
        found = {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "WORLD_SIZE": str(taking_part),
            "LOCAL_WORLD_SIZE": str(min(self.local_size, taking_part - first_of_node)),
            "SFED_GROUP": cell,
        }
        # The store is there already: the launcher's, or that of the sweep's process 0.
        return found | ({"TORCHELASTIC_USE_AGENT_STORE": "True"} if self.size > 1 else {})

    def _watch(self, cell: str, taking_part: int, child: RunProcess) -> End:
        """Wait for the end of the child, and end it where another's end makes it pointless."""
        try:
            noticed: float | None = None
            while child.is_alive():
                time.sleep(_SECONDS_BETWEEN_LOOKS)
                # Process 0 looks at those that take part, they look at process 0.
                for peer in range(taking_part if self.is_main else 1):
                    self._must_live(peer)
                if self.is_asked_to_stop():
                    child.ask_to_end()
                if noticed is None and self.is_told(f"{cell}/first-end"):
                    noticed = time.monotonic()
                failed = noticed is not None and self.is_told(f"{cell}/failed")
                patience = _SECONDS_OF_GRACE if failed else _SECONDS_OF_LAG
                if noticed is not None and time.monotonic() > noticed + patience:
                    child.end(_SECONDS_OF_GRACE)
            end = child.tell_end(self.rank)
            self.tell(f"{cell}/first-end")
            if end.code:
                self.tell(f"{cell}/failed")
            return end
        finally:
            child.end(0.0)
