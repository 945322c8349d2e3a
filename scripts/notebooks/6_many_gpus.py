# %% [markdown]
# # 6 · Many GPUs
#
# Training and evaluation on several devices through accelerate, started from a notebook: the same figures,
# shared work.
#
# `modlab.train`, `modlab.measure.evaluate` and the probes are written for
# [accelerate](https://huggingface.co/docs/accelerate): each process takes its rows of the same global batch,
# and gradients and figures are those of all of them. Nothing in your code changes. This notebook runs the
# same cell in several processes and in one, and puts the figures side by side.

# %% [markdown]
# ## What is here
#
# With two GPUs or more, each gets a process. With one or none, two processes on the CPU do the same thing,
# with the same code and the same checks. They share the cores: this shows *that* it works, not how fast it
# can be.

# %%
MODEL = "demo"  # use your own model: a hub id or a folder
STEPS, GLOBAL_BATCH, SEQ_LEN = 4, 4, 128

import argparse
import inspect
import json
import os
import statistics
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch
from accelerate import Accelerator, debug_launcher, notebook_launcher

import modlab
from modlab import figures, lab
from modlab.measure import evaluate

lab.quiet()
FOLDER = Path("many-gpus")
FOLDER.mkdir(exist_ok=True)
GPUS = torch.cuda.device_count()
PROCESSES = GPUS if GPUS > 1 else 2
place = "GPUs" if GPUS > 1 else "the CPU"
print(f"{GPUS} GPU(s), {os.cpu_count()} CPU cores: {PROCESSES} processes on {place}")

# %% [markdown]
# ## What each process does
#
# An ordinary function of this notebook. `batch_size` is *per process*: to keep the global batch, divide it.
# Every process is given all rows; `modlab.train` and `evaluate` pick this one's.


# %%
def rows_of(module, tokenizer, count):
    """The first rows of a module's source, int64 [count, SEQ_LEN]."""
    ids = tokenizer(inspect.getsource(module), verbose=False)["input_ids"]
    return torch.tensor(ids[: count * SEQ_LEN]).view(count, SEQ_LEN)


def work():
    """Evaluates and trains a model together with all processes; each writes what it saw."""
    torch.set_num_threads(1)
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    model, tokenizer = modlab.load(MODEL)
    if not modlab.is_converted(model):
        modlab.convert(model, modlab.MoDConfig(keep_recent=SEQ_LEN // 8))  # these rows are short
    model.to(accelerator.device)
    heldout = rows_of(statistics, tokenizer, 12)

    def held_out(rows, **more):
        """Loss, tokens that it is over, and keep ratio."""
        found = evaluate(model, rows, batch_size=1, cache=False, **more)
        return {"tokens": found.predicted_tokens, "loss": found.loss, "keep_ratio": found.keep_ratio}

    own = held_out(heldout[rank::world])  # this process alone, on its rows
    together = held_out(heldout, accelerator=accelerator)
    config = modlab.TrainConfig(
        steps=STEPS, batch_size=GLOBAL_BATCH // world, lr=1e-4, keep_ratio=0.25, ramp=0.0,
        mixed_precision="no", log_every=1, seed=0,
    )
    history = modlab.train(model, rows_of(argparse, tokenizer, STEPS * GLOBAL_BATCH), config).history
    report = {
        "device": str(accelerator.device), "own": own, "together": together,
        "history": history.to_dict("list"),
        "weights": sum(p.double().sum().item() for p in model.parameters()),
    }
    (FOLDER / f"rank_{rank}_of_{world}.json").write_text(json.dumps(report))


def reports(processes):
    """What each of so many processes has written."""
    files = [FOLDER / f"rank_{rank}_of_{processes}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


# %% [markdown]
# ## Several processes, then one
#
# `notebook_launcher` is accelerate's way to start them from a cell; on CPUs it is called `debug_launcher`.
# Several come first: a kernel that has used a GPU itself cannot hand it on.

# %%
if GPUS > 1:
    notebook_launcher(work, num_processes=PROCESSES)
    work()
else:
    debug_launcher(work, num_processes=PROCESSES)
    debug_launcher(work, num_processes=1)
several, alone = reports(PROCESSES), reports(1)
print(f"{len(several)} reports, from", ", ".join(report["device"] for report in several))

# %% [markdown]
# ## The same training
#
# The steps saw the same rows in the same order, only split differently, so the losses agree up to rounding
# (sums are taken in another order), and so do the weights at the end. All processes hold the same weights.

# %%
one, many = (pd.DataFrame(reports[0]["history"]).set_index("step") for reports in (alone, several))
figure = go.Figure()
for name, frame, style in (
    ("1 process", one, {"width": 6}),
    (f"{PROCESSES} processes", many, {"width": 2, "dash": "dot"}),
):
    figure.add_scatter(x=frame.index, y=frame.loss, name=name, mode="lines+markers", line=style)
figure.update_layout(
    template=figures.template(),
    title="Training loss, the same global batch",
    xaxis_title="step",
    yaxis_title="nats a token",
    xaxis_dtick=1,
)
figure

# %%
weights = {report["weights"] for report in several}
print(f"largest difference of a step's loss:       {(one.loss - many.loss).abs().max():.1e} nats")
print(f"largest difference of a step's keep ratio: {(one.keep_ratio - many.keep_ratio).abs().max():.1e}")
print(f"all {PROCESSES} processes end with the same weights: {len(weights) == 1}")
speed = pd.DataFrame({"1 process": one.tokens_per_s, f"{PROCESSES} processes": many.tokens_per_s}).median()
print("tokens a second, all processes together:", speed.round().astype(int).to_dict())

# %% [markdown]
# ## The same evaluation, per process and together
#
# Each process evaluates its share of the held-out rows. On their own the shares differ, as texts do.
# Together they are weighted by tokens and give what one process finds on all rows.

# %%
rows = {f"process {rank}, its own rows": report["own"] for rank, report in enumerate(several)}
rows |= {f"process {rank}, together": report["together"] for rank, report in enumerate(several)}
rows["one process, all rows"] = alone[0]["together"]
table = pd.DataFrame(rows).T[["tokens", "loss", "keep_ratio"]]
own = pd.DataFrame([report["own"] for report in several])
print(f"own losses, weighted by their tokens: {(own.loss * own.tokens).sum() / own.tokens.sum():.6f}")
table.astype({"tokens": int}).round(6)

# %% [markdown]
# ## On a real model
#
# SmolLM2-135M with the routers that ship: two processes on the CPU share a few rows, and their figures are
# those of one.

# %%
real = lab.real_model()


def share():
    """Evaluates the real model together with all processes; the first one writes what all of them found."""
    torch.set_num_threads(1)
    accelerator = Accelerator()
    held_out = rows_of(statistics, real[1], 4)
    found = evaluate(real[0], held_out, batch_size=1, cache=False, accelerator=accelerator)
    if accelerator.is_main_process:
        figures = {"loss": found.loss, "keep_ratio": found.keep_ratio}
        (FOLDER / f"real_{accelerator.num_processes}.json").write_text(json.dumps(figures))


if real:
    for processes in (2, 1):
        debug_launcher(share, num_processes=processes)
        print(f"{processes} process(es):", json.loads((FOLDER / f"real_{processes}.json").read_text()))

# %% [markdown]
# ## On real hardware
#
# - In a script or on a cluster the same function runs under `accelerate launch`; the commands work the same
#   way: `accelerate launch -m modlab train MODEL --data SOURCE --out DIR`, and `modlab eval`, `probe` and
#   `sweep` as well. Only the first process prints.
# - A model that does not fit on one GPU is sharded: `accelerate launch --use_fsdp --fsdp_version 2 ...`.
# - A run is taken up by any number of processes with the same global batch.
# - `modlab plan --model MODEL --gpus 8` works out beforehand what each GPU will hold.
# - How much faster several GPUs are depends on the model and on what connects them. This notebook claims no
#   speed-up that it has not measured on your machine.
#
# **Next:** [7 · Your own experiment](7_your_own_experiment.ipynb). [All notebooks](README.md).
