"""The command ``python -m sfed.plan``: does a configuration fit, and how long is a round.

Read ``__main__`` first, then ``planner``.
"""
