"""Tests of ``sfed/federated``."""
