# ruff: noqa: E501 (the text of the card)
"""Stage 6: `demo-kv`, the routers that decide about the cache of `demo-dense`, held against it on held-out files.

The routers are those of the study's arm that trains routers alone on the shipped model:

    python -m benchmarks.quality all --scale demo --arms dense,kv-mid-frozen

which leaves them in build/quality/demo/routers. Copied to modlab/demo/kv, they are measured here on any machine, next to
controls that take no learning: the same weights, with the keys and values of other tokens and layers.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import common
import torch

from modlab.routing.record import OverrideFn

PACKAGE = common.REPO / "modlab" / "demo"
TRAINING = Path(__file__).with_name("logs") / "06_kept_keys.json"


def controls(keep_by_layer: dict[int, float], first: int) -> dict[str, tuple[str, OverrideFn]]:
    """What decides instead of the routers, by name, with a line on it each.

    Args:
        keep_by_layer: what the routers keep, of each routed layer.
        first: tokens that are always kept.
    """
    layers = sorted(keep_by_layer)
    mean = sum(keep_by_layer.values()) / len(layers)
    local = round(len(layers) * (1 - mean))  # so many layers without old keys save what the routers do

    def chance(share: Callable[[int], float]) -> OverrideFn:
        return lambda layer, gate, position: (torch.rand_like(gate) < share(layer)) | (position < first)

    def only_recent(closed: list[int]) -> OverrideFn:
        return lambda layer, gate, position: (position < first) | (layer not in closed)

    hands = {"low": layers[:local], "every other": layers[::2], "high": layers[-local:]}
    return {
        "by chance": ("as many tokens of every layer", chance(lambda layer: mean)),
        "by chance in each layer": (
            "as many tokens of each layer as the routers",
            chance(keep_by_layer.__getitem__),
        ),
    } | {
        f"by hand, {name}": (
            f"layers {', '.join(map(str, closed))} see recent tokens alone",
            only_recent(closed),
        )
        for name, closed in hands.items()
    }


@contextlib.contextmanager
def changed(config: Any, field: str, value: Any) -> Iterator[None]:
    """A field of a live `MoDConfig` has another value inside."""
    before = getattr(config, field)
    setattr(config, field, value)
    try:
        yield
    finally:
        setattr(config, field, before)


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--card", type=Path, default=PACKAGE / "kv", help="folder for card and results")
    parser.add_argument("--source", default="python", help="what modlab.data.packed takes")
    parser.add_argument("--rows", type=int, default=64, help="held-out rows that are evaluated")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-proc", type=int, default=1, help="processes that read and tokenise")
    args = parser.parse_args()
    started = time.perf_counter()

    import modlab
    from modlab import data
    from modlab.measure import evaluate

    stored_bytes = importlib.import_module("05_card").stored_bytes
    models = {name: modlab.load(name) for name in ("demo-dense", "demo-kv")}
    tokenizer = models["demo-dense"][1]
    documents = data.documents(args.source, "heldout", num_proc=args.num_proc)
    rows = data.packed(
        documents, tokenizer, common.SEQ_LEN, limit_tokens=args.rows * common.SEQ_LEN, num_proc=args.num_proc
    )
    rows = rows.with_format("torch")
    texts = [row["input_ids"][None] for row in rows]

    def measured(name: str) -> dict[str, Any]:
        model = models["demo-dense" if name == "demo-dense" else "demo-kv"][0]
        torch.manual_seed(0)  # of what is kept by chance
        found = common.held_out(evaluate(model, rows, batch_size=args.batch_size, cache=False))
        recalled = modlab.recall(model, texts, distances=(256, 512, 1024, 1800), rows=min(48, args.rows // 2))
        found["recall"] = recalled[["distance", "second_loss"]].to_dict("records")
        if name != "demo-dense":
            found |= stored_bytes(model, rows, args.batch_size)
        print(name, found)
        return found

    results: dict[str, Any] = {name: measured(name) for name in models}
    kv: Any = models["demo-kv"][0]
    kept = {layer: results["demo-kv"][f"keep_{layer}"] for layer in kv.mod.layers}
    for name, (why, decide) in controls(kept, kv.mod.config.keep_first).items():
        with modlab.routing_override(kv, decide):
            results[name] = {"why": why, **measured(name)}
    settings: dict[str, Any] = {}
    for field, value in [*(("keep_recent", recent) for recent in (16, 32, 64, 256, 512)), ("keep_first", 0)]:
        with changed(kv.mod.config, field, value):
            settings[f"{field}={value}"] = measured(f"{field}={value}")
    record = common.write_log(
        args.out,
        "06_kept_keys",
        started,
        source=args.source,
        heldout_rows=len(rows),
        dtype="bfloat16 weights, float32 arithmetic",
        results=results,
        settings=settings,
        training=json.loads(TRAINING.read_text(encoding="utf-8")),
    )
    args.card.mkdir(parents=True, exist_ok=True)
    (args.card / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.card / "README.md").write_text(card(record), encoding="utf-8")


def lines_of(results: dict[str, dict[str, Any]]) -> str:
    """A line of the card for each result: saving, loss, recall by distance."""
    return "\n".join(
        f"| {name} | {found.get('kv_saving', 1):.2f}x | {found['loss']:.4f} | "
        + " | ".join(f"{line['second_loss']:.3f}" for line in found["recall"])
        + " |"
        for name, found in results.items()
    )


def card(record: dict[str, Any]) -> str:
    """The card, every figure from the record."""
    dense, kv, training = record["results"]["demo-dense"], record["results"]["demo-kv"], record["training"]
    kept = {k.removeprefix("keep_"): v for k, v in kv.items() if k.startswith("keep_") and k != "keep_ratio"}
    distances = [line["distance"] for line in dense["recall"]]
    recall = lines_of(record["results"])
    settings = lines_of(
        {"`demo-kv`": kv} | {f"`{name}`": found for name, found in record["settings"].items()}
    )
    explained = "\n".join(
        f"- {name}: {result['why']}" for name, result in record["results"].items() if "why" in result
    )
    return f"""# demo-kv

`modlab.load("demo-kv")`: routers for the cache of `demo-dense`, whose weights stay as they are. Every token passes every
layer; in the layers below, the routers decide whose keys and values stay when they are not among the latest 128.

| model | held-out loss (nats a token) | KV saving |
|---|---|---|
| `demo-dense` | {dense["loss"]:.4f} | 1.00x |
| `demo-kv` | {kv["loss"]:.4f} | {kv["kv_saving"]:.2f}x |

{record["heldout_rows"]:,} held-out rows of {common.SEQ_LEN:,} tokens from the source `{record["source"]}` ({kv["tokens"]:,} predicted
tokens); KV saving as `RaggedCache` allocates after the prefill of whole rows. (The files are those of the machine that
made this card, so that losses are not those of the demo pair's card.)

Share of held-out tokens whose keys and values each of these layers keeps (the other layers keep all):

| layer | {" | ".join(kept)} | mean |
{"|---" * (len(kept) + 2)}|
| kept | {" | ".join(f"{v:.3f}" for v in kept.values())} | {kv["keep_ratio"]:.3f} |

Loss on the second copy of a passage, so many tokens after the first one, next to the held-out loss and with controls on
the same weights, in which the routers decide nothing:

| who decides | KV saving | held-out loss | {" | ".join(f"{d:,}" for d in distances)} |
|---|---|---|{"---|" * len(distances)}
{recall}

{explained}

The same routers with another setting (as trained: `keep_recent=128`, `keep_first=4`):

| setting | KV saving | held-out loss | {" | ".join(f"{d:,}" for d in distances)} |
|---|---|---|{"---|" * len(distances)}
{settings}

Routers: `{training["command"]}`, {training["tokens"] / 1e6:,.0f} M tokens, {training["device"]}, {training["date"]}, commit
{training["commit"]}. This card: `{record["command"]}`, {record["date"][:10]}, torch {record["torch"]}.
"""


if __name__ == "__main__":
    main()
