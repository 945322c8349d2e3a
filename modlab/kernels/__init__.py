"""GPU kernels, each with its reference in the same file; for fast generation and attention outside it."""
