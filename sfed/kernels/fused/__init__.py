"""The same functions as kernels of Triton. Imports triton; ``choice`` alone imports this folder."""
