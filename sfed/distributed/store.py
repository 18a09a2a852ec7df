"""What is used of the processes' key-value store, and a store of one process. Needs no torch."""

from __future__ import annotations

from typing import Protocol


class Store(Protocol):
    """What is used of a key-value store; none of it waits for a key."""

    def set(self, key: str, value: str) -> None:
        """Put a value."""

    def get(self, key: str) -> bytes:
        """Read a value that is there."""

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""

    def add(self, key: str, amount: int) -> int:
        """Add to a whole number, 0 at first; returns the sum."""


class LocalStore:
    """The store of a single process: nobody else reads it."""

    def __init__(self) -> None:
        self._values: dict[str, str] = {}

    def set(self, key: str, value: str) -> None:
        """Put a value."""
        self._values[key] = value

    def get(self, key: str) -> bytes:
        """Read a value that is there."""
        return self._values[key].encode()

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""
        return all(key in self._values for key in keys)

    def add(self, key: str, amount: int) -> int:
        """Add to a whole number, 0 at first; returns the sum."""
        self._values[key] = str(int(self._values.get(key, "0")) + amount)
        return int(self._values[key])
