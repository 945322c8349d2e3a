# %% [markdown]
# # modlab quickstart
#
# Which tokens of your text stay in the KV cache of which layer, what that saves, and what it costs.
#
# A language model keeps the keys and values of every token it has read, in every layer, although most are
# hardly looked at again. modlab gives each layer a small router that decides **which tokens stay in the KV
# cache**: below the threshold **p** a token's keys and values are dropped once it is no longer recent. This
# is lossy. The explorer below shows what is dropped, what that saves, and what it costs: against the dense
# model, and where something from far back is needed again.
#
# *Run > Run All Cells*: less than a minute on a laptop, without GPU or network. **Then drag the slider**,
# or put a text of your own in.

# %% folded
# The sample text: Python, which the demo models know best. The explorer takes yours, pasted or from a file.
from modlab import lab

lab.quiet()  # no bars, nothing about optional packages
TEXT = '''\
"""Tables in text files: read them, count what is in them, write a summary."""

import json
from pathlib import Path


def read_table(path, delimiter=",", encoding="utf-8"):
    """Read a text file and return a list of rows.

    Each row is a list of strings. Empty lines and lines that begin with "#" are ignored.
    """
    rows = []
    with open(path, encoding=encoding) as file:
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

    def __init__(self, keys=()):
        self.counts = {}
        for key in keys:
            self.add(key)

    def add(self, key, amount=1):
        self.counts[key] = self.counts.get(key, 0) + amount

    def most_common(self, n=10):
        items = sorted(self.counts.items(), key=lambda item: item[1], reverse=True)
        return items[:n]

    def total(self):
        return sum(self.counts.values())

    def share(self, key):
        total = self.total()
        return self.counts.get(key, 0) / total if total else 0.0


def column(rows, index):
    """Return one column of a table, without its heading."""
    return [row[index] for row in rows[1:]]


def summary(path, delimiter=","):
    """Return a dictionary with the most common values of each column."""
    rows = read_table(path, delimiter=delimiter)
    if not rows:
        return {}
    result = {}
    for index, name in enumerate(rows[0]):
        counter = Counter(column(rows, index))
        result[name] = [
            {"value": value, "count": count, "share": round(counter.share(value), 3)}
            for value, count in counter.most_common(5)
        ]
    return result


def write_summary(path, target=None, delimiter=","):
    """Write the summary of a table as JSON and return the path of the new file."""
    target = Path(target) if target else Path(path).with_suffix(".json")
    with open(target, "w", encoding="utf-8") as file:
        json.dump(summary(path, delimiter=delimiter), file, indent=2, ensure_ascii=False)
    return target


def main(arguments):
    for path in arguments:
        rows = read_table(path)
        counter = Counter(column(rows, 0))
        print(f"{path}: {len(rows) - 1} rows, {counter.total()} values")
'''

# %%
NAME, DENSE, OTHERS = "demo-kv", "demo-dense", ["demo"]  # your own model: section 5

import modlab

model, tokenizer = modlab.load(NAME)
dense, _ = modlab.load(DENSE)
others = [modlab.load(name)[0] for name in OTHERS]  # "demo" skips whole layers: it saves time, and loses more
if not modlab.is_converted(model):
    modlab.convert(model)  # adds open routers for the cache: the output stays the same until they are trained

explorer = modlab.widgets.explore(model, tokenizer, TEXT, dense=dense, others=others)
explorer.measure_curve()
explorer.scroll_here()  # Run All shows the end of a notebook
explorer

# %% [markdown]
# ## 1. What to look for
#
# - **Which layers hold on to what?** A full cell is a token whose keys and values stay, a thin line one
#   whose go. Some layers keep nearly all, others nearly nothing but the first tokens, which are always kept
#   (hatched).
# - **Drag** the slider: a *preview*, made in the browser from the gates recorded in the last run.
#   **Release** it: the model takes the new threshold and runs the text; the figures are then *measured*.
# - **Where does it break?** The dashed lines are the dense model's. The mean loss moves little; the lower
#   curve is the loss on passages that come a second time, far away, and shows sooner that something is
#   missing. The sentence below says from which saving on.
# - **What is routed?** The switch next to the title shows a model that skips whole layers instead.
# - **What does it save?** *KV cache* is what is really allocated; *Measure the speed* times `generate`,
#   dense and routed. *Find* looks for the threshold of a memory budget: so many MiB for so many tokens.
# - **Use your own text**: everything follows, the curves too. Point at a cell or a token to see what each
#   layer does with it; a click locks it, Escape frees it, arrow keys move.

# %% [markdown]
# ## 2. Watch the cache while text is written
#
# Every token enters every layer's cache. Where no router keeps it, it fades while it is recent and is gone
# then; bytes are allocated ones, next to a dense cache's. Each layer has a name after what it keeps of this
# text: click one for the figures behind it. *Generate* goes on with the text at the slider's threshold.

# %%
cache = modlab.widgets.CacheView(model, tokenizer, explorer.text[:1200], max_new_tokens=60)
cache.generate()
cache

# %% [markdown]
# ## 3. Count the bytes
#
# `model.generate` works as always and stores less. `KVTracker` reads what the cache allocates, for any
# Hugging Face model. Both models continue the text of the explorer, yours if you put one in, at the
# threshold that it was left at: run this cell again after a change. Neither is a good programmer: they have
# 9 million parameters.

# %%
import pandas as pd

from modlab import measure

NEW_TOKENS = 60
room = measure.context_length(model) - NEW_TOKENS
inputs = tokenizer(explorer.text, return_tensors="pt", truncation=True, max_length=room)
length = inputs["input_ids"].shape[1]

rows = {}
for label, which in (("dense", dense), ("routed", model)):
    with modlab.KVTracker(which) as kv:  # min_new_tokens: a text that is complete would end at once
        output = which.generate(
            **inputs, min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, do_sample=False
        )
    last = kv.frame().query("step == step.max()")
    rows[label] = dict(last[["kept_tokens", "kv_bytes", "dense_kv_bytes"]].sum())
    rows[label]["loss of the text"] = measure.loss(which, tokenizer, [explorer.text])
    print(f"--- {label} continues:")
    print(tokenizer.decode(output[0, length:], skip_special_tokens=True))

table = pd.DataFrame(rows).T
table["kv_saving"] = table.dense_kv_bytes / table.kv_bytes
table.astype({"kept_tokens": int, "kv_bytes": int, "dense_kv_bytes": int}).round(3)

# %% [markdown]
# `kept_tokens` counts tokens over all layers. A growing cache keeps a few free places for coming tokens;
# `kv_bytes` includes them, so the saving is a little smaller than the share of kept tokens alone would
# give.
#
# ## 4. A real model
#
# Routers for SmolLM2-135M ship with modlab, one gate for each KV head of each layer; the base comes from the
# hub, or from a folder that you name. The text begins with eight numbers and asks for one of them at the
# end. **Drag the slider** from 1 to 16, *one token in so many is kept*: each release asks. When is it lost?

# %%
real = lab.real_model()
if real:
    question, answer = lab.locker_question()
    real_cache = modlab.widgets.CacheView(*real, question, max_new_tokens=5, expect=answer)
    print("Everything kept, it goes on:", "found" if real_cache.ask(0.0) else "lost")
real_cache if real else None

# %% [markdown]
# ## 5. Your own model
#
# Routers for any other model are fitted in one pass over some text, in minutes on a CPU, without training:
#
# ```python
# mod_config, fit_config = modlab.recipe("quick", model)
# modlab.convert(model, mod_config)
# modlab.fit_routers(model, "my_texts.txt", fit_config, tokenizer=tokenizer)
# ```
#
# [2 · Train](2_train.ipynb) does it with pictures, and goes on from there. To see it here, change the names
# above the explorer and run all cells again:
#
# - `NAME`: a folder saved by modlab, any local folder of a `transformers` model, or a hub id such as
#   `"Qwen/Qwen3-0.6B"` (needs network); `DENSE`: the model to compare with, for example the same name;
#   `OTHERS`: further models of the same tokenizer, or `[]`.
# - A dense model is converted on the spot and, at first, keeps every token: its routers still have to
#   learn. `model.save_pretrained(folder)` saves what they learned.
#
# Keep what you saw: `explorer.trace.save("my_text.npz")`, or a page that opens without Jupyter:

# %%
from pathlib import Path

page = Path("routing.html")
page.write_text(explorer.to_html(), encoding="utf-8")
print(f"{page} written, {page.stat().st_size / 1e3:.0f} kB")

# %% [markdown]
# ## There is a notebook for each question
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
#
# [Back to the explorer](#modlab-quickstart), [all notebooks](README.md).
