"""Helpers of the tests: tiny models, processes, network namespaces, the reference."""
