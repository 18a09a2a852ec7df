"""Whole runs, of one process and of several."""
