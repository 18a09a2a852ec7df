"""Lockstep: under a sharded backbone every process makes equally many passes.

ZeRO-3 gathers each layer's weights from all processes, so a process that is done early makes
shadow passes until the last one is done. How many units of work (optimizer steps, batches) each
process has follows from the sizes of the clients' data, which every process knows: nothing is
communicated. Training, evaluation and generation run by this one schedule.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence

from sfed.distributed.shutdown import StopRequest
from sfed.federated.context import Group, Run


class Lockstep:
    """The schedule of one phase of a round on this process."""

    def __init__(
        self,
        run: Run,
        stop: StopRequest,
        phase: str,
        groups: Sequence[Sequence[Group]],
        units: Callable[[Group], range],
    ) -> None:
        """Schedule the units of all processes.

        Args:
            run: the run.
            stop: is asked before each unit whether to stop there.
            phase: what this is and what its units are, such as "round 3, step".
            groups: the groups of each process, in their order.
            units: the units of work that a group has still to do.
        """
        self._stop, self._phase = stop, phase
        self.groups = groups[run.world.rank]
        self._units = {group: units(group) for group in self.groups}
        self._done, self._most = 0, 0
        if run.backbone.sharding.is_sharded:
            self._most = max(sum(len(units(group)) for group in own) for own in groups)
        self.is_stopped = False
        """Whether somebody asked to stop before all was done."""
        self.shadow_seconds = 0.0
        """Seconds of shadow units, in which this process does nothing of its own."""

    def units(self, group: Group) -> Iterator[int]:
        """Yield the numbers of a group's units, until a stop."""
        units = self._units[group]
        for number in units:
            if self._stops_at(f"{self._phase} {number + 1} of {units.stop}"):
                return
            yield number
            self._done += 1

    def shadow(self, make_passes: Callable[[], None]) -> None:
        """Make shadow units, which touch no client, until all processes are done or stopped."""
        started = time.monotonic()
        for number in range(self._done, self._most):
            if self._stops_at(f"{self._phase} {number + 1} of {self._most}, a shadow pass"):
                break
            make_passes()
        self.shadow_seconds += time.monotonic() - started

    def _stops_at(self, place: str) -> bool:
        self.is_stopped = self.is_stopped or self._stop.due(place)
        return self.is_stopped
