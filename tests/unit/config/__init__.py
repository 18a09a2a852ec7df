"""Tests of ``sfed/config``."""
