"""Tests of ``sfed/observability``."""
