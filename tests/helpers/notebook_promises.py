"""What each notebook's outputs have to say, beyond that no cell fails. The cells compute it."""

PROMISES = {
    "quickstart": [
        r"--- dense continues:\n\s*\S[\s\S]{30,}--- routed continues:\n\s*\S[\s\S]{30,}",
        r"routing\.html written",
        r"No real model here|Everything kept, it goes on: found",
    ],
    "1_convert": [
        r"weights untouched: True",
        r"24 generated tokens are the same: True",
        r"one text +[\d.]+ +0\.0+ +True",
        r"same names: True, same weights: True",
        r"same logits: True",
    ],
    "2_train": [
        r"Reading 4,096 tokens \.\.\.\n\.\.\. in \d+ s: R² 0\.\d+, keeps \d+%",
        r"Paused after step \d+",
        r"all \d+ weights are equal: True",
        r"modlab_router\.safetensors",
    ],
    "3_where_tokens_go": [r"tokens of 5 texts; routed layers keep \d", r"other decisions changed"],
    "4_thresholds": [r"budget +0\.\d+ +0\.\d+ +1\.\d+", r"one p, 35% in the mean"],
    "5_what_it_buys": [
        r"Mixture-of-Depths: [\d.]+ MiB for \d+ tokens, saving 1\.\d+x",
        r"NVIDIA H200, torch",
        r"dense_continuation",
    ],
    "6_many_gpus": [
        r"2 reports, from cpu",
        r"largest difference of a step's loss: +\d\.\de-0[3-9]|difference of a step's loss: +0\.0e\+00",
        r"all 2 processes end with the same weights: True",
    ],
    "7_your_own_experiment": [r"chance: loss \d", r"my rule"],
}
