"""Tests of ``sfed/report``."""
