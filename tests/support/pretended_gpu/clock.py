"""Order of accesses to memory by vector clocks.

A worker is the host (0) or a stream. Each worker counts its own accesses and knows, for every other
worker, up to which of its accesses the work is certainly done. Two accesses of the same bytes by
two workers, at least one of them a write, need such an order; else they are a race.
"""

from __future__ import annotations

from dataclasses import dataclass

HOST_WORKER = 0


class Clock(dict[int, int]):
    """For each worker, up to which access its work is known to be done."""

    def join(self, other: dict[int, int]) -> None:
        """Know what another one knows, too."""
        for worker, time in other.items():
            if time > self.get(worker, 0):
                self[worker] = time

    def tick(self, worker: int) -> int:
        """Count one more access of a worker and return its number."""
        self[worker] = self.get(worker, 0) + 1
        return self[worker]

    def covers(self, access: Access) -> bool:
        """Whether an access is known to be done."""
        return self.get(access.worker, 0) >= access.time


@dataclass(frozen=True)
class Access:
    """One worker reads or writes some bytes of a storage."""

    worker: int
    time: int
    start: int
    end: int
    """Not included."""
    place: str

    def overlaps(self, other: Access) -> bool:
        return self.start < other.end and other.start < self.end

    def contains(self, other: Access) -> bool:
        return self.start <= other.start and other.end <= self.end


class History:
    """The accesses to one storage that a later one may conflict with."""

    def __init__(self) -> None:
        self.reads: list[Access] = []
        self.writes: list[Access] = []

    def add(self, new: Access, known: Clock, *, writes: bool) -> list[Access]:
        """Note an access; returns the earlier ones that it conflicts with.

        Args:
            new: the access.
            known: what its worker knows.
            writes: whether it is a write.
        """
        rivals = self.writes + self.reads if writes else self.writes
        found = [
            old
            for old in rivals
            if old.worker != new.worker and old.overlaps(new) and not known.covers(old)
        ]
        if writes:
            self.writes = [old for old in self.writes if not new.contains(old)]
            self.reads = [old for old in self.reads if not new.contains(old)]
            self.writes.append(new)
        else:
            self.reads = [
                old for old in self.reads if old.worker != new.worker or not new.contains(old)
            ]
            self.reads.append(new)
        return found

    def pending(self, known: Clock) -> list[Access]:
        """The accesses that are not known to be done."""
        return [old for old in self.writes + self.reads if not known.covers(old)]
