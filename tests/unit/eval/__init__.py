"""Tests of ``sfed/eval``."""
