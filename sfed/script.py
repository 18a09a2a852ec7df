"""The old name of ``json_entry``: environments that were installed before start it by this name."""

from sfed.json_entry import main, offer

__all__ = ["main", "offer"]
