"""Tests of ``sfed/files``."""
