# %% [markdown]
# # 5 · What it buys
#
# Bytes of the KV cache, prefill and decode time, against loss: measured on this machine, and on an H200
# elsewhere.
#
# In the demo a skipped token costs nothing in a routed layer and stores nothing there. (In a model of the
# plain form it runs all the same, and only its keys and values go: bytes fall, milliseconds hardly do.)
# This notebook counts both, and what they cost. Only figures that were measured stand here: on your machine,
# now, or in result files that came with modlab, with their device, date and command.

# %% [markdown]
# ## Use your own model
#
# `MODEL` is a converted and trained model (`"my-mod-model"` from [2 · Train](2_train.ipynb), say), `DENSE`
# the one to compare with. The demo's is the right kind of control: the same start, trained on for as long,
# without skipping. (Without such a control, a model that was trained further looks better than it is.)

# %%
MODEL, DENSE = "demo", "demo-dense"
PROMPT_TOKENS, DECODE_TOKENS, REPEATS = 384, 8, 2

import argparse
import inspect

import numpy as np
import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

import modlab
from modlab import figures, lab, measure, published

lab.quiet()
model, tokenizer = modlab.load(MODEL)
dense, _ = modlab.load(DENSE)
if not modlab.is_converted(model):
    raise modlab.ModlabError(f"{MODEL} is dense. Notebook 2 trains routers for it and saves 'my-mod-model'.")
TEXT = inspect.getsource(argparse)[:4000]
inputs = tokenizer(TEXT, return_tensors="pt", truncation=True, max_length=PROMPT_TOKENS).to(model.device)

# %% [markdown]
# ## Bytes
#
# `KVTracker` reads, after every forward, what each layer's cache has allocated, of any Hugging Face model.
# The prompt is read at once, then tokens are generated one by one. A growing cache keeps some free places
# for coming tokens; they are counted.

# %%
frames = {}
for name, which in (("dense", dense), ("Mixture-of-Depths", model)):
    with modlab.KVTracker(which) as kv:
        which.generate(**inputs, max_new_tokens=64, min_new_tokens=64, do_sample=False)
    frames[name] = kv.frame()
    peak = kv.summary()
    mib, tokens = peak["kv_bytes"] / 2**20, peak["seen_tokens"]
    print(f"{name}: {mib:.2f} MiB for {tokens} tokens, saving {peak['kv_saving']:.2f}x")

figure = make_subplots(
    cols=2, column_widths=[0.55, 0.45], subplot_titles=["all layers, step by step", "each layer, at the end"]
)
for (name, frame), colour in zip(frames.items(), figures.COLOURS):
    total = frame.groupby("step").kv_bytes.sum() / 2**20
    last = frame[frame.step == frame.step.max()]
    figure.add_scatter(x=total.index, y=total, name=name, line_color=colour, row=1, col=1)
    figure.add_bar(
        x=last.layer, y=last.kv_bytes / 2**10, name=name, marker_color=colour, showlegend=False, row=1, col=2
    )
figure.update_layout(template=figures.template(), title="Key/value cache", bargap=0.25, margin_t=90)
figure.update_xaxes(title_text="forward step (0 reads the prompt)", col=1)
figure.update_xaxes(title_text="layer", dtick=1, col=2)
figure.update_yaxes(title_text="MiB", rangemode="tozero", col=1)
figure.update_yaxes(title_text="KiB", col=2)
figure

# %% [markdown]
# ## The cache alone
#
# `"demo-kv"` is `demo-dense` with routers for its cache. Every token passes every layer; what a router
# decides is whose keys and values stay once 128 more tokens have come. All other weights are those of
# `demo-dense`, to the bit. It saves memory and no operations, and costs far less loss for the memory saved.

# %%
LONG = inspect.getsource(argparse)[:25_000]  # some three contexts of it
rows = {}
for name in ("demo-dense", "demo-kv"):
    which, its_tokenizer = modlab.load(name)
    measured = measure.evaluate(which, LONG, its_tokenizer, 2048)
    rows[name] = {
        "loss": measured.loss,
        "kept in routed layers": measured.keep_ratio,
        "cache, MiB": measured.kv_bytes / 2**20,
        "KV saving": measured.kv_saving,
    }
pd.DataFrame.from_dict(rows, orient="index").round(3)

# %% [markdown]
# ## Time and loss, here
#
# `sweep` runs the text at every threshold and times `generate` as you would call it. p = 0 keeps
# everything: the same weights, nothing skipped, and the time that routing itself takes. The dense control
# is timed the same way. Timings of a few calls on a busy machine are rough: raise `REPEATS` before you
# quote one.

# %%
THRESHOLDS = [0.0, 0.2, 0.4, 0.5, 0.6, 0.7]
sweep = modlab.sweep(
    model,
    tokenizer,
    [TEXT],
    thresholds=THRESHOLDS,
    seq_len=1024,
    repeats=REPEATS,
    prompt_tokens=PROMPT_TOKENS,
    decode_tokens=DECODE_TOKENS,
)
times = [measure.time_generate(dense, inputs["input_ids"], DECODE_TOKENS) for _ in range(REPEATS + 1)]
control = measure.evaluate(dense, TEXT, tokenizer, 1024)
reference = {
    "loss": control.loss,
    "kv_bytes": control.kv_bytes,
    "prefill_ms": pd.Series([prefill for prefill, _ in times[1:]]).median(),
    "decode_ms": pd.Series([decode for _, decode in times[1:]]).median(),
}
columns = ["threshold", "keep_ratio", "kv_saving", "loss", "prefill_ms", "decode_ms"]
print(", ".join(f"{name} {value:,.3f}" for name, value in reference.items()), "(the dense control)")
sweep[columns].round(3)

# %% [markdown]
# ## The frontier
#
# Memory on one side, time on the other, what is lost from top to bottom: left is better, down is better. Drag
# the point along either curve, it moves on both: when you let go, the model has that threshold. The dense
# control is the diamond. The second curve shows the times of this machine, or those of an H200 at the same
# keep ratio, measured by this project on a model of Llama-3-8B's shape with `modlab.enable_fast_generation`;
# how much loss a model of that size would pay is not known from this.
#
# *Axes from* changes to real models, by this project's committed records: what their gates lose at each KV
# saving, as KL, on passages that come again, in answers. **Where do the answers get lost?** Their times are
# of another machine and, where the name says so, of another model.

# %%
h200 = {case: published.latencies(case) for case in ("prefill", "decode")}
frontier = modlab.widgets.Frontier(
    sweep,
    model,
    references={"dense, trained as long": reference},
    elsewhere={
        "H200, 8B shape: prefill of 32,768 tokens": h200["prefill"],
        "H200, 8B shape: one token after 32,768": h200["decode"],
    },
    real=published.real_models(),
    real_times=published.kv_latencies(),
)
frontier

# %% [markdown]
# Times faster than dense, here and there (the H200's with every other layer skipped), at the keep ratio that
# each threshold gives. (Between measured keep ratios the H200's are interpolated; below the smallest, 5%,
# they are those at 5%.)

# %%
faster = sweep[["threshold", "keep_ratio", "loss"]].copy()
for case, frame in h200.items():
    faster[f"{case}, here"] = reference[f"{case}_ms"] / sweep[f"{case}_ms"]
    faster[f"{case}, H200"] = np.interp(sweep.keep_ratio, frame.keep_ratio, frame.speedup)
for frame in h200.values():
    print(frame.attrs["origin"])
faster.round(3)

# %% [markdown]
# ## An H200, measured by this project
#
# A model of Llama-3-8B's shape with random weights, every other layer routed, tokens kept at random, 32,768
# tokens of context, `modlab.enable_fast_generation`: times and bytes are real, and nothing here says anything
# about quality. *Ideal* is what the skipped work alone would give. Where the points stay below it, the rest
# of the step is what is left to win; below 1, routing costs more than it saves.
#
# In the table under the figure times are of a call: *train* is a step, *prefill* a prompt, *decode* a token.
# *peak* is a prompt by the `transformers` library without fast generation against a routed one with it.
# *throughput* is a token at the largest batch that fits, its time divided by the rows: dense has fewer.

# %%
figure = make_subplots(cols=2, shared_yaxes=True, subplot_titles=["prefill", "decode, one token"])
for column, case in enumerate(("prefill", "decode"), start=1):
    part = h200[case]
    for (name, values), dash in zip((("ideal", part.ideal), ("measured", part.speedup)), ("dot", "solid")):
        figure.add_scatter(
            x=part.keep_ratio,
            y=values,
            name=name,
            showlegend=column == 1,
            mode="lines+markers",
            line={"dash": dash, "color": figures.COLOURS[0 if name == "measured" else 1]},
            customdata=part[["dense_ms", "mod_ms"]],
            hovertemplate="%{y:.2f}x<br>dense %{customdata[0]:.1f} ms, MoD %{customdata[1]:.1f} ms",
            row=1,
            col=column,
        )
    figure.add_hline(y=1, line={"color": figures.TEXT, "width": 1}, row=1, col=column)
figure.update_xaxes(title_text="kept in the routed layers", tickformat=".0%")
figure.update_yaxes(title_text="times faster than dense", col=1)
figure.update_layout(template=figures.template(), margin_t=50)
figure

# %%
results = published.benchmarks()
gpu = results[results.device_name.str.contains("NVIDIA")]
suite = gpu[(gpu.result == "speed") & (gpu.case != "baseline")]
shown = [
    "case",
    "context",
    "batch",
    "routed_layers",
    "keep_ratio",
    "dense_ms",
    "mod_ms",
    "speedup",
    "ideal",
    "kv_saving",
]
for (device, torch, date), _ in suite.groupby(["device_name", "torch", suite.date.str[:10]]):
    print(f"{device}, torch {torch}, {date}")
for command in suite.command.unique():
    print(f"    {command}")
suite[shown].round(2).reset_index(drop=True)

# %% [markdown]
# ## What the demo costs in quality
#
# On 3.2 million held-out tokens, measured once by this project. The second row is the fair comparison.

# %%
published.demo().reindex(["dense", "dense_continuation", "mod"])[
    ["loss", "tokens", "keep_ratio", "kv_saving"]
].round(3)

# %% [markdown]
# ## What each recipe costs in quality
#
# A model of 56 million parameters, 10 million tokens of conversion, held-out loss above that of the dense
# model on the same tokens: means over seeds, with their standard deviation. Each line is one kind of model,
# its thresholds moved after training; "default" is the plain form, not `recipe("default")`. The table behind
# it is [docs/quality.md](../docs/quality.md).

# %%
RECIPES = {
    "kv-mid": "default: routes the cache",
    "attn-mid-kl": "skips attention",
    "layer-alt": "skips whole layers",
    "topk-alt": "top-k",
    "paper-0.03": "paper",
}
study = published.quality()
print(f"{study.attrs['device_name']}, {study.attrs['date'][:10]}")
study = study[study.tokens.between(9e6, 11e6) & study.arm.isin(RECIPES) & (study.point != "trained")]
figure = go.Figure()
for (arm, label), colour in zip(RECIPES.items(), figures.COLOURS):
    line = study[study.arm == arm].groupby("point")[["kv_saving", "gap"]].agg(["mean", "std"])
    figure.add_scatter(
        x=line.kv_saving["mean"],
        y=line.gap["mean"],
        error_y={"array": line.gap["std"].fillna(0)},
        name=label,
        mode="lines+markers",
        line_color=colour,
    )
figure.update_xaxes(title_text="KV cache, times smaller")
figure.update_yaxes(title_text="loss above dense, nats a token", range=[-0.03, 0.6])
figure.update_layout(template=figures.template(), margin_t=30)
figure

# %% [markdown]
# ## A real model
#
# Routers for SmolLM2-135M ship with modlab, one gate for each KV head of each layer. Bytes, time and loss of
# a text at thresholds that keep about one key in 2, 4, 8 and 16 of it, measured here. The latest 128 tokens,
# which always stay, are a large part of a text as short as this one: it saves less. In long texts
# `modlab.set_kv_saving(model, 4)` sets the threshold that the routers know, and more recent tokens with it.

# %%
real = lab.real_model()
if real:
    from IPython.display import display

    print("Running the text at five thresholds ...", flush=True)
    gates = modlab.trace(*real, TEXT[:2000]).gate
    real_sweep = modlab.sweep(
        *real,
        [TEXT[:2000]],
        thresholds=[0.0, *(float(np.quantile(gates, 1 - 1 / one_in)) for one_in in (2, 4, 8, 16))],
        repeats=1,
        prompt_tokens=256,
        decode_tokens=4,
        recall_rows=1,
    )
    display(modlab.widgets.Frontier(real_sweep, real[0]))

# %% [markdown]
# `modlab bench --help` measures your own machine the way these files were made.
#
# **Next:** [6 · Many GPUs](6_many_gpus.ipynb). [All notebooks](README.md).
