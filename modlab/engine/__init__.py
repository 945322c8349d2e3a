"""Fast generation: what `model.generate` runs on once `enable_fast_generation` has switched it on.

In the order of the data flow: `switch` (on, off), `refusals`, `loop` and `choice` (tokens), `engine`,
`prefill` and `step` (forwards), `forms`, `prefill_layers`, `step_layers`, `leaving_prefill`, `leaving_step`
and `attention` (what a layer runs), `lending` (how it comes to run it), `tables` and `branch` (what the GPU
reads and how it skips), `ring` and `budget` (K/V where routing decides about the cache alone, and a bound on
it), `transfer` (small numbers between host and GPU). The kernels are in `modlab.kernels`.
"""

from modlab.engine.switch import disable_fast_generation, enable_fast_generation, fast_generation_report

__all__ = ["disable_fast_generation", "enable_fast_generation", "fast_generation_report"]
