# ruff: noqa: E501 (the text of the card)
"""Stage 6: `demo-kv`, the routers that decide about the cache of `demo-dense`, held against it on held-out files.

The routers are those of the study's arm that trains routers alone on the shipped model:

    python -m benchmarks.quality all --scale demo --arms dense,kv-mid-frozen

which leaves them in build/quality/demo/routers. Copied to modlab/demo/kv, they are measured here on any machine.
"""

from __future__ import annotations

import importlib
import json
import time
from pathlib import Path
from typing import Any

import common

PACKAGE = common.REPO / "modlab" / "demo"
TRAINING = Path(__file__).with_name("logs") / "06_kept_keys.json"


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument("--source", default="python", help="what modlab.data.packed takes")
    parser.add_argument("--rows", type=int, default=128, help="held-out rows that are evaluated")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-proc", type=int, default=1, help="processes that read and tokenise")
    args = parser.parse_args()
    started = time.perf_counter()

    import modlab
    from modlab import data
    from modlab.train import evaluate

    stored_bytes = importlib.import_module("05_card").stored_bytes
    models = {name: modlab.load(name) for name in ("demo-dense", "demo-kv")}
    tokenizer = models["demo-dense"][1]
    documents = data.documents(args.source, "heldout", num_proc=args.num_proc)
    rows = data.packed(
        documents, tokenizer, common.SEQ_LEN, limit_tokens=args.rows * common.SEQ_LEN, num_proc=args.num_proc
    )
    rows = rows.with_format("torch")
    results: dict[str, Any] = {}
    for name, (model, _) in models.items():
        results[name] = evaluate(model, rows, batch_size=args.batch_size)
        texts = [row["input_ids"][None] for row in rows]
        found = modlab.recall(model, texts, distances=(256, 512, 1024, 1800), rows=48)
        results[name]["recall"] = found[["distance", "second_loss"]].to_dict("records")
        if name == "demo-kv":
            results[name] |= stored_bytes(model, rows, args.batch_size)
        print(name, results[name])
    record = common.write_log(
        args.out,
        "06_kept_keys",
        started,
        source=args.source,
        heldout_rows=len(rows),
        dtype="bfloat16 weights, float32 arithmetic",
        results=results,
        training=json.loads(TRAINING.read_text(encoding="utf-8")),
    )
    (PACKAGE / "kv" / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (PACKAGE / "kv" / "README.md").write_text(card(record), encoding="utf-8")


def card(record: dict[str, Any]) -> str:
    """The card, every figure from the record."""
    dense, kv, training = record["results"]["demo-dense"], record["results"]["demo-kv"], record["training"]
    kept = {k.removeprefix("keep_"): v for k, v in kv.items() if k.startswith("keep_") and k != "keep_ratio"}
    recall = "\n".join(
        f"| {a['distance']:,} | {a['second_loss']:.3f} | {b['second_loss']:.3f} |"
        for a, b in zip(dense["recall"], kv["recall"], strict=True)
    )
    return f"""# demo-kv

`modlab.load("demo-kv")`: routers for the cache of `demo-dense`, whose weights stay as they are. Every token passes every
layer; in the layers below, the routers decide whose keys and values stay once 128 more tokens have come.

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

Loss on the second copy of a passage, so many tokens after the first one:

| distance | `demo-dense` | `demo-kv` |
|---|---|---|
{recall}

Routers: `{training["command"]}`, {training["tokens"] / 1e6:,.0f} M tokens, {training["device"]}, {training["date"]}, commit
{training["commit"]}. This card: `{record["command"]}`, {record["date"][:10]}, torch {record["torch"]}.
"""


if __name__ == "__main__":
    main()
