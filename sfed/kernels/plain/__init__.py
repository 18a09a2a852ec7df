"""The arithmetic in operations of torch, on any device: what the kernels of ``fused`` must give."""
