"""Tests of ``sfed/distributed``."""
