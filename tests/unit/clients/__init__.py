"""Tests of ``sfed/clients``."""
