"""The arithmetic of the hot path, twice: in operations of torch, and as kernels of Triton.

``plain`` is what the numbers are; ``fused`` is faster on a GPU; ``choice`` says which is in use.
"""
