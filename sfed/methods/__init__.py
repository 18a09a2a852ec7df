"""The federated methods: what trains, what is averaged, the scaling factor, the cohort.

Read ``method`` first: it is the table of all methods.
"""
