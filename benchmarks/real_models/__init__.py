"""K/V routing on real language models: how routers are made, and what they lose.

The base stays frozen. Every KV head of every layer (or every layer) gets a gate; a key that has left the
window of recent tokens is kept where its gate is above the threshold. Gates are first regressed on how
much attention a key gets when the text is repeated (`scores`), then distilled against the same model with
routing off (`distil`). `evaluate` measures with hard eviction: KL by position, copying and retrieval over
distances, at equal bytes against the controls of `controls`.

    python -m benchmarks.real_models texts    tokenise, on a machine that has the texts
    python -m benchmarks.real_models run      fit, distil, evaluate, on a machine with a GPU
    python -m benchmarks.real_models quick    fit routers by the package, timed; `measure` says what they lose

Shape letters: B rows, T tokens, N query heads, G KV heads, H head dim, D model dim, L layers,
V vocabulary, K hidden units of a gate, A gates of a layer (G, or 1).
"""
