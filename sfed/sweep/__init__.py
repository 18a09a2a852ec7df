"""The command ``python -m sfed.sweep``: every configuration of a grid, one after another.

Read ``__main__`` first, then ``leader``.
"""
