"""``sfed conformance FILE.py:NAME``: is this aggregation function the method that it says it is?

Read ``definitions`` first: what each method makes of the clients' factors. ``cases`` are the worked
inputs, ``bugs`` the classes of error that public code has shown, and ``verdict`` compares.
"""
