# %% [markdown]
# # modlab quickstart
#
# Which layers each token of your text runs through, what a threshold costs in loss, and what it saves.
#
# In a **Mixture-of-Depths** model each routed layer has a small router that gives every token a gate between
# 0 and 1. In this demo tokens with a gate below the threshold **p** pass the layer by: they cost no
# computation there and leave nothing in its KV cache. (By default `modlab.convert` routes the cache alone:
# every token runs, and below p its keys and values go once it is not recent. `"demo-kv"` is such a model;
# it costs far less loss, and shows less.)
#
# This is lossy: a higher p saves more and predicts worse. This notebook shows how much, on your text. Run
# all cells (*Run > Run All Cells*); it takes less than a minute on a laptop, without GPU or network.
# Jupyter then shows the end of the notebook; the best part is in the middle:
# [the explorer](#4.-Steer-it). Put your own text in there.
#
# When you want to know more, there is a notebook for each question:
#
# | | |
# | --- | --- |
# | [1 · Convert](1_convert.ipynb) | What does conversion change in a model, and what not? |
# | [2 · Train](2_train.ipynb) | How do routers learn? Watch it, pause it, resume it |
# | [3 · Where tokens go](3_where_tokens_go.ipynb) | Which tokens skip which layers? Change one decision |
# | [4 · Thresholds, live](4_thresholds.ipynb) | Which threshold fits a memory budget? What is written then? |
# | [5 · What it buys](5_what_it_buys.ipynb) | How many bytes and milliseconds, for how much loss? |
# | [6 · Many GPUs](6_many_gpus.ipynb) | Does it train and evaluate on several devices? |
# | [7 · Your own experiment](7_your_own_experiment.ipynb) | How do I try a rule or build a view of my own? |

# %% [markdown]
# ## 1. Load a model, or your own
#
# `"demo"` ships with modlab: a small model trained on Python source. `"demo-dense"` is its control: the
# same start, trained on for as long without skipping. The last section tells how to use another model.

# %%
NAME, DENSE = "demo", "demo-dense"

import modlab
from modlab import measure

model, tokenizer = modlab.load(NAME)
if not modlab.is_converted(model):
    modlab.convert(model)  # adds open routers for the cache: the output stays the same until they are trained

print(f"{model.mod.num_layers} layers, routed: {model.mod.layers}")
print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} million parameters")

# %% [markdown]
# ## 2. Trace a text
#
# Which layers does each token run through? The text can stay as it is for now: the explorer below takes
# yours, pasted or from a file. The demo knows Python best.

# %%
TEXT = '''\
def read_table(path, delimiter=","):
    """Read a text file and return a list of rows.

    Each row is a list of strings. Empty lines are ignored.
    """
    rows = []
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            line = line.strip()
            if not line or line.startswith("#"):
                continue
            row = [cell.strip() for cell in line.split(delimiter)]
            if rows and len(row) != len(rows[0]):
                raise ValueError(f"line {number}: expected {len(rows[0])} cells, got {len(row)}")
            rows.append(row)
    return rows


class Counter:
    """Count how often each key was seen."""

    def __init__(self):
        self.counts = {}

    def add(self, key, amount=1):
        self.counts[key] = self.counts.get(key, 0) + amount

    def most_common(self, n=10):
        items = sorted(self.counts.items(), key=lambda item: item[1], reverse=True)
        return items[:n]
'''

trace = modlab.trace(model, tokenizer, TEXT)
print(trace)
for layer, kept in zip(trace.layers, trace.keep_ratio):
    print(f"layer {layer:2d} keeps {kept:6.1%} of the tokens")

# %% [markdown]
# ## 3. What does a threshold cost, what does it buy?
#
# `sweep` runs the text once for every p. At 0 every gate is open: the same weights, nothing skipped.
# `kv_bytes` is what the cache really allocated. The demo's weights were trained at p = 0.5, so there is no
# gain in quality to expect from going far below it, and above it the loss rises fast.

# %%
sweep = modlab.sweep(
    model,
    tokenizer,
    [TEXT],
    thresholds=[0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9],
    repeats=0,  # 5, for example, adds prefill and decode times; they mean little on a short text
    progress=False,
)
sweep[["threshold", "keep_ratio", "kv_bytes", "kv_saving", "loss", "perplexity"]].round(3)

# %% [markdown]
# ## 4. Steer it
#
# - **Use your own text**: paste it, or open a file. Everything below follows, the curves too.
# - **Drag** the slider: a *preview*, made in the browser from the gates recorded in the last run.
# - **Release** it: the model takes the new threshold and runs the text; the figures are then *measured*.
# - **Find** the threshold for a memory budget: so many MiB of KV cache for so many tokens. The loss beside it
#   says what that costs.
# - Point at a cell or a token to see what each layer does with it; a click locks it, Escape frees it. Arrow
#   keys work too, and a click on a layer's number colours the text by that layer.

# %%
explorer = modlab.widgets.explore(model, tokenizer, TEXT, sweep)
explorer

# %% [markdown]
# ## 5. Generate, and count the bytes
#
# `model.generate` works as always and stores keys and values of kept tokens only. `KVTracker` reads what
# the cache allocates, for any Hugging Face model. Here both models continue the text of the explorer, yours
# if you put one in, at the threshold that it was left at: run this cell again after a change. Neither is a
# good programmer: they are very small.

# %%
import pandas as pd

dense_model, _ = modlab.load(DENSE)
NEW_TOKENS = 80
room = measure.context_length(model) - NEW_TOKENS
inputs = tokenizer(explorer.text, return_tensors="pt", truncation=True, max_length=room)
length = inputs["input_ids"].shape[1]

rows = {}
for label, which in (("dense", dense_model), ("Mixture-of-Depths", model)):
    with modlab.KVTracker(which) as kv:
        output = which.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
    last = kv.frame().query("step == step.max()")
    rows[label] = dict(last[["kept_tokens", "kv_bytes", "dense_kv_bytes"]].sum())
    rows[label]["loss of the text"] = measure.loss(which, tokenizer, [explorer.text])
    print(f"--- {label}")
    print(tokenizer.decode(output[0, length:], skip_special_tokens=True))

table = pd.DataFrame(rows).T
table["kv_saving"] = table.dense_kv_bytes / table.kv_bytes
table.astype({"kept_tokens": int, "kv_bytes": int, "dense_kv_bytes": int}).round(3)

# %% [markdown]
# `kept_tokens` counts tokens over all layers. A growing cache keeps a few free places for coming tokens;
# `kv_bytes` includes them, so the saving is a little smaller than the share of kept tokens alone would
# give.
#
# ## 6. Your own model
#
# Change the names in the first code cell and run all cells again:
#
# - `NAME`: a folder saved by modlab, any local folder of a `transformers` model, or a hub id such as
#   `"Qwen/Qwen3-0.6B"` (needs network); `DENSE`: the model to compare with, for example the same name.
# - A dense model is converted on the spot and, at first, keeps every token: its routers still have to
#   learn. `modlab train --help` and `modlab.train` teach them; `model.save_pretrained(folder)` saves the
#   result.
#
# Keep what you saw: `explorer.trace.save("my_text.npz")`, or a page that opens without Jupyter:

# %%
from pathlib import Path

page = Path("routing.html")
page.write_text(explorer.to_html(), encoding="utf-8")
print(f"{page} written, {page.stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# **Next:** [3 · Where tokens go](3_where_tokens_go.ipynb), which tokens skip and why it matters, or
# [4 · Thresholds, live](4_thresholds.ipynb), a slider for each layer and what is written at two thresholds.
# [All notebooks](README.md).
