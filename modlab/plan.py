"""What a model takes on each GPU, worked out before anybody loads it: `modlab.plan`, `modlab plan`.

Weights, gradients and optimiser follow from the shapes of the parameters, K/V from those of the cache: these
are exact. Activations are what autograd keeps in a forward on the meta device (`activations.py`), and the
logits that are in memory at once: an estimate, to which a real run adds what its libraries and fragments
take. The peaks of distillation on an H200 are within 5 % of it (tests/test_plan.py).

Shape letters: B rows, T tokens, D model dim, V vocabulary, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from modlab.activations import kept_bytes
from modlab.config import KVCacheDtype, MoDConfig
from modlab.errors import ModlabError, check_count, check_number
from modlab.hf.anatomy import attention_windows, decoder_layers
from modlab.routing.kv_saving import rounding as rounding_by
from modlab.training import divergence, objectives

if TYPE_CHECKING:
    import pandas as pd

GIB = 2**30
FP32 = 4
OPTIMIZER = 2 * FP32  # AdamW's two moments, a weight
COPIES_AT_ONCE = 4  # of these logits in distillation: student's, teacher's, their slope, the slope before
STATES = 3  # of the last layer in distillation: student's, teacher's, their slope
ROUTED_SAVING = 4.0  # by routing, where nothing is said
ROUTER_COPIES = 2  # of the state in fp32, which a router with a hidden layer keeps: as it is, and normalised


@dataclass
class Sizes:
    """A model's sizes, of one GPU or of all.

    Attributes:
        parameters: number of them.
        whole: bytes of the weights in their own dtype.
        by_rows: parameters of the largest part when each is cut along its first axis (FSDP2).
        by_heads: parameters of a part when the tensor-parallel plan cuts them.
        layer: parameters of the largest decoder layer.
        rest: parameters outside the layers.
        heads: KV heads.
        token_bytes: of keys and values of a token in one layer.
        head_size: numbers of a key of a head, and of a value.
        windows: of each layer, None for full attention.
        activations: bytes that autograd keeps of a token in a layer, on average, where weights are trained.
        autocast: the same of weights in fp32 under autocast, as one GPU and DDP train them.
        frozen: the same where routers alone are trained.
        hidden, vocabulary: D, V.
        itemsize: bytes of a weight.
    """

    parameters: int
    whole: int
    by_rows: int
    by_heads: int
    layer: int
    rest: int
    heads: int
    token_bytes: int
    head_size: int
    windows: list[int | None]
    activations: float
    autocast: float
    frozen: float
    hidden: int
    vocabulary: int
    itemsize: int


def plan(
    model: Any,
    *,
    gpus: int = 1,
    memory: float = 80.0,
    context: int = 4096,
    batch: int = 1,
    kv_saving: float | None = None,
    kv_cache_dtype: str = "auto",
    dtype: str = "bfloat16",
    checkpointing: bool = True,
) -> pd.DataFrame:
    """What each GPU holds, for inference and for training, in every way to use several.

    Args:
        model: a `transformers` config, or the name of a model: a folder or a hub id. Only its config is read.
        gpus: how many.
        memory: GiB of each.
        context: tokens of a row.
        batch: rows: of each GPU where every GPU has its own ("copies", DDP, FSDP2), else of all together.
        kv_saving: how many times fewer bytes the routed cache takes, all layers routed; by default 4 by
            routing, times what fewer bits save.
        kv_cache_dtype: "auto", keys and values in `dtype`, "int8" or "k6v4" (`MoDConfig.kv_cache_dtype`).
        dtype: of the weights where they are not trained; trained ones are fp32, computed with in bf16.
        checkpointing: training keeps one state a layer and computes the rest again.

    Returns:
        DataFrame, one line a way, in GiB a GPU: `use` (inference; routers: distilled, the base frozen;
        weights: all trained on texts), `way`, `weights`, `optimizer` (gradients and AdamW's moments),
        `activations`, `kv` (dense), `kv_routed`, `total` (with `kv_routed`), `total_dense`, `fits` (the
        total, in nine tenths of `memory`). "tensor parallel" is left out where the family has no plan for
        it, or the GPUs cannot share its KV heads evenly.

    Raises:
        ModlabError: no such model, or one without keys and values in plain heads.
    """
    import pandas as pd

    for name, count in {"gpus": gpus, "context": context, "batch": batch}.items():
        check_count(name, count)
    if not check_number("memory", memory) > 0:
        raise ModlabError(f"memory={memory} has to be above 0.")
    if kv_saving is not None and not check_number("kv_saving", kv_saving) >= 1:
        raise ModlabError(f"kv_saving={kv_saving} has to be at least 1.")
    if kv_cache_dtype not in get_args(KVCacheDtype):
        raise ModlabError(
            f"kv_cache_dtype={kv_cache_dtype!r}: choose one of {', '.join(get_args(KVCacheDtype))}."
        )
    sizes = sizes_of(_config(model), gpus, getattr(torch, dtype))
    heads = sizes.heads, sizes.head_size, sizes.head_size
    rounding = rounding_by(kv_cache_dtype, heads, sizes.itemsize)
    by_routing = ROUTED_SAVING if kv_saving is None else max(1.0, rounding.routed(kv_saving))
    kv = kv_bytes(sizes, context, batch)
    routed = kv_bytes(sizes, context, batch, by_routing) / rounding.smaller
    lines = [
        *_inference(sizes, gpus, context, batch, kv, routed),
        *_training(sizes, gpus, context, batch, checkpointing),
    ]
    table = pd.DataFrame(lines).fillna(0.0)
    parts = ["weights", "optimizer", "activations"]
    table[[*parts, "kv", "kv_routed"]] /= GIB
    table["total"] = table[[*parts, "kv_routed"]].sum(axis=1)
    table["total_dense"] = table[[*parts, "kv"]].sum(axis=1)
    table["fits"] = table["total"] <= 0.9 * memory
    table.attrs["parameters"] = sizes.parameters
    return table


def sizes_of(config: Any, gpus: int, dtype: torch.dtype = torch.bfloat16) -> Sizes:
    """The sizes of the model that a config describes, cut over so many GPUs.

    Raises:
        ModlabError: no causal language model has such a config.
    """
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    except ValueError as error:  # of a type that is none, an encoder-decoder's for one
        first = str(error).partition("\n")[0][:200]
        raise ModlabError(f"{config.model_type!r} is no causal language model ({first})") from error
    text = config.get_text_config(decoder=True)
    heads = getattr(text, "num_key_value_heads", None) or getattr(text, "num_attention_heads", None)
    size = getattr(text, "head_dim", None) or (heads and text.hidden_size // text.num_attention_heads)
    layers = decoder_layers(model)
    windows = attention_windows(model, len(layers))
    if not heads or not size or any(isinstance(window, str) for window in windows.values()):
        raise ModlabError(f"{type(model).__name__} does not keep plain keys and values in all its layers.")
    parameters = dict(model.named_parameters())
    largest = max(layers, key=_count)
    total = sum(p.numel() for p in parameters.values())
    return Sizes(
        parameters=total,
        whole=sum(p.numel() * p.element_size() for p in parameters.values()),
        by_rows=sum(p.numel() // len(p) * -(-len(p) // gpus) for p in parameters.values()),
        by_heads=sum(p.numel() // (gpus if n in _cut(model) else 1) for n, p in parameters.items()),
        layer=_count(largest),
        rest=total - sum(map(_count, layers)),
        heads=heads,
        token_bytes=2 * heads * size * dtype.itemsize,
        head_size=size,
        windows=[windows[i] for i in range(len(layers))],  # type: ignore[misc]  # the texts were refused
        activations=kept_bytes(model, frozen=False) / len(layers),
        frozen=kept_bytes(model, frozen=True) / len(layers),
        autocast=kept_bytes(model.float(), frozen=False, autocast=torch.bfloat16) / len(layers),
        hidden=text.hidden_size,
        vocabulary=text.vocab_size,
        itemsize=dtype.itemsize,
    )


def kv_bytes(sizes: Sizes, context: int, batch: int, kv_saving: float = 1.0) -> float:
    """Bytes of the keys and values of all layers in the model's own type, where routing saves so much; a
    routed layer holds its recent tokens anyway."""
    mod = MoDConfig(layers="all")
    total = 0.0
    for window in sizes.windows:
        seen = context if window is None else min(window, context)
        stored = max(context / kv_saving, mod.recent_stored) if kv_saving > 1 else context
        total += batch * min(seen, stored) * sizes.token_bytes
    return total


def _inference(
    sizes: Sizes, gpus: int, context: int, batch: int, kv: float, routed: float
) -> list[dict[str, Any]]:
    """Copies for rows of their own; layers spread by `device_map`; tensor parallelism."""
    # a prompt's states, one layer's inner ones, and the logits of the last token
    work = batch * (context * sizes.activations + sizes.vocabulary * FP32)
    ways = {
        "copies": (sizes.whole, 1, 1),
        "layers spread": (sizes.whole / gpus, gpus, 1),
        "tensor parallel": (sizes.by_heads * sizes.itemsize, gpus, gpus),
    }
    if gpus > 1 and (sizes.heads % gpus or sizes.by_heads == sizes.parameters):
        del ways["tensor parallel"]
    return [
        {
            "use": "inference", "way": way, "weights": weights, "optimizer": 0.0, "activations": work / cut,
            "kv": kv / parts, "kv_routed": routed / parts,
        }
        for way, (weights, parts, cut) in ways.items()
    ]  # fmt: skip


def _training(sizes: Sizes, gpus: int, context: int, batch: int, checkpointing: bool) -> list[dict[str, Any]]:
    """DDP and FSDP2, with the base frozen and with all weights trained. Routers' weights, a thousandth of a
    layer, are left out; what they keep of the states is not."""
    tokens = batch * context
    gathered = (2 * sizes.layer + sizes.rest) * sizes.itemsize  # this layer, the next, and the ends
    copies = (sizes.itemsize + FP32) * sizes.parameters  # autocast's own, and DDP's buckets
    whole_gradients = (FP32 + sizes.itemsize) * sizes.layer  # before they are cut
    distilled = tokens * _kept(sizes, sizes.frozen, sizes.itemsize, checkpointing)
    distilled += _distilling(sizes, tokens)
    held = {("routers", "DDP"): distilled, ("routers", "FSDP2"): distilled + gathered}
    for way, activations, state, more in (
        ("DDP", sizes.autocast, FP32, copies),
        ("FSDP2", sizes.activations, sizes.itemsize, gathered + whole_gradients),
    ):
        kept = tokens * _kept(sizes, activations, state, checkpointing)
        held["weights", way] = kept + _text_loss(sizes, tokens) + more
    of_weight = {"routers": (sizes.itemsize, 0), "weights": (FP32, FP32 + OPTIMIZER)}
    count = {"DDP": sizes.parameters, "FSDP2": sizes.by_rows}
    return [
        {
            "use": use, "way": way, "weights": count[way] * of_weight[use][0],
            "optimizer": count[way] * of_weight[use][1], "activations": bytes_held,
        }
        for (use, way), bytes_held in held.items()
    ]  # fmt: skip


def _kept(sizes: Sizes, activations: float, state: int, checkpointing: bool) -> float:
    """Bytes of a token that the layers keep.

    Args:
        activations: of a layer without its router.
        state: bytes of a number of the residual stream, which is what stays of a layer with `checkpointing`:
            fp32 under autocast, 16 bit with FSDP2 and where the base is frozen.
    """
    layers, of_layer = len(sizes.windows), activations + ROUTER_COPIES * FP32 * sizes.hidden
    return layers * sizes.hidden * state + of_layer if checkpointing else layers * of_layer


def _distilling(sizes: Sizes, tokens: int) -> float:
    """Bytes behind the layers in distillation, where no logits wait for a backward pass."""
    logits = min(tokens * sizes.vocabulary, divergence.ON_GPU)
    return (COPIES_AT_ONCE * logits + STATES * tokens * sizes.hidden) * sizes.itemsize


def _text_loss(sizes: Sizes, tokens: int) -> float:
    """Bytes of all logits and their gradient, and of the pieces that the loss reads in fp32."""
    logits = tokens * sizes.vocabulary
    return logits * 2 * sizes.itemsize + 2 * FP32 * min(logits, objectives.CHUNK_ELEMENTS)


def _config(model: Any) -> Any:
    from transformers import AutoConfig

    from modlab.saving.demos import folder_named
    from modlab.saving.depth import MOST_LAYERS, depths
    from modlab.saving.files import CONFIG_FILE

    config = getattr(model, "config", model)
    if isinstance(model, str):
        folder = folder_named(model)
        if (Path(folder) / CONFIG_FILE).is_file() and not (Path(folder) / "config.json").is_file():
            raise ModlabError(f"{model!r} holds routers alone: give the base model that they are for.")
        try:
            config = AutoConfig.from_pretrained(str(folder))
        except Exception as error:  # transformers raises many kinds for configs that it cannot read
            raise ModlabError(f"{model!r} is no folder or hub id with a config: {error}") from error
    if not hasattr(config, "to_dict"):
        raise ModlabError(f"{type(model).__name__} is no config and no name of a model.")
    for name, layers in depths(config.to_dict()):
        if layers > MOST_LAYERS:
            raise ModlabError(f"the config says {name}={layers:,}, and no model has so many.")
    return config


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _cut(model: Any) -> set[str]:
    """Names of the parameters that the family's tensor-parallel plan cuts."""
    import re

    plans = {**(getattr(model.config, "base_model_tp_plan", None) or {})}
    prefix = model.base_model_prefix
    patterns = [f"{prefix}.{name}" for name, style in plans.items() if "wise" in style]
    patterns += [name for name, style in (getattr(model, "_tp_plan", None) or {}).items() if "wise" in style]
    found = re.compile("|".join(re.escape(p).replace(r"\*", r"\d+") for p in patterns) or "$^")
    return {
        name for name, p in model.named_parameters() if p.dim() > 1 and found.match(name.rpartition(".")[0])
    }
