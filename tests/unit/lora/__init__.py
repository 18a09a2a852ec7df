"""Tests of ``sfed/lora``."""
