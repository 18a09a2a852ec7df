"""Tests of ``sfed/privacy``."""
