"""Tests of ``sfed/plan``."""
