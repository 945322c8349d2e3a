"""`modlab export`: a plain folder that stock engines serve."""

from __future__ import annotations

import argparse
import contextlib
import json
from typing import Any

from modlab.cli.flags import Command, add_kv_cache_dtype, read_integers, read_name, read_path
from modlab.cli.models import (
    add_data_flags,
    add_model_flags,
    check_target,
    load_model,
    rows_of,
    store_as_asked,
)


def add(command: Command) -> None:
    """The parser of this command."""
    sub = command(
        "export",
        run,
        "write a plain folder in which layers that need no past are window layers",
        "Engines such as vLLM and SGLang serve it without modlab. What it costs against routing token by "
        "token is printed and written to FOLDER/export.json: loss, and loss on the second copy of a passage.",
    )
    sub.add_argument(
        "model", metavar="MODEL", type=read_name, help="model with trained routers of its keys and values"
    )
    sub.add_argument("--static", metavar="FOLDER", type=read_path, required=True, help="where to write")
    add_data_flags(sub, required=True, tokens=65536)
    sub.add_argument("--split", choices=("heldout", "train", "all"), help="as for `modlab eval`")
    which = sub.add_mutually_exclusive_group()
    which.add_argument("--below", metavar="P", type=float, default=0.1, help="layers that keep at most this")
    which.add_argument("--layers", metavar="I,J", type=read_integers, help="these layers instead")
    sub.add_argument(
        "--distances", metavar="N,N", type=read_integers, default=(256, 1024), help="of the recall probe"
    )
    sub.add_argument("--rows", metavar="N", type=int, default=64, help="passages of the recall probe")
    sub.add_argument("--overwrite", action="store_true", help="replace what lies in FOLDER")
    add_kv_cache_dtype(sub, "keys and values of routed layers")
    add_model_flags(sub)


def run(options: argparse.Namespace) -> int:
    """Runs the command and returns its exit status."""
    from modlab import measure
    from modlab.routing.state import routing_of
    from modlab.saving.static import export_static, static_config, static_layers

    check_target(options.static, options.overwrite)
    model, tokenizer = load_model(options, options.model)
    store_as_asked(options, model)
    routing_of(model)  # refuses a dense model
    static_config(model, [])  # refuses before anything is measured
    rows = rows_of(options, model, tokenizer)
    data = list(rows)
    kept = measure.evaluate(model, data, seq_len=rows.seq_len, cache=False).keep_ratio_by_layer
    layers = sorted(set(options.layers)) if options.layers else static_layers(kept, options.below)
    export_static(model, tokenizer, options.static, layers)
    costs = _costs(model, data, layers, options)
    report = {"model": options.model, "layers": layers, "keep_ratio_by_layer": kept, "costs": costs}
    (options.static / "export.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"{options.static}: window layers {layers}, {len(layers)} of {len(kept)} routed ones")
    print("\n".join(_line(name, figures) for name, figures in costs.items()))
    return 0


def _costs(model: Any, data: Any, layers: list[int], options: argparse.Namespace) -> dict[str, Any]:
    """Loss, K/V bytes and recall of the dense model, the routed one and the exported one."""
    from modlab import measure, recall
    from modlab.routing.state import routing_off, routing_override
    from modlab.saving.static import as_static

    ways: dict[str, contextlib.AbstractContextManager[Any]] = {
        "dense": routing_off(model),
        "routed": contextlib.nullcontext(),
        "static": routing_override(model, as_static(layers)),
    }
    found: dict[str, Any] = {}
    for name, way in ways.items():
        with way:
            pass_ = measure.evaluate(model, data)
            far = recall(model, data, distances=options.distances, rows=options.rows, progress=False)
        found[name] = {
            "loss": pass_.loss,
            "kv_bytes": pass_.kv_bytes,
            "second_copy": dict(zip(far["distance"].tolist(), far["second_loss"].tolist(), strict=True)),
        }
    return found


def _line(name: str, figures: dict[str, Any]) -> str:
    copies = ", ".join(f"{loss:.4f} at {distance:,}" for distance, loss in figures["second_copy"].items())
    return f"{name:<7} loss {figures['loss']:.4f}, {figures['kv_bytes']:,} bytes, second copy {copies}"
