"""The command ``sfed doctor``: whether this machine, or these machines, train correctly.

Read ``examination`` first; each check is one function of ``machines``, ``links``, ``trainings``,
``memory`` or ``faults``.
"""
