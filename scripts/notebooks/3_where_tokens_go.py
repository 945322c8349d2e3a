# %% [markdown]
# # 3 · Where tokens go
#
# Which tokens of a text skip which layers: in one sentence, by class and position over a corpus, and for
# one token.
#
# Everything here is recorded from real runs, nothing is estimated. Two cautions. A gate says what a router
# does, not why. And the routers of the demo are those of *one* training run of a small model: another run
# may divide the work among its layers differently.

# %% [markdown]
# ## Use your own model and your own text
#
# A hub id or a folder of a converted and trained model, for example the one that [2 · Train](2_train.ipynb)
# saved: `"my-mod-model"`. And any text, here or in the explorer below (*Use your own text*): the demo knows
# Python; other text runs, too, with a higher loss.
#
# The text here is about tokens that skip layers, as the demo's do. In the plain form, which 2 · Train
# trains, every token runs: read "skipped" as "dropped from the cache".

# %%
MODEL = "demo"
TEXT = '''\
class Inventory:
    """Count the items on each shelf."""

    def __init__(self, shelves):
        self.items = {shelf: 0 for shelf in shelves}

    def move(self, source, target, amount=1):
        # Never more than there are.
        amount = min(amount, self.items[source])
        self.items[source] -= amount
        self.items[target] += amount
        return amount

    def total(self):
        return sum(self.items.values())
'''

import argparse
import bisect
import inspect
import json
import statistics
import textwrap

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import modlab
from modlab import figures, lab, published

lab.quiet()
model, tokenizer = modlab.load(MODEL)
if not modlab.is_converted(model):
    raise modlab.ModlabError(f"{MODEL} is dense. Notebook 2 trains routers for it and saves 'my-mod-model'.")

# %% [markdown]
# ## One text
#
# Each column of the picture is a token, each row a routed layer. A full cell ran; a thin line passed by;
# the colour is the gate. Point at a cell or a word: the same token is marked everywhere on this page, and
# *its* path through the depth is drawn. A click locks it, Escape frees it. Drag the threshold for a preview,
# release it to measure. *Use your own text* puts another one in; run the cells below again then.

# %%
explorer = modlab.widgets.explore(model, tokenizer, TEXT)
explorer

# %% [markdown]
# The words of the text that the routed layers keep least, and most, by their mean keep ratio:

# %%
trace = explorer.trace
print(trace)
words = pd.DataFrame({"token": trace.tokens, "layers that ran it": trace.keep.sum(axis=0)})
words = words.iloc[model.mod.config.keep_first :].groupby("token")["layers that ran it"].agg(["mean", "size"])
words = words.rename(columns={"size": "times", "mean": f"mean of {len(trace.layers)} routed layers"})
words.index = words.index.map(repr)
words = words.sort_values(list(words.columns), ascending=[True, False])
pd.concat([words.head(8), words.tail(8)]).round(2)

# %% [markdown]
# ## A corpus
#
# One text is an anecdote. Below, some thousand tokens of Python's own standard library are run and counted,
# by the class of each token and by its position. Every number comes with its count: do not read much
# into a class of ten tokens. Put your own texts into `CORPUS`.

# %%
CORPUS = [inspect.getsource(module)[:6000] for module in (argparse, bisect, json, statistics, textwrap)]
counted = modlab.aggregate_routing(model, tokenizer, CORPUS, seq_len=512, progress=False)
print(f"{counted.tokens:,} tokens of {counted.texts} texts; routed layers keep {counted.keep_ratio:.1%}")
counted.widget()

# %%
table = counted.by_class().query("tokens >= 50").sort_values("mean")
figure = go.Figure()
for column, name in ((c, c.replace("_", " ")) for c in table.columns if c.startswith("layer_")):
    figure.add_bar(y=table.index, x=table[column] / len(counted.layers), name=name, orientation="h")
figure.update_layout(
    template=figures.template(),
    barmode="stack",
    title="Which layers run a token of each class (classes of 50 tokens or more)",
    legend_traceorder="normal",
    xaxis={
        "title": "mean keep ratio of the routed layers (all = 100%)",
        "tickformat": ".0%",
        "range": [0, 1],
    },
)
figure

# %% [markdown]
# ## In a real model
#
# The demo is small, and its tokens skip layers. This is a real one, measured elsewhere and committed: of
# which tokens routers that shipped for SmolLM2 kept keys and values, four times fewer than the dense model
# in long texts, and what each class loses by it. Lines are one standard error over tokens: where one crosses
# zero, nothing is shown to be lost.

# %%
real = published.token_classes().query("routers == 'smollm2-kv' and tokens >= 40")
figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
for text, rows in real.groupby("text", sort=False):
    colour = figures.COLOURS[len(figure.data) // 2]
    common = {"x": rows["token_class"], "name": text, "legendgroup": text, "marker_color": colour}
    lines = {"type": "data", "array": rows["loss_excess_stderr"]}
    figure.add_bar(y=rows["kept"], row=1, col=1, **common)
    figure.add_bar(y=rows["loss_excess"], error_y=lines, showlegend=False, row=2, col=1, **common)
figure.update_yaxes(title="kept", tickformat=".0%", row=1, col=1)
figure.update_yaxes(title="lost (nats a token)", row=2, col=1)
figure.update_layout(template=figures.template(), height=480, title="Which tokens SmolLM2's routers keep")
figure

# %% [markdown]
# ## Change one decision
#
# What did a layer do for a token? Click a cell: the token is forced through the layer, or past it, and the
# model runs the text again. You see what that did to the loss, to the next token's probabilities, and to
# the decisions of later layers, which see another state. A second click undoes it. The view is linked to the
# explorer above: a text that is put into one of them is run by both.

# %%
flip = modlab.widgets.CellFlip(model, tokenizer, explorer.text)
links = modlab.widgets.link(explorer, flip, thresholds=False)
flip

# %% [markdown]
# The same from Python, for every skipped layer of one token: what would it have gained?

# %%
trace = modlab.trace(model, tokenizer, flip.text)
skipping = [t for t in range(len(trace.tokens)) if not trace.keep[:, t].all()] or [len(trace.tokens) - 1]
token = skipping[min(15, len(skipping) - 1)]
rows = {}
for row, layer in enumerate(trace.layers):
    flip.reset()
    flip.wait()
    flip.flip(layer, token)
    flip.wait()
    rows[f"layer {layer}"] = {
        "it ran": bool(trace.keep[row, token]),
        "gate": trace.gate[row, token],
        "loss": flip.effect["loss"],
        "change": flip.effect["loss"] - flip.effect["loss_before"],
        "other decisions changed": flip.effect["others"],
    }
flip.reset()
flip.wait()
print(
    f"token {token}, {trace.tokens[token]!r}: mean loss of the text after the opposite decision in one layer"
)
table = pd.DataFrame(rows).T.infer_objects()
table.round({"gate": 3, "loss": 4, "change": 4})

# %% [markdown]
# Changes of a few thousandths of a nat, up and down, are the rule: most decisions hardly matter for the
# text as a whole, which is why skipping is possible.

# %% [markdown]
# ## A real model
#
# Routers for SmolLM2-135M ship with modlab, one gate for each KV head of each layer. A text of 8,192 tokens,
# its whole context, and what each of the 90 heads keeps of it. Reading it takes a while without a GPU, and so
# does each release of the slider; dragging does not.

# %%
real = lab.real_model()
if real:
    from IPython.display import display

    ids = real[1](inspect.getsource(argparse) + inspect.getsource(statistics))["input_ids"][:8192]
    print(f"Reading {len(ids):,} tokens ...", flush=True)
    display(modlab.widgets.CacheView(*real, real[1].decode(ids)))

# %% [markdown]
# **Next:** [4 · Thresholds, live](4_thresholds.ipynb). [All notebooks](README.md).
