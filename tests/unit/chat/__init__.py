"""Tests of ``sfed/chat``."""
