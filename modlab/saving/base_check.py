"""Whether a base is the one that routers alone were trained on: tolerant of its dtype and of quantisation.

Compared are the model's type and sizes, and 256 entries of its input embedding, by their direction and
length: rounding to four bits changes these by a few hundredths, another model's have nothing to do with them.
A fine-tune of the same base passes: its routers are nearly right, and what they lose can be measured.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from modlab.errors import ModlabError

SIDE = 16
LEAST_COSINE = 0.95
LENGTHS = (0.8, 1.25)
SIZES = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads")


def describe_base(model: Any) -> dict[str, Any]:
    """What `check_base` compares: JSON-ready. `embedding` is [] where it cannot be read (sharded, packed)."""
    config = model.config.get_text_config(decoder=True)
    weight = _embedding(model)
    entries = [] if weight is None else [float(f"{value:.4g}") for value in _entries(weight, len(weight))]
    return {
        "model_type": config.model_type,
        **{name: getattr(config, name) for name in SIZES if isinstance(getattr(config, name, None), int)},
        "vocabulary": 0 if weight is None else len(weight),
        "embedding": entries,
    }


def check_base(model: Any, described: dict[str, Any], name: str) -> None:
    """Raises ModlabError where `model` is not the base that `describe_base` described.

    Args:
        model: dense, the base.
        described: nothing is checked if it is empty.
        name: of the routers, for errors.
    """
    if not described:
        return
    here = describe_base(model)
    for key in ("model_type", *SIZES):
        if described.get(key) != here.get(key):
            raise ModlabError(
                f"the routers of {name!r} are for a model with {key}={described.get(key)!r}, and this base "
                f"has {here.get(key)!r}: give the base that they were trained on."
            )
    weight, expected = _embedding(model), torch.tensor(described.get("embedding", []))
    if weight is None or not bool(expected.any()):
        return
    vocabulary = described["vocabulary"]
    found = _entries(weight, vocabulary) if vocabulary <= len(weight) else torch.zeros(len(expected))
    cosine = float(torch.nn.functional.cosine_similarity(found, expected, 0))
    length = float(found.norm() / expected.norm())
    if cosine < LEAST_COSINE or not LENGTHS[0] <= length <= LENGTHS[1]:
        raise ModlabError(
            f"the routers of {name!r} were trained on other weights than this base's: 256 entries of the "
            f"input embedding have a cosine of {cosine:.3f} and {length:.2f} times the length (at least "
            f"{LEAST_COSINE} and {LENGTHS[0]} to {LENGTHS[1]} are asked for, which quantised copies of the "
            "right weights reach). Give the base that they were trained on."
        )


def read_base(found: Any) -> dict[str, Any]:
    """The "base" of a description.

    Raises:
        ModlabError: it is something else.
    """
    if not isinstance(found, dict):
        raise ModlabError(f"base={found!r:.60} is not an object")
    if unknown := sorted(found.keys() - {"model_type", "vocabulary", "embedding", *SIZES}):
        raise ModlabError(f"base has a field {unknown[0]!r}, which this modlab does not know")
    for key in ("vocabulary", *SIZES):
        if type(found.get(key, 0)) is not int or not 0 <= found.get(key, 0) < 2**31:
            raise ModlabError(f"base has {key}={found[key]!r:.60}, which is no size")
    entries = found.get("embedding", [])
    if not isinstance(entries, list) or len(entries) not in (0, SIDE**2):
        raise ModlabError("base has an embedding that is not a list of 256 numbers")
    if not all(isinstance(entry, float | int) and math.isfinite(entry) for entry in entries):
        raise ModlabError("base has an embedding that is not a list of 256 numbers")
    if found and not isinstance(found.get("model_type"), str):
        raise ModlabError(f"base has model_type={found.get('model_type')!r:.60}, which is no name")
    return found


def _embedding(model: Any) -> Tensor | None:
    """The input embedding [V, D], where it is plain numbers in one place."""
    weight = getattr(model.get_input_embeddings(), "weight", None)
    if not isinstance(weight, Tensor) or type(weight.data) is not Tensor or weight.is_meta:
        return None
    plain = weight.dim() == 2 and weight.is_floating_point() and weight.numel() > 0
    return weight if plain else None


def _entries(weight_VD: Tensor, vocabulary: int) -> Tensor:
    """16 rows and 16 columns of it, evenly spread over the first `vocabulary` rows; fp32 [256] on the CPU."""
    rows = torch.arange(SIDE) * (vocabulary - 1) // (SIDE - 1)
    columns = torch.arange(SIDE) * (weight_VD.shape[1] - 1) // (SIDE - 1)
    device = weight_VD.device
    return weight_VD.detach()[rows.to(device)][:, columns.to(device)].float().flatten().cpu()
