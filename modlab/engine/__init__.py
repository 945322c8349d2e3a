"""Fast generation: what `model.generate` runs on once `enable_fast_generation` has switched it on.

In the order of the data flow: `switch` (on, off), `refusals`, `loop` and `choice` (tokens), `engine` (prefill
and steps), `layers` and `attention` (what a layer runs), `tables` and `branch` (what the GPU reads and how it
skips).
The kernels are in `modlab.kernels`.
"""

from modlab.engine.switch import disable_fast_generation, enable_fast_generation, fast_generation_report

__all__ = ["disable_fast_generation", "enable_fast_generation", "fast_generation_report"]
