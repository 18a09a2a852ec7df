"""What a GPU is asked first: cases that compare it with a CPU, and measurements of its own.

``python -m tests.gpu`` runs all of them, one after another, and writes one JSON file; ``pytest
tests/gpu`` runs the cases and small measurements, those that need a GPU only where one is at hand.
Read first: ``steps``.
"""
