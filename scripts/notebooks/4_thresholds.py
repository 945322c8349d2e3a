# %% [markdown]
# # 4 · Thresholds, live
#
# Choose thresholds by hand, for a keep ratio or for a memory budget, and read what the model then writes.
#
# The threshold **p** is not baked into the weights: `modlab.set_threshold` takes effect at the next
# forward, for all routed layers or for each its own. A model was trained at one p, though (the demo at
# 0.5). Far from it the routers answer a question that they were not asked, so measure the loss where you
# end up.

# %% [markdown]
# ## Use your own model
#
# A hub id or a folder of a converted and trained model, for example the one that [2 · Train](2_train.ipynb)
# saved: `"my-mod-model"`.
#
# The text here is about tokens that skip layers, as the demo's do. In the plain form, which 2 · Train
# trains, every token runs: read "skipped" as "dropped from the cache".

# %%
MODEL = "demo"
TEXT = '''\
import csv
from pathlib import Path


def load_rows(path, required=("name", "price")):
    """Read a CSV file and return its rows as dictionaries."""
    rows = []
    with Path(path).open(newline="", encoding="utf-8") as file:
        for number, row in enumerate(csv.DictReader(file), start=2):
            missing = [key for key in required if not row.get(key)]
            if missing:
                raise ValueError(f"line {number}: no {', '.join(missing)}")
            row["price"] = float(row["price"])
            rows.append(row)
    return rows
'''

import inspect
import textwrap

import pandas as pd

import modlab
from modlab import lab, measure
from modlab.cache import stored as kv_budget

lab.quiet()
model, tokenizer = modlab.load(MODEL)
if not modlab.is_converted(model):
    raise modlab.ModlabError(f"{MODEL} is dense. Notebook 2 trains routers for it and saves 'my-mod-model'.")
SAMPLE = [
    inspect.getsource(textwrap)[:5000]
]  # what thresholds are calibrated on: text like that of later use
trained_at = dict(model.mod.thresholds)

# %% [markdown]
# ## Sliders
#
# The upper slider moves all layers, the others one each. While you drag, the picture is a *preview* from
# the gates recorded in the last run; when you let go, the model runs the text and the figures are
# *measured*. *Find* looks for the p for a share of tokens, or for a KV cache of so many MiB at a context
# length, with real runs over `SAMPLE`. *Use your own text* shows another one.

# %%
sliders = modlab.widgets.Thresholds(model, tokenizer, TEXT, texts=SAMPLE)
sliders

# %% [markdown]
# ## A memory budget
#
# "The cache of a full context has to fit into so many MiB": what p is that, and what does it cost? Give
# `BUDGET` yourself; below it is three quarters of what a dense cache takes. A layer that is not routed
# always stores every token, so there is a floor, and asking for less is refused with the figure.

# %%
CONTEXT = min(model.config.max_position_embeddings, 32_768)
dense_mib = CONTEXT * kv_budget.token_bytes(model) * model.mod.num_layers / 2**20
BUDGET = 0.75 * dense_mib  # MiB; or a figure of your own

rows = {}
for label, p in (("nothing skipped", 1e-6), ("as trained", trained_at), ("budget", None)):
    if p is None:
        sliders.calibrate(kv_mib=BUDGET, context=CONTEXT)
    else:
        modlab.set_threshold(model, p)
    measured = measure.evaluate(model, SAMPLE, tokenizer)
    rows[label] = {
        "p": model.mod.thresholds[model.mod.layers[0]],
        "kept in routed layers": measured.keep_ratio,
        "KV saving": measured.kv_saving,
        "loss of SAMPLE": measured.loss,
        "loss of the text": measure.loss(model, tokenizer, sliders.text),
    }
print(f"dense cache of {CONTEXT:,} tokens: {dense_mib:.1f} MiB, budget {BUDGET:.1f} MiB")
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# One p for all leaves each layer its own keep ratio; `per_layer=True` gives all layers the same keep ratio
# and each its own p. Both can have the same mean. Which one predicts better is an empirical question, so
# ask it:

# %%
rows = {}
for per_layer in (False, True):
    modlab.set_threshold(model, trained_at)
    modlab.calibrate(model, SAMPLE, keep_ratio=0.35, per_layer=per_layer, tolerance=0.02, tokenizer=tokenizer)
    measured = measure.evaluate(model, SAMPLE, tokenizer)
    rows["each layer keeps 35%" if per_layer else "one p, 35% in the mean"] = {
        "loss": measured.loss,
        "KV saving": measured.kv_saving,
        **{f"layer {layer}": ratio for layer, ratio in measured.keep_ratio_by_layer.items()},
    }
modlab.set_threshold(model, trained_at)
pd.DataFrame(rows).T.round(2)

# %% [markdown]
# ## Read it
#
# A loss is a mean over easy and hard tokens; generated text shows more. The same prompt, continued greedily
# at two thresholds, with the tokens that differ marked. The demo is a very small model and no programmer at
# any threshold: compare the two sides, not with what you would have written.

# %%
compare = modlab.widgets.Compare(
    model, tokenizer, TEXT + "\n\ndef total(rows):\n    ", p=(0.2, 0.7), max_new_tokens=48
)
compare.run()
compare

# %%
for side in compare.result:
    print(f"--- p {side['p']}: cache of {side['kv_bytes'] / 2**20:.2f} MiB\n{side['text']}\n")

# %% [markdown]
# Both caches hold the prompt and what was generated. What a threshold buys in time, and where the trade is
# good, is the next notebook.

# %% [markdown]
# ## A real model
#
# Routers for SmolLM2-135M ship with modlab, one gate for each KV head of each layer. Eight people have
# lockers with a number each, other text follows, and then one of the numbers is asked for. **Drag the
# slider**: when you let go, the question is asked with what the cache still holds. At which ratio is the
# number lost? It is one question; [docs/quality.md](../docs/quality.md) counts hundreds.

# %%
real = lab.real_model()
if real:
    from IPython.display import display

    question, answer = lab.locker_question()
    asked = modlab.widgets.CacheView(*real, question, max_new_tokens=5, expect=answer)
    asked.ask(0.0)  # everything kept: what the model can answer at all
    display(asked)

# %% [markdown]
# The same question twice, token by token: with one token in two kept on the left, one in sixteen on the
# right.

# %%
if real:
    gates = asked.trace.gate.ravel()
    p = tuple(float(pd.Series(gates).quantile(1 - 1 / ratio)) for ratio in (2, 16))
    real_compare = modlab.widgets.Compare(*real, question, p=p, max_new_tokens=6)
    real_compare.run()
    display(real_compare)

# %% [markdown]
# **Next:** [5 · What it buys](5_what_it_buys.ipynb). [All notebooks](README.md).
