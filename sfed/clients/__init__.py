"""The state of the clients of a process: flat vectors, optimizer state, host offload.

Read ``store`` first.
"""
