"""Tests of ``sfed/methods``."""
