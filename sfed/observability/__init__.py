"""What a run tells people and files: metrics, trackers, console, logs.

Read ``metrics`` first: it names every number of a run.
"""
