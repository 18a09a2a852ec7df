"""Tests of ``sfed/bench``."""
