"""Tests of ``sfed/doctor``."""
