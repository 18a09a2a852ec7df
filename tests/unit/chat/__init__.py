"""Tests of ``sfed/storage``."""
