# %% [markdown]
# # 7 · Your own experiment
#
# A routing rule and a widget of your own, from the public pieces, in some twenty lines each.
#
# modlab decides in one place which token is kept, and lets you replace that decision:
# `modlab.routing_override(model, fn)`. It records everything in plain arrays: `modlab.trace`. And its views
# are ordinary [anywidgets](https://anywidget.dev) with traits to link to. That is all this notebook uses.

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
def flatten(items, depth=None):
    """Yield the leaves of nested lists, at most `depth` levels down."""
    for item in items:
        if isinstance(item, (list, tuple)) and depth != 0:
            yield from flatten(item, None if depth is None else depth - 1)
        else:
            yield item


def chunked(values, size):
    # The last chunk may be shorter than the others.
    chunk = []
    for value in values:
        chunk.append(value)
        if len(chunk) == size:
            yield chunk
            chunk = []
    if chunk:
        yield chunk
'''

import pandas as pd
import torch

import modlab
from modlab import lab

lab.quiet()

model, tokenizer = modlab.load(MODEL)
if not modlab.is_converted(model):
    raise modlab.ModlabError(f"{MODEL} is dense. Notebook 2 trains routers for it and saves 'my-mod-model'.")
learned = modlab.trace(model, tokenizer, TEXT)
print(learned)

# %% [markdown]
# ## A routing rule
#
# A rule is a function. It is asked once for each routed layer, with the gates and the positions of all
# tokens, and answers which tokens the layer runs. This one never looks at the gates: it keeps the tokens
# that begin a line, and words that the text has not had before.

# %%
pieces = learned.tokens  # the text of each token
starts_line = [i == 0 or "\n" in pieces[i - 1] for i in range(len(pieces))]
new_word = [piece.strip().isidentifier() and piece not in pieces[:i] for i, piece in enumerate(pieces)]
rule_keeps = torch.tensor([a or b for a, b in zip(starts_line, new_word)])


def my_rule(layer, gate, position_ids):
    """Keep a token that begins a line, or a word that the text has not had before, in every routed layer.

    gate: float32 [batch, tokens], position_ids: int64 [batch, tokens]; returns bool [batch, tokens].
    """
    return rule_keeps.to(gate.device)[position_ids] | (position_ids < 4)


with modlab.routing_override(model, my_rule):
    mine = modlab.trace(model, tokenizer, TEXT)
print(mine)
modlab.widgets.RoutingHeatmap(mine)

# %% [markdown]
# ## Is it any good?
#
# Only a comparison says so: at *your rule's* keep ratio, against the learned routers and against chance.
# `calibrate` moves the thresholds until the routers keep the same share of this text. Chance is drawn
# twenty times. The weights were trained with *their* routers, so any other rule starts with a handicap, and
# this is one short text: read the last two rows as a place to begin, not as a result.

# %%
share = float(mine.keep.mean())
thresholds = dict(model.mod.thresholds)
modlab.calibrate(model, [TEXT], keep_ratio=share, tolerance=0.02, tokenizer=tokenizer)
calibrated = modlab.trace(model, tokenizer, TEXT)
modlab.set_threshold(model, thresholds)

generator = torch.Generator().manual_seed(0)


def chance(layer, gate, position_ids):
    """Keep each token with probability `share`."""
    return torch.rand(gate.shape, generator=generator).to(gate.device) < share


def keep_all(layer, gate, position_ids):
    """Skip nothing."""
    return torch.ones_like(gate, dtype=torch.bool)


def traced(rule):
    """The trace of TEXT under a rule."""
    with modlab.routing_override(model, rule):
        return modlab.trace(model, tokenizer, TEXT)


random = [traced(chance) for _ in range(20)]
everything = traced(keep_all)
rows = {
    "nothing skipped": everything,
    "learned routers, at their own threshold": learned,
    "learned routers, at the rule's keep ratio": calibrated,
    "my rule": mine,
}
table = pd.DataFrame(
    {name: {"kept": t.keep.mean(), "KV saving": t.kv_saving, "loss": t.mean_loss} for name, t in rows.items()}
).T
losses = pd.Series([t.mean_loss for t in random])
table.loc["chance, mean of 20"] = {
    "kept": sum(t.keep.mean() for t in random) / 20,
    "KV saving": sum(t.kv_saving for t in random) / 20,
    "loss": losses.mean(),
}
print(f"chance: loss {losses.min():.2f} to {losses.max():.2f}")
table.round(2)

# %% [markdown]
# ## A widget
#
# A widget is a Python class with traits, and a JavaScript function that draws them: no extension to build,
# no file but this notebook. This one shows what the rule did with the token under the mouse: a bar for each
# routed layer's gate, full where my rule ran the layer, hollow where it skipped it.

# %%
import anywidget
import traitlets


class GateBars(anywidget.AnyWidget):
    """Gates of one token, a bar a routed layer; `cursor` is the token."""

    gate = traitlets.List().tag(sync=True)  # [layer][token], 0 to 1
    keep = traitlets.List().tag(sync=True)
    layers = traitlets.List().tag(sync=True)
    cursor = traitlets.Int(-1).tag(sync=True)

    _esm = """
    export default { render({ model, el }) {
      el.classList.add("gate-bars");
      const draw = () => {
        const t = Math.max(0, model.get("cursor")), keep = model.get("keep");
        el.innerHTML = model.get("gate").map((row, r) => {
          const on = keep[r][t], width = Math.round(260 * row[t]);
          return `<div style="display:flex;gap:8px;align-items:center;height:20px;font-size:13px">
            <span style="width:5em;text-align:right">layer ${model.get("layers")[r]}</span>
            <span style="width:${width}px;height:12px;box-sizing:border-box;border:2px solid #0072b2;
              background:${on ? "#0072b2" : "transparent"}"></span>
            <span>${row[t].toFixed(2)} ${on ? "ran" : "skipped"}</span></div>`;
        }).join("");
      };
      model.on("change:cursor", draw);
      draw();
    } };
    """


def bars(trace):
    """The widget of one trace."""
    return GateBars(gate=trace.gate.tolist(), keep=trace.keep.tolist(), layers=trace.layers)


# %% [markdown]
# `cursor` has the name and the meaning it has in modlab's views, so one `jslink` ties it to them, in the
# browser, without Python. Point at a word: the bars follow.

# %%
import ipywidgets
from IPython.display import display

text = modlab.widgets.TokenText(mine)
my_bars = bars(mine)
ipywidgets.jslink((text, "cursor"), (my_bars, "cursor"))
text.cursor = rule_keeps.nonzero()[-1].item()
display(text)
display(my_bars)

# %% [markdown]
# ## A real model
#
# Routers for SmolLM2-135M ship with modlab, one gate for each KV head of each layer. The bars of its first
# two layers, from the same class: three gates a layer.

# %%
real = lab.real_model()
if real:
    real_trace = modlab.trace(*real, TEXT)
    rows = range(6)
    display(
        GateBars(
            gate=real_trace.gate[rows].tolist(),
            keep=real_trace.keep[rows].tolist(),
            layers=real_trace.layers[:6],
        )
    )

# %% [markdown]
# ## Keep it
#
# `mine.save("mine.npz")` stores the arrays, `modlab.RoutingTrace.load` reads them without a model, and
# `mine.to_html()` is a page that anybody can open. To *train* under another rule, write it as an objective
# or an operator and send it: the rule that routers follow is `modlab/routing/rule.py`, and it is short.
#
# [All notebooks](README.md).
