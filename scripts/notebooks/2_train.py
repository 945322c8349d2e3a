# %% [markdown]
# # 2 · Train
#
# Teach the routers what to keep, live: loss and keep ratio of every layer, pause, resume, before and after.
#
# A converted model keeps every token until its routers have learned which ones can be left out. Training
# minimises the usual loss plus a term that pulls the share of kept tokens to a target; the weights around
# the routers can adapt at the same time. What this notebook does in seconds on a CPU shows how it works, not
# how good it gets: the routers of `demo-kv`, which ships with modlab, have seen 10 million tokens for what
# is shown here with six thousand.

# %% [markdown]
# ## Use your own model
#
# A hub id or a folder; dense or converted. `ROWS` below takes any text: `modlab.data.packed` makes rows of
# a file, a folder, a data set on the hub, or the Python source on your machine (`"python"`).

# %%
MODEL = "demo-dense"  # of a converted one the rows have to be longer than its keep_recent
RECIPE = "routers only"  # one of RECIPES, below
STEPS, BATCH, SEQ_LEN, KEEP = 24, 2, 128, 0.4

import argparse
import inspect
import shutil
import statistics
import time
from dataclasses import replace
from pathlib import Path

import datasets
import pandas as pd
import torch

import modlab
from modlab import data, figures, lab
from modlab.measure import evaluate

datasets.disable_progress_bars()
lab.quiet()
model, tokenizer = modlab.load(MODEL)


def rows_of(module):
    """A module's source as rows of SEQ_LEN tokens."""
    source = datasets.Dataset.from_dict({"text": [inspect.getsource(module)]})
    return data.packed(source, tokenizer, seq_len=SEQ_LEN)


def held_out(which):
    """Loss and keep ratios on the rows that are not trained on."""
    found = evaluate(which, HELDOUT, batch_size=8)
    layers = {f"keep_{layer}": kept for layer, kept in found.keep_ratio_by_layer.items()}
    return {"loss": found.loss, "keep_ratio": found.keep_ratio if layers else None, **layers}


ROWS, HELDOUT = rows_of(argparse), rows_of(statistics).select(range(12))
print(f"{len(ROWS)} rows of {SEQ_LEN} tokens to train on, {len(HELDOUT)} held out")

# %% [markdown]
# ## The quick way: fit, do not train
#
# Three lines give *any* model routers, without a gradient: a text is read twice, and a gate for each KV head
# of each layer is solved for from what the second copy reads of the first. Watch which head keeps what as
# more text is read. Look for heads that turn all full or all empty.

# %%
from IPython.display import display

PASSAGE = inspect.getsource(statistics.fmean)


def fit_live(which, its_tokenizer, texts, sizes, context):
    """Fit the routers to more and more text, and show what they keep of a text each time."""
    picture = modlab.widgets.RoutingHeatmap(modlab.trace(which, its_tokenizer, PASSAGE[:600]))
    display(picture)
    for tokens in sizes:
        config = modlab.FitConfig(tokens=tokens, context=context)
        print(f"Reading {tokens:,} tokens ...", flush=True)
        fit = modlab.fit_routers(which, texts, config, tokenizer=its_tokenizer, progress=False)
        picture.show(modlab.trace(which, its_tokenizer, PASSAGE[:600]))
        print(f"... in {fit.seconds:.0f} s: R² {fit.r2:.2f}, keeps {fit.keep_ratio:.0%}")


fitted, _ = modlab.load(MODEL)
if modlab.is_converted(fitted):
    modlab.revert(fitted)
modlab.convert(fitted, modlab.recipe("quick", fitted)[0])
fit_live(fitted, tokenizer, [inspect.getsource(argparse)], sizes=(1024, 4096), context=512)

# %% [markdown]
# Now the slider asks how many tokens are kept: **drag it from 1 to 16**. Where does the last curve, the loss
# on passages that come again, leave its dashed line? There the model begins to lose what it has read.

# %%
explorer = modlab.widgets.explore(fitted, tokenizer, PASSAGE)
explorer.measure_curve()
explorer

# %% [markdown]
# ## A real model, fitted before your eyes
#
# SmolLM2-135M: its shipped routers are replaced by ones that are fitted here, to some two thousand tokens.
# Then a question whose answer stands at the beginning of the text: with everything kept it is answered. Drag
# the slider: how far do routers go that have seen so little?

# %%
real = lab.real_model()
if real:
    fit_live(*real, [inspect.getsource(argparse)], sizes=(512, 1536), context=256)
    question, answer = lab.locker_question()
    asked = modlab.widgets.CacheView(*real, question, max_new_tokens=5, expect=answer)
    asked.ask(0.0)
    display(asked)

# %% [markdown]
# ## Choose a recipe
#
# - `plain`: every token passes every layer, routers decide whose keys and values stay in the cache. Of
#   these the least lossy on the demo; on a real model it costs verbatim recall (see the README), and
#   `modlab.recipe("default", model)` distils instead, in longer rows than these. It saves memory and hardly
#   any time. A two-sided target with a ramp; what is left out tells its router, too, what it would have been
#   worth.
# - `routers only`: the same, and the other weights stay as they are. For a model that is done learning: a few
#   rows of another kind of text, as here, would rather harm it.
# - `layers`: tokens skip whole layers. Saves operations too, and costs far more loss.
# - `distilled`: the same, plus the KL divergence to the dense model. More compute a step, often a better
#   loss.
# - `paper`: MoDification as published: the gate scales the layer's output, one-sided load term.
# - `top-k`: the older Mixture-of-Depths: a fixed share of each row, and a predictor for decoding.

# %%
common = modlab.TrainConfig(
    steps=STEPS,
    batch_size=BATCH,
    keep_ratio=KEEP,
    ramp=0.3,
    lam=4.0,
    lr=1e-4,
    router_lr=0.03,  # a long run wants a smaller one: demo-kv's was 3e-3
    warmup=0.1,
    log_every=2,
    seed=0,
)
cache = modlab.MoDConfig(keep_recent=SEQ_LEN // 8)  # the usual 128 tokens are all of a row
layers = modlab.MoDConfig(skip="layer", layers="alternate")
RECIPES = {
    "plain": (cache, common),
    "routers only": (cache, replace(common, freeze_base=True)),
    "layers": (layers, common),
    "distilled": (layers, replace(common, kl=1.0)),
    "paper": (modlab.MoDConfig.paper(), replace(common, objective="load", alpha=0.01)),
    "top-k": (modlab.MoDConfig.topk(capacity=KEEP), common),
}
mod_config, train_config = RECIPES[RECIPE]
teacher = modlab.load(MODEL)[0] if train_config.kl else None

rows = {"dense": held_out(model)}
if not modlab.is_converted(model):
    modlab.convert(model, mod_config)
rows["converted, not trained"] = held_out(model)

# %% [markdown]
# ## Train, and watch
#
# The panel trains in the background: the next cells run meanwhile. *Pause* holds the run between two steps,
# *Stop* ends it.

# %%
panel = modlab.widgets.TrainingPanel(model, ROWS, train_config, eval_data=HELDOUT, teacher=teacher)
panel.start()
panel

# %% [markdown]
# Paused, the model can be used as it stands. Here it is evaluated in the middle of the run, which then goes
# on.

# %%
while panel.running and len(panel.history) < STEPS // 4:
    time.sleep(0.1)
panel.pause()
while panel.running and panel.progress["state"] != "paused":
    time.sleep(0.1)
print(panel.progress["text"])
rows["in the pause"] = held_out(model)

panel.resume()
result = panel.wait()
result.plot().update_layout(template=figures.template(), height=520)

# %% [markdown]
# ## Before and after
#
# On rows that were not trained on. The last line is `demo-kv`, for what a longer run keeps. (Its loss is the
# dense model's here: it always keeps 128 recent tokens, which is a whole row.)

# %%
rows[f"trained, {result.tokens:,} tokens"] = held_out(model)
demo, demo_tokenizer = modlab.load("demo-kv")
if tokenizer.get_vocab() == demo_tokenizer.get_vocab():  # else its loss counts other tokens
    rows["demo-kv, 10 million tokens"] = held_out(demo)
pd.DataFrame(rows).T.round(3)

# %% [markdown]
# The columns `keep_2` and so on are the layers. They differ although one target was set for all: the target
# is a mean, and training spends it where a layer is worth most.
#
# Which tokens did it choose? The first picture is the model that was just trained, the second is the demo.

# %%
TEXT = inspect.getsource(statistics.fmean)[:600]
modlab.widgets.RoutingHeatmap(modlab.trace(model, tokenizer, TEXT))

# %%
modlab.widgets.RoutingHeatmap(modlab.trace(demo, demo_tokenizer, TEXT))

# %% [markdown]
# ## A run that is cut short goes on as if nothing had happened
#
# With a folder (`out=...`) a run saves checkpoints and can be resumed, after a Ctrl-C as well as after a
# power cut. "As if nothing had happened" is meant to the last bit. Four steps at once, and two steps, a
# fresh model, two more:

# %%
short = replace(common, steps=4, router_lr=0.01, log_every=1, save_every=2, calibrate=False)


def fresh():
    """The model before any training."""
    made, _ = modlab.load(MODEL)
    return made if modlab.is_converted(made) else modlab.convert(made, mod_config)


RUNS = Path("runs")
shutil.rmtree(RUNS, ignore_errors=True)
whole = modlab.train(fresh(), ROWS, replace(short, out=RUNS / "whole"))

shutil.copytree(RUNS / "whole", RUNS / "cut")  # what is left when the machine dies after step 2:
shutil.rmtree(RUNS / "cut" / "checkpoints" / "step_4", ignore_errors=True)
shutil.rmtree(RUNS / "cut" / "model")
resumed = modlab.train(fresh(), ROWS, replace(short, out=RUNS / "cut", resume="auto"))

ours, theirs = whole.model.state_dict(), resumed.model.state_dict()
print(f"all {len(ours)} weights are equal: {all(torch.equal(ours[name], theirs[name]) for name in ours)}")
losses = {"whole": whole.history, "resumed": resumed.history}
pd.DataFrame({name: history.set_index("step").loss for name, history in losses.items()}).T

# %% [markdown]
# ## Keep it
#
# A trained folder loads with `modlab.load`, and its weights load in plain `transformers`, as the dense
# model. In the other notebooks, it is `MODEL = "my-mod-model"`.

# %%
model.save_pretrained("my-mod-model")
tokenizer.save_pretrained("my-mod-model")
for file in sorted(Path("my-mod-model").iterdir()):
    print(f"{file.stat().st_size / 1e6:8.2f} MB  {file.name}")

# %% [markdown]
# For a run that matters: `modlab train --help`, more tokens, `eval_every`, and a GPU or
# [many](6_many_gpus.ipynb).
#
# **Next:** [3 · Where tokens go](3_where_tokens_go.ipynb). [All notebooks](README.md).
