"""Tests of ``sfed/export``."""
