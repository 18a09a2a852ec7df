"""Differential privacy of what clients share: clipping, noise, the secret key, the accounting."""
