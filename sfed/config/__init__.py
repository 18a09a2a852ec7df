"""The configuration of a run: every key, how files and arguments become one, differences.

Read ``schema`` first. Nothing here needs torch.
"""
