# %% [markdown]
# # 6 · Many GPUs
#
# Training and evaluation on several devices through accelerate, started from a notebook: the same figures,
# shared work.
#
# `modlab.train` and `modlab.measure.evaluate` are written for
# [accelerate](https://huggingface.co/docs/accelerate): started by `accelerate launch`, each process takes
# its rows of the same global batch, and gradients and figures are averaged over all of them. Nothing in
# your code changes. This notebook runs the same training once here and once in several processes, and puts
# the figures side by side.

# %% [markdown]
# ## What is here
#
# With two GPUs or more, each gets a process. With one or none, two processes on the CPU do the same thing,
# with the same code and the same checks. They share the cores: this shows *that* it works, not how fast it
# can be.

# %%
MODEL = "demo"  # use your own model: a hub id or a folder
STEPS, GLOBAL_BATCH, SEQ_LEN = 4, 4, 128

import json
import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
import torch

from modlab import figures

GPUS = torch.cuda.device_count()
PROCESSES = GPUS if GPUS > 1 else 2
if GPUS < 2:
    os.environ["ACCELERATE_USE_CPU"] = "true"  # for this kernel and for the processes that it starts
print(
    f"{GPUS} GPU(s), {os.cpu_count()} CPU cores: {PROCESSES} processes on {'GPUs' if GPUS > 1 else 'the CPU'}"
)

# %% [markdown]
# ## The script
#
# What runs in several processes has to be a file: a notebook's kernel is a single process. It is short, and
# it is what you would take to a cluster. `batch_size` is *per process*: to keep the global batch, divide
# it.

# %%
SCRIPT = '''\
"""Trains and evaluates a model in however many processes were started; each writes what it saw."""
import argparse, inspect, json, statistics, sys
from pathlib import Path

import torch
from accelerate import Accelerator
import modlab
from modlab.measure import evaluate


def rows_of(module, tokenizer, length, count):
    """The first rows of a module's source, int64 [count, length]."""
    ids = tokenizer(inspect.getsource(module), verbose=False)["input_ids"]
    return torch.tensor(ids[: count * length]).view(count, length)


def main(name, out, steps, global_batch, length):
    accelerator = Accelerator()
    rank, world = accelerator.process_index, accelerator.num_processes
    model, tokenizer = modlab.load(name)
    if not modlab.is_converted(model):
        modlab.convert(model, modlab.MoDConfig(keep_recent=length // 8))  # these rows are short
    rows = rows_of(argparse, tokenizer, length, steps * global_batch)
    heldout = rows_of(statistics, tokenizer, length, 12)

    def held_out(rows, **more):
        """Loss, tokens that it is over, and keep ratio."""
        found = evaluate(model, rows, batch_size=1, cache=False, **more)
        return {"tokens": found.predicted_tokens, "loss": found.loss, "keep_ratio": found.keep_ratio}

    own = held_out(heldout[rank::world])  # this process alone, on its rows
    together = held_out(heldout, accelerator=accelerator)
    config = modlab.TrainConfig(
        steps=steps, batch_size=global_batch // world, lr=1e-4, keep_ratio=0.25, ramp=0.0,
        mixed_precision="no", log_every=1, seed=0,
    )
    history = modlab.train(model, rows, config).history
    report = {
        "device": str(accelerator.device), "own": own, "together": together,
        "history": history.to_dict("list"),
        "weights": sum(p.double().sum().item() for p in model.parameters()),
    }
    Path(out, f"rank_{rank}_of_{world}.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:3], *map(int, sys.argv[3:6]))
'''
FOLDER = Path("many-gpus")
FOLDER.mkdir(exist_ok=True)
(FOLDER / "train_many.py").write_text(SCRIPT)
print(f"{FOLDER / 'train_many.py'}: {len(SCRIPT.splitlines())} lines")

# %% [markdown]
# ## One process
#
# This kernel is one; it can run the file's `main` itself.

# %%
sys.path.insert(0, str(FOLDER))
import train_many

settings = [MODEL, str(FOLDER), STEPS, GLOBAL_BATCH, SEQ_LEN]
train_many.main(*settings)


def reports(processes):
    """What each of so many processes has written."""
    files = [FOLDER / f"rank_{rank}_of_{processes}.json" for rank in range(processes)]
    return [json.loads(file.read_text()) for file in files]


alone = reports(1)

# %% [markdown]
# ## Several processes
#
# The same file under `accelerate launch`. On a cluster this is the last line of your job script; after
# `accelerate config` it needs no flags. (`--multi_gpu` is accelerate's name for several processes on one
# machine. It is right on CPUs, too, if `ACCELERATE_USE_CPU` is set.)

# %%
command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
command += ["--num_processes", str(PROCESSES), "--main_process_port", "0"]
command += ["--mixed_precision", "no", "--dynamo_backend", "no"]
command += ["--num_cpu_threads_per_process", str(max(1, (os.cpu_count() or 1) // PROCESSES))]

print("accelerate launch", *command[3:], "train_many.py", *settings)
done = subprocess.run(
    [*command, str(FOLDER / "train_many.py"), *map(str, settings)], capture_output=True, text=True
)
if done.returncode:
    raise RuntimeError(done.stderr[-3000:])
several = reports(PROCESSES)
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
# ## On real hardware
#
# - `accelerate config` asks once about machines, GPUs and precision. The command line works the same way:
#   `accelerate launch -m modlab train MODEL --data SOURCE --out DIR`.
# - A run is resumed with the number of processes it was started with: the order of the rows depends on it.
# - How much faster several GPUs are depends on the model and on what connects them. This notebook claims no
#   speed-up that it has not measured on your machine.
#
# **Next:** [7 · Your own experiment](7_your_own_experiment.ipynb). [All notebooks](README.md).
