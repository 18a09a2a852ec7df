"""Tests of ``sfed/utils``."""
