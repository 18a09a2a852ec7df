"""Tests of single files, in the folders of ``sfed/``."""
