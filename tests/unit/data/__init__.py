"""Tests of ``sfed/data``."""
