"""Benchmarks: dense and Mixture-of-Depths side by side in one run, as flat JSON rows that say what they are.

    modlab bench                                            lists the cases
    modlab bench prefill decode                             runs them on this machine
    modlab bench generate --device cuda --shape llama-3-8b --context 4096 32768
    modlab bench speed --device cuda                        everything in docs/results.md about one GPU
    modlab bench speed_kv --device cuda --shape llama-3-8b  K/V routing there, a gate a layer and one a head
    modlab bench speed_leave --device cuda --shape coder-1.5b  prompts that leave the model early
    modlab bench --plot RESULT.json                         speed-up against keep ratio, as a page

Cases measure the dense model and all Mixture-of-Depths variants in turn, round after round in rotating order,
so that whatever else the machine does hits all of them, and report medians with the fastest and the slowest
round; `rounds` in a row says how many. (Memory, throughput, growth and baselines: one round, or the steps of
one run.) The two models share their weights. Which tokens are kept is forced by `routing_override` with
seeded random masks of an exact ratio, except in `demo`, which routes by its trained gates.

`ideal` is what the skipped work alone would give, see `ideal.py`.

In the order of the data flow: `registry` (what a case is), `models`, `clock`, `ideal`, `rows`; the cases in
`ordinary`, `fast`, `limits`, `training`, `growth`, `speed`, `speed_kv`, `speed_leave`; then `results` and
`command`.
"""

from modlab.bench.command import main

__all__ = ["main"]
