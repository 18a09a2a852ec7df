"""The command ``sfed export``: adapters of any checkpointed round as folders for other software.

Read ``source.py`` first: what of a run folder is needed, without its data.
"""
