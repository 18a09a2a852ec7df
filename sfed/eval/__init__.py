"""The command ``sfed eval``: adapters scored on new data, beside their base model.

Read ``scores.py`` first.
"""
