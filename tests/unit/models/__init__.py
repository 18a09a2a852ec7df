"""Tests of ``sfed/models``."""
