"""The command ``python -m sfed.bench``: the trainer beside stock PEFT, timed in turns.

Read ``__main__`` first, then ``compare`` and ``variants``.
"""
