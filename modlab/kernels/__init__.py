"""GPU kernels, each with its reference in the same file; used by the engine alone."""
