"""Tests of ``sfed/memory``."""
