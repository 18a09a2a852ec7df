"""Tests of ``sfed/sweep``."""
