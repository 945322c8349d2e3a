"""Less compute a token on real language models: what each way of skipping layers loses, for what work.

Every arm is the product itself, converted and distilled against its own dense self on the same rows:
prompt tokens that leave early (`skip="prompt"`), token-level skipping with keys and values written
(`"written"`, `"sublayers"`, `"mlp"`), MoDification as published, top-k, and static removal of layers or
attentions as the control. Measured are KL to the dense model by position, copying and retrieval over
distances, zero-shot tasks with paired differences, the executed share of a prefill's operations on every
text, and the time of `generate`.

    python -m benchmarks.real_models texts ...   tokenise (on a machine that has the texts)
    python -m benchmarks.depth run ...           arms: distil, measure; a JSON line a row
    python -m benchmarks.depth prefill ...       time of a prompt through generate, dense and leaving
    python -m benchmarks.depth report ...        one result file of all that

Shape letters: B rows, T tokens, D model dim, L layers, V vocabulary.
"""
