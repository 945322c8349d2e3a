# %% [markdown]
# # 1 · Convert
#
# What conversion adds to a model, the proof that it changes no output, and where a model has room to skip.
#
# A **Mixture-of-Depths** model does not treat all tokens alike. `modlab.convert` prepares any Hugging Face
# causal language model for that: some of its layers get a *router*, a vector as long as the model is wide,
# that gives every token a gate between 0 and 1. A token whose gate is below the threshold **p** leaves
# something out: by default its place in the layer's cache, once it is no longer recent; in other forms the
# whole layer, its attention or its MLP. Right after conversion all gates are open, so nothing is left out
# and nothing is saved. That is the point: you start from exactly the model you had, and
# [training](2_train.ipynb) decides what to give up.

# %% [markdown]
# ## Use your own model
#
# Put a hub id (`"Qwen/Qwen3-0.6B"`) or a folder here and run all cells. `"demo-dense"` ships with modlab: 9
# million parameters, trained on Python source; it needs no network.

# %%
MODEL = "demo-dense"
TEXT = '''\
def moving_average(values, window):
    """Return the mean of each run of `window` neighbours."""
    if window < 1:
        raise ValueError("window must be positive")
    total = sum(values[:window])
    means = [total / window]
    for old, new in zip(values, values[window:]):
        total += new - old
        means.append(total / window)
    return means
'''

import pandas as pd
import plotly.graph_objects as go
import torch

import modlab
from modlab import figures, lab

lab.quiet()
model, tokenizer = modlab.load(MODEL)
if modlab.is_converted(model):
    modlab.revert(model)
inputs = tokenizer(TEXT, return_tensors="pt").to(model.device)
print(f"{type(model).__name__}: {sum(p.numel() for p in model.parameters()):,} parameters, {model.dtype}")

# %% [markdown]
# ## What is added
#
# Remember the dense model's weights and its output, then convert. It happens in place: no layer is copied,
# no weight is touched, and the names of the weights stay.

# %%
before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
with torch.no_grad():
    dense_logits = model(**inputs).logits
generate = {"max_new_tokens": 24, "do_sample": False}
dense_tokens = model.generate(**inputs, **generate)

# The plain form, but for a short text: 16 recent tokens always stay in the cache, not 128.
modlab.convert(model, modlab.MoDConfig(keep_recent=16))

after = model.state_dict()
added = {name: tuple(tensor.shape) for name, tensor in after.items() if name not in before}
print(f"routed layers: {model.mod.layers} of {model.mod.num_layers}")
print(f"weights untouched: {all(torch.equal(after[name], before[name]) for name in before)}")
print(f"added: {sum(after[name].numel() for name in added):,} parameters, for example")
for name, shape in list(added.items())[:2]:
    print(f"    {name}  {shape}")

# %% [markdown]
# ## The proof
#
# Not "close": equal, number by number. One thing differs in the last digits: in a padded batch the routed
# layers build their own attention mask, and the sums are rounded in another order.

# %%
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
batch = tokenizer([TEXT, TEXT[:90]], return_tensors="pt", padding=True, padding_side="left")
batch = batch.to(model.device)


def logits(which, **inputs):
    """Logits [B, T, V] of a model, without gradients."""
    with torch.no_grad():
        return which(**inputs).logits


dense_model, _ = modlab.load(MODEL)
if modlab.is_converted(dense_model):
    modlab.revert(dense_model)
real = batch["attention_mask"].bool()
checks = {
    "one text": (dense_logits, logits(model, **inputs)),
    "left-padded batch of two": (logits(dense_model, **batch)[real], logits(model, **batch)[real]),
}
proof = pd.DataFrame(
    {
        "largest logit": {name: float(a.abs().max()) for name, (a, _) in checks.items()},
        "largest difference": {name: float((a - b).abs().max()) for name, (a, b) in checks.items()},
        "equal": {name: torch.equal(a, b) for name, (a, b) in checks.items()},
    }
)
print(f"24 generated tokens are the same: {torch.equal(dense_tokens, model.generate(**inputs, **generate))}")
proof

# %% [markdown]
# ## What it does not do yet
#
# Every gate has the same value, above p, so every token is kept and the cache is as large as before. And
# the routers know nothing: raise p above that value and *all* tokens (but the first four, which are always
# kept, and the recent ones) leave the cache of all routed layers. On an untrained model a threshold is a
# switch, not a dial.

# %%
rows = {}
for p in (0.5, 0.9):
    modlab.set_threshold(model, p)
    trace = modlab.trace(model, tokenizer, TEXT)
    rows[p] = {
        "lowest gate": trace.gate.min(),
        "highest gate": trace.gate.max(),
        "kept in routed layers": trace.keep.mean(),
        "KV saving": trace.kv_saving,
        "loss (nats a token)": trace.mean_loss,
    }
modlab.set_threshold(model, 0.5)
pd.DataFrame(rows).T.rename_axis("p").round(3)

# %% [markdown]
# ## Where is there room to skip?
#
# A question for the dense model, before any training: what does each layer do for each token? Below, one
# layer at a time is skipped by all tokens, through `modlab.routing_override`. A red cell is a token that is
# predicted worse without that layer, a blue one is predicted better, a pale one does not care. The first and
# the last layer are needed everywhere; between them it depends on the token, and that is what routers can
# learn to use. (It is no forecast of the loss after training: the harm of several skipped layers adds up,
# and training repairs a part of it.)

# %%
modlab.revert(model)
modlab.convert(model, modlab.MoDConfig(skip="layer", layers="all"))
whole = modlab.trace(model, tokenizer, TEXT)


def skip_all(skipped):
    """A routing rule: every token skips layer `skipped`, and runs all others."""
    return lambda layer, gate, position_ids: torch.full_like(gate, layer != skipped, dtype=torch.bool)


harm = []
for layer in model.mod.layers:
    with modlab.routing_override(model, skip_all(layer)):
        harm.append(modlab.trace(model, tokenizer, TEXT).loss - whole.loss)
harm = pd.DataFrame(harm, index=model.mod.layers)

figure = go.Figure(
    go.Heatmap(
        z=harm,
        y=[f"layer {i}" for i in harm.index],
        customdata=[[repr(token) for token in whole.tokens]] * len(harm),
        hovertemplate="%{y}, token %{x} %{customdata}<br>%{z:+.2f} nats<extra></extra>",
        colorscale="RdBu_r",
        zmid=0,
        zmin=-3,
        zmax=3,
        colorbar={"title": "nats", "thickness": 12},
    )
)
figure.update_layout(
    template=figures.template(),
    title="Change of each token's loss when all tokens skip one layer",
    xaxis_title="token of the text",
    yaxis_autorange="reversed",
)
figure

# %%
mean = harm.iloc[:, 1:].mean(axis=1)
figure = go.Figure(go.Bar(x=[f"layer {i}" for i in mean.index], y=mean, text=mean.map("{:+.2f}".format)))
figure.update_traces(textposition="outside", cliponaxis=False)
figure.update_layout(
    template=figures.template(),
    title=f"The same, mean over the text (loss with all layers: {whole.mean_loss:.2f} nats)",
    yaxis_title="nats a token",
    height=320,
)
figure

# %% [markdown]
# ## The forms of conversion, and which are lossless
#
# The paper multiplies what a layer adds by the gate. With a gate of 0.5 that halves every routed layer at
# the start, and training has to repair it first. modlab's default lets the gate decide, and scales
# nothing. The table says what each form does to this text on the spot.
#
# `skip` says what a token leaves out. With `"kv"`, the default, it is only its place in the cache: the token
# passes the layer in full, and its keys and values are dropped once it is not among the latest `keep_recent`.
# Memory is saved, operations are not. `"layer"`, `"attention"` and `"mlp"` leave that part out, and save
# operations too.

# %%
FORMS = {
    "MoDConfig()": modlab.MoDConfig(),
    'MoDConfig(layers="all")': modlab.MoDConfig(layers="all"),
    'MoDConfig(skip="layer")': modlab.MoDConfig(skip="layer"),
    'MoDConfig(skip="attention")': modlab.MoDConfig(skip="attention"),
    'MoDConfig(skip="mlp")': modlab.MoDConfig(skip="mlp"),
    "MoDConfig.topk()": modlab.MoDConfig.topk(),
    "MoDConfig.paper()": modlab.MoDConfig.paper(),
}
rows = {}
for name, config in FORMS.items():
    modlab.revert(model)
    modlab.convert(model, config)
    rows[name] = {
        "routed layers": len(model.mod.layers),
        "largest change of a logit": float((logits(model, **inputs) - dense_logits).abs().max()),
        "loss (nats a token)": modlab.trace(model, tokenizer, TEXT).mean_loss,
    }
pd.DataFrame(rows).T.astype({"routed layers": int}).round(3)

# %% [markdown]
# ## And back
#
# `revert` takes the routers out again. What remains is the dense model, bit for bit.

# %%
modlab.revert(model)
same = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
print(f"same names: {list(model.state_dict()) == list(before)}, same weights: {same}")
print(f"same logits: {torch.equal(logits(model, **inputs), dense_logits)}")

# %% [markdown]
# ## A real model
#
# Routers for SmolLM2-135M ship with modlab, one gate for each KV head of each layer. What they have decided
# about, and what they keep of some pages of Python, nine tenths of which are no longer recent:

# %%
real = lab.real_model()
if real:
    import argparse
    import inspect

    from IPython.display import display

    print(real[0].mod)
    real_trace = modlab.trace(*real, inspect.getsource(argparse)[:5000])
    print(real_trace)
    display(modlab.widgets.RoutingHeatmap(real_trace))

# %% [markdown]
# **Next:** [2 · Train](2_train.ipynb) teaches the routers, live. [All notebooks](README.md).
