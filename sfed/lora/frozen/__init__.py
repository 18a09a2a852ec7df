"""Frozen linear layers: as they are, as nf4 or int8 codes, and with products in FP8."""
