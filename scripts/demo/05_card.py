# ruff: noqa: E501 (the text of the card)
"""Stage 5: the shipped weights evaluated on the held-out files, and the card that states it all."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import common

MODELS = {
    "dense": "dense base, not shipped",
    "dense_continuation": "`demo-dense`: dense continuation",
    "mod": "`demo`: converted twin",
}
# The twin is fairly held against what the same tokens do for the dense model, not against the base.
SHIPPED = {"mod": "mod", "dense_continuation": "dense"}


def main() -> None:
    parser = common.parser(__doc__ or "")
    parser.add_argument(
        "--package", type=Path, default=common.REPO / "modlab" / "demo", help="where the demo pair goes"
    )
    parser.add_argument("--rows", type=int, default=0, help="held-out rows that are evaluated; 0 takes all")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()
    started = time.perf_counter()

    import modlab
    from modlab.measure import evaluate

    _, rows, heldout = common.load_data(args.out)
    if args.rows:
        heldout = heldout.select(range(min(args.rows, len(heldout))))
    logs = {name: common.read_log(args.out, name) for name in ("01_tokenizer", "02_dense", "03_twin")}
    logs["04_dense_continuation"] = common.read_log(args.out, "04_dense_continuation")
    unfinished = [name for name, log in logs.items() if log.get("stopped", "finished") != "finished"]
    if unfinished:
        raise SystemExit(f"{', '.join(unfinished)} did not finish: run the stage again, it resumes.")

    results: dict[str, Any] = {}
    for name in MODELS:
        # The stored bf16 weights in fp32 arithmetic: what modlab.load("demo") gives.
        model: Any = modlab.load(args.out / "export" / name, dtype="float32")[0]
        model.to(_device())
        results[name] = common.held_out(evaluate(model, heldout, batch_size=args.batch_size, cache=False))
        if name == "mod":
            results[name] |= stored_bytes(model, heldout, args.batch_size)
        print(name, results[name])
    record = common.write_log(
        args.out,
        "05_card",
        started,
        dtype="bfloat16 weights, float32 arithmetic",
        heldout_rows=len(heldout),
        parameters=logs["02_dense"]["parameters"],
        documents=logs["01_tokenizer"]["documents"],
        corpus_tokens=logs["01_tokenizer"]["tokens"],
        results=results,
        training={name: logs[name] for name in ("02_dense", "03_twin", "04_dense_continuation")},
        tokenizer=logs["01_tokenizer"],
    )
    args.package.mkdir(parents=True, exist_ok=True)
    for name, shipped_as in SHIPPED.items():
        shutil.rmtree(args.package / shipped_as, ignore_errors=True)
        shutil.copytree(args.out / "export" / name, args.package / shipped_as)
    (args.package / "results.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    (args.package / "README.md").write_text(card(record), encoding="utf-8")
    total = sum(p.stat().st_size for p in args.package.rglob("*") if p.is_file())
    print(f"{args.package}: {total / 1e6:.1f} MB in all")


def stored_bytes(model: Any, rows: Any, batch_size: int) -> dict[str, float]:
    """K/V that the ragged cache really allocates after the prefill of whole rows, against a dense cache's."""
    import torch

    from modlab import RaggedCache
    from modlab.hf.names import cache_argument
    from modlab.training.loader import open_batches

    stored = dense = 0
    with torch.no_grad():
        for batch in open_batches(rows).iterate(min(batch_size, len(rows)), seed=None, epochs=1):
            cache = RaggedCache(model)
            model(
                input_ids=batch["input_ids"].to(model.device),
                use_cache=True,
                logits_to_keep=1,
                **{cache_argument(model): cache},
            )
            stored += cache.nbytes
            dense += cache.dense_nbytes
    return {"kv_bytes": stored, "dense_kv_bytes": dense, "kv_saving": dense / stored}


def card(record: dict[str, Any]) -> str:
    """The model card, every figure from the record."""
    results, training, tokenizer = record["results"], record["training"], record["tokenizer"]
    mod = results["mod"]
    kept = {k.removeprefix("keep_"): v for k, v in mod.items() if k.startswith("keep_") and k != "keep_ratio"}
    twin = training["03_twin"]["settings"]
    trained = {
        "dense": training["02_dense"]["tokens"],
        "dense_continuation": training["02_dense"]["tokens"] + training["04_dense_continuation"]["tokens"],
        "mod": training["02_dense"]["tokens"] + training["03_twin"]["tokens"],
    }
    files, tokens = tokenizer["documents"], tokenizer["tokens"]
    models = [
        f"| {title} | {trained[name] / 1e6:,.0f} M | {results[name]['loss']:.4f} "
        f"| {results[name].get('kv_saving', 1.0):.2f}x |"
        for name, title in MODELS.items()
    ]
    runs = [
        f"- {name}: `{log['command']}`, {log['steps']:,} steps, {log['tokens'] / 1e6:,.0f} M tokens, "
        f"{log['training_seconds']:,.0f} s, {log['date'][:10]}, commit {(log['commit'] or 'unknown')[:12]}."
        for name, log in training.items()
    ]
    return f"""# The demo pair

`modlab.load("demo")` and `modlab.load("demo-dense")`: a Llama-architecture model of
{record["parameters"] / 1e6:.1f} M parameters, trained from scratch on Python source, and its Mixture-of-Depths twin.
They are made to learn and test routing on, not to write programs with.

| model | tokens trained on | held-out loss (nats a token) | KV saving |
|---|---|---|---|
{chr(10).join(models)}

KV saving: bytes of a dense cache / bytes that `RaggedCache` allocates, after the prefill of whole held-out rows
({tokenizer["seq_len"]} tokens each). Twin and dense continuation both start from the base and saw the same rows in the
same order.

Share of held-out tokens that each routed layer of the twin keeps (the other layers keep all):

| layer | {" | ".join(kept)} | mean |
{"|---" * (len(kept) + 2)}|
| kept | {" | ".join(f"{v:.3f}" for v in kept.values())} | {mod["keep_ratio"]:.3f} |

## Data

Source `{tokenizer["source"]}`: the Python standard library and, with `python`, the packages that were installed on the
training machine; identical files once, files under 400 characters left out. {files["train"]:,} files
({tokens["train"] / 1e6:,.1f} M tokens) to train on; {files["heldout"]:,} files ({tokens["heldout"] / 1e6:,.2f} M tokens)
held out, chosen by a hash of the file's path. The figures above are over {mod["tokens"]:,} predicted held-out tokens.
Tokenizer: byte-level BPE, {tokenizer["vocab_size"]:,} tokens, trained on the train split.

## How it was made

- Twin: alternate layers, threshold p = 0.5, two-sided target {twin["keep_ratio"]} (weight {twin["lam"]}, ramp
  {twin["ramp"]}), what-if share {twin["what_if"]}, KL weight {twin["kl"]}.
- Device: {training["02_dense"]["device"]}; torch {record["torch"]}, transformers {record["transformers"]}, accelerate
  {record["accelerate"]}, Python {record["python"]}. Evaluation:
  {record["dtype"]}.
{chr(10).join(runs)}
- This card: `{record["command"]}`, {record["date"][:10]}. All figures: `results.json`.

Make it again: `python scripts/demo/run.py --minutes 8` (a GPU is advised).
"""


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


if __name__ == "__main__":
    main()
