"""Federated training: rounds of local steps, averaging, evaluation and checkpoints.

Read ``rounds`` first: it is the loop. ``session`` is one run from configuration to adapters.
"""
