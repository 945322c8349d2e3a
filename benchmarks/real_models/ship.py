"""Routers in a few hundred KB: packed gates of this study under the product's names, and the product's own.

`ship` takes gates of the study, bit for bit; `ship_run` what `modlab train` left.
"""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

import modlab
from benchmarks.real_models.measured.run import KV_CACHE_DTYPE, ORIGIN
from benchmarks.real_models.measured.settings import Setting, at, named
from modlab.routing.kv_saving import set_kv_saving
from modlab.routing.state import routing_of
from modlab.routing.trained import Trained
from modlab.saving.base_check import describe_base
from modlab.saving.bits import GROUP, pack_routers
from modlab.saving.card import model_card
from modlab.saving.description import write_description
from modlab.saving.files import CARD_FILE, ROUTER_FILE
from modlab.saving.routers import added_in

NAMES = {"linear": "weight", "bias": "bias", "into_KD": "into", "out_AK": "out"}
SAFE = 2.0
"""KV saving at which shipped routers are loaded."""
BITS = {"into": 5, "weight": 8}
"""Bits a weight of the hidden layer and of the linear part, as the study's; what is small stays fp16."""


def renamed(state: dict[str, torch.Tensor], D: int) -> dict[str, torch.Tensor]:
    """A gates file's tensors under the names of a converted Llama or Qwen2."""
    found = {}
    for name, tensor in state.items():
        layer, _, rest = name.removeprefix("layers.").partition(".")
        part, _, kind = rest.partition(".")
        if kind == "scales":
            tensor = tensor.view(-1, D // GROUP)
        found[f"model.layers.{layer}.mod_router.{NAMES[part]}{'.' * bool(kind)}{kind}"] = tensor.contiguous()
    return found


def trained(card: dict[str, Any]) -> Trained:
    """What a gates file's card says, in the product's words."""
    made = card["trained_on"]
    savings = {float(ratio): 1 / (1 + math.exp(-z)) for ratio, z in card["thresholds"].items()}
    return Trained(
        savings=savings,
        seq_len=8192,
        tokens=made["distillation_tokens"],
        weights=card["base"],
        data=f"{made['texts']}; {made['rows']}",
        method=(
            f"scores of one pass over {made['score_tokens']:,} tokens, then KL to the base with routing off, "
            f"{made['objective']}, learning rate {made['rate']}; {card['form']}; stored with "
            f"{card['bits']['hidden']} and {card['bits']['linear']} bits"
        ),
        results=card["results"],
    )


def ship(gates: Path, base: Path, hub_id: str, out: Path) -> None:
    """Writes the folder that `modlab.load` knows by its name.

    Args:
        gates: a packed file, with its card (.json) next to it.
        base: folder of the model that they were trained on.
        hub_id: where others get that model from.
        out: folder; its name is the routers' name.
    """
    card = json.loads(gates.with_suffix(".json").read_text(encoding="utf-8"))
    config = modlab.MoDConfig(layers="all", gates="kv_head", router_hidden=16, keep_recent=128, keep_first=4)
    model: Any = modlab.load(base)[0]
    facts = describe_base(model)
    modlab.convert(model, config)
    model.mod.trained = trained(card)
    set_kv_saving(model, SAFE)
    out.mkdir(parents=True, exist_ok=True)
    save_file(renamed(load_file(gates), model.config.hidden_size), out / ROUTER_FILE)
    write_description(model, out, hub_id, base=facts)
    (out / CARD_FILE).write_text(model_card(model, out.name, routers_of=hub_id), encoding="utf-8")


def ship_run(
    run: Path,
    base: Path,
    hub_id: str,
    out: Path,
    words: Trained,
    pieces: Path | None = None,
    before: int = 0,
) -> None:
    """Packs the routers of a run of `modlab train`.

    Args:
        run: folder that it left (routers and description).
        base: folder of the model that they were trained on.
        hub_id: where others get that model from.
        out: folder to write; its name is the routers' name.
        words: weights, data, method and results, for the card; its figures are those of the run.
        pieces: folder of `measure` on these routers: its thresholds, which give each ratio by the product's
            cache, and the recent tokens with them take the place of the run's.
        before: tokens that the routers had seen where the run started from trained ones.

    Raises:
        ModlabError: the folder does not say what its routers were trained for.
    """
    facts = describe_base(modlab.load(base)[0])
    model: Any = modlab.load(run, base=base)[0]
    found = routing_of(model).trained
    if found is None:
        raise modlab.ModlabError(f"nothing is known of the routers in {run}: give the folder of a run.")
    if pieces is not None:
        found = with_measured(found, pieces)
    said = {name: getattr(words, name) for name in ("weights", "data", "method", "results")}
    model.mod.trained = replace(found, tokens=before + found.tokens, **said)
    set_kv_saving(model, SAFE)
    out.mkdir(parents=True, exist_ok=True)
    save_file(pack_routers(added_in(model.state_dict()), BITS), out / ROUTER_FILE)
    write_description(model, out, hub_id, base=facts)
    (out / CARD_FILE).write_text(model_card(model, out.name, routers_of=hub_id), encoding="utf-8")


def with_measured(found: Trained, pieces: Path) -> Trained:
    """The same routers with the thresholds and recent tokens of `benchmarks.real_models measure`, and which
    savings lie beyond their training.

    Where a saving was measured with several numbers of recent tokens, the setting with as many as the routers
    know for it counts; else the one that was measured without a number of its own, or the only one.

    Raises:
        ModlabError: nothing was measured there, or not in the model's own type; nothing within the training,
            or a saving several times and none of them is the routers' own.
    """
    origin = pieces / f"{ORIGIN}.json"
    stored = json.loads(origin.read_text(encoding="utf-8")) if origin.exists() else {}
    if stored.get(KV_CACHE_DTYPE, "auto") != "auto":
        raise modlab.ModlabError(
            f"{pieces} was measured with kv_cache_dtype={stored[KV_CACHE_DTYPE]!r}, whose thresholds are of "
            "savings that are not routing's alone: give what was measured in the model's own type."
        )
    files = sorted(pieces.glob("threshold@*.json"))
    settings = sorted(filter(None, (named(file.stem) for file in files)), key=lambda one: one.order)
    if not settings:
        raise modlab.ModlabError(
            f"{pieces} has no threshold@SAVING.json: give the folder of `measure --out`."
        )
    names = {one: pieces / f"{at('threshold', one)}.json" for one in settings}
    read = {one: json.loads(file.read_text(encoding="utf-8")) for one, file in names.items()}
    own = [
        _own(found, saving, {one: read[one] for one in same})
        for saving, same in itertools.groupby(settings, key=lambda one: one.saving)
    ]
    within = [float(one["asked"]) for one in own if not one["beyond_training"]]
    if not within:
        raise modlab.ModlabError(f"all savings in {pieces} lie beyond the training of these routers.")
    return replace(
        found,
        savings={float(one["asked"]): float(one["threshold"]) for one in own},
        recent={float(one["asked"]): int(one["recent"]) for one in own},
        reached=max(within) if len(within) < len(own) else 0.0,
    )


def _own(found: Trained, saving: float, measured: dict[Setting, dict[str, Any]]) -> dict[str, Any]:
    """What was measured at a saving with the recent tokens that the routers know for it."""
    known = found.range is not None and found.range[0] <= saving <= found.range[1]
    recent = found.recent_for(saving) if known else None
    alike = [one for one in measured.values() if one["recent"] == recent]
    plain = [one for setting, one in measured.items() if setting.recent is None]
    if not alike and not plain and len(measured) > 1:
        counts = ", ".join(str(setting.recent) for setting in measured)
        raise modlab.ModlabError(
            f"{saving:g}x was measured with {counts} recent tokens, and the routers know "
            f"{'none' if recent is None else recent} for it: leave the piece that is to ship alone."
        )
    return next(iter([*alike, *plain, *measured.values()]))
