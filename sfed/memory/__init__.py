"""What training costs in memory, and how many clients fit into a pass.

Read ``costs`` first.
"""
