"""KVTracker: what a model's key/value cache really takes, by forward step and layer.

    with modlab.KVTracker(model) as kv:
        model.generate(**inputs, max_new_tokens=64)
    kv.frame()      # one row per forward step and layer
    kv.summary()    # peak bytes, what a dense cache would take, the saving
    kv.plot()       # bytes over steps against dense

Bytes are *allocated* bytes, see `modlab/cache/bytes.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from modlab.cache import bytes as kv_bytes
from modlab.errors import ModlabError
from modlab.hf.names import given_cache

if TYPE_CHECKING:
    import pandas as pd
    import plotly.graph_objects as go

COLUMNS = ("step", "phase", *kv_bytes.COLUMNS)


class KVTracker:
    """Context manager that records the key/value cache after every forward of `model`'s decoder.

    Works for any Hugging Face causal language model, converted or not, and any calls made inside the block:
    plain forwards, `generate`, chunked prefill, beams. Nothing is changed in the model and the hook goes away
    on exit, also after an error. Trackers nest; entering the same tracker again starts a new record. Reading
    a static cache's length waits for the device, so do not time a model inside the block.

    Args:
        model: a `PreTrainedModel`, causal LM or its base model.

    Raises:
        ModlabError: from `frame`, `rows`, `summary`, `plot` if no forward ran inside the block, or none kept
        a cache.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._rows: list[dict[str, Any]] = []
        self._handle: torch.utils.hooks.RemovableHandle | None = None
        self._depth = 0
        self._forwards = 0
        self._steps = 0

    def __enter__(self) -> KVTracker:
        self._depth += 1
        if self._depth == 1:
            self._rows, self._forwards, self._steps = [], 0, 0
            self._handle = self._decoder().register_forward_hook(self._hook, with_kwargs=True)
        return self

    def __exit__(self, *exc: object) -> None:
        self._depth -= 1
        if self._depth == 0 and self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _decoder(self) -> nn.Module:
        get_decoder = getattr(self.model, "get_decoder", None)
        decoder = get_decoder() if callable(get_decoder) else None
        if decoder is None:
            decoder = getattr(self.model, "base_model", None)
        if not isinstance(decoder, nn.Module):
            raise ModlabError(
                f"KVTracker needs a Hugging Face causal language model, got {type(self.model).__name__}.\n"
                "Pass the model that AutoModelForCausalLM.from_pretrained or modlab.load returned."
            )
        return decoder

    def _hook(self, module: nn.Module, args: tuple[Any, ...], *told: Any) -> None:
        """What is told: the keyword arguments and the output. The output alone in another thread's forward
        that is under way while the block begins or ends: torch notes that a hook takes keyword arguments
        after it has the hook, and forgets it in two steps as well."""
        kwargs, output = told if len(told) == 2 else ({}, *told)
        self._forwards += 1
        cache = _find_cache(output, kwargs)
        if cache is None:
            return
        hidden = (
            output[0] if isinstance(output, (tuple, list)) else getattr(output, "last_hidden_state", None)
        )
        new_tokens = hidden.shape[1] if isinstance(hidden, torch.Tensor) and hidden.ndim == 3 else 1
        layers = kv_bytes.snapshot(cache)
        seen = max((row["seen_tokens"] for row in layers), default=0)
        phase = "prefill" if new_tokens > 1 or seen <= new_tokens else "decode"
        self._rows.extend({"step": self._steps, "phase": phase, **row} for row in layers)
        self._steps += 1

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The records, one dict per forward step and layer (keys: `COLUMNS`). Needs no pandas."""
        if not self._rows:
            if not self._forwards:
                why = "no forward of this model ran inside the `with` block; call the same model object in it"
            else:
                why = (
                    f"{self._forwards} forward(s) ran but none returned a key/value cache; pass "
                    "use_cache=True (models in training mode with gradient checkpointing turn it off)"
                )
            raise ModlabError(f"KVTracker has nothing to show: {why}.")
        return self._rows

    def frame(self) -> pd.DataFrame:
        """One row per forward step and layer.

        Columns: `step` (0, 1, ... over all forwards in the block), `phase` ("prefill" for the first or a
        many-token forward, else "decode"), `layer`, `kind` of cache layer, `device` that it lies on (several
        with `device_map`: `frame().groupby(["step", "device"]).kv_bytes.sum()` are the bytes on each),
        `seen_tokens` (per row of the batch, padding included), `kept_tokens` (stored keys, summed over the
        batch; in a ragged cache real kept tokens only, and with skip="kv" the latest ones), `kv_bytes`
        (allocated), `dense_kv_bytes` (a dense cache in the model's own type for the tokens seen, padding
        included, sliding windows limited to what the next query can see). A linear-attention layer has `kind`
        "linear", no tokens, and its state's bytes in both byte columns.
        """
        import pandas as pd

        return pd.DataFrame(self.rows, columns=list(COLUMNS))

    def _totals(self) -> list[tuple[int, int, int, int]]:
        """(step, tokens seen, allocated bytes, dense bytes) summed over layers, per step."""
        totals: dict[int, list[int]] = {}
        for row in self.rows:
            total = totals.setdefault(row["step"], [0, 0, 0])
            total[0] = max(total[0], row["seen_tokens"])
            total[1] += row["kv_bytes"]
            total[2] += row["dense_kv_bytes"]
        return [(step, seen, kv, dense) for step, (seen, kv, dense) in totals.items()]

    def summary(self) -> dict[str, float]:
        """Peaks over the steps: steps, seen_tokens, kv_bytes, dense_kv_bytes, kv_saving (their ratio)."""
        totals = self._totals()
        kv, dense = max(t[2] for t in totals), max(t[3] for t in totals)
        return {
            "steps": len(totals),
            "seen_tokens": max(t[1] for t in totals),
            "kv_bytes": kv,
            "dense_kv_bytes": dense,
            "kv_saving": dense / kv if kv else float("nan"),
        }

    def plot(self) -> go.Figure:
        """Allocated bytes by forward step, and what a dense cache would take, as a plotly figure."""
        try:
            import plotly.graph_objects as go
        except ImportError as error:
            raise ModlabError(
                "KVTracker.plot needs plotly: pip install plotly. frame() works without it."
            ) from error
        totals = self._totals()
        steps, seen = [t[0] for t in totals], [t[1] for t in totals]
        unit, name = (2**20, "MiB") if max(max(t[2], t[3]) for t in totals) >= 2**20 else (2**10, "KiB")
        figure = go.Figure()
        for label, column, dash in (("dense cache", 3, "dash"), ("allocated", 2, "solid")):
            figure.add_scatter(
                x=steps,
                y=[t[column] / unit for t in totals],
                customdata=seen,
                name=label,
                mode="lines" if len(totals) > 1 else "markers",
                line={"dash": dash},
                hovertemplate=f"step %{{x}}, %{{customdata}} tokens: %{{y:.3f}} {name}<extra></extra>",
            )
        figure.update_layout(
            title=f"Key/value cache, {self.summary()['kv_saving']:.2f}x smaller than dense at the peak",
            xaxis_title="forward step",
            yaxis_title=f"bytes allocated ({name})",
            yaxis_rangemode="tozero",
            legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 1, "xanchor": "right"},
        )
        return figure


def _find_cache(output: Any, kwargs: dict[str, Any]) -> Any | None:
    """The cache a decoder forward filled: its output's, or (tuple outputs) the one that was passed in."""
    fields = output if isinstance(output, Mapping) else {}
    candidates = [given_cache(fields)]
    if candidates[0] is None:  # reading the older name prints a deprecation where there is a newer one
        candidates.append(fields.get("cache_params"))
    if isinstance(output, (tuple, list)):
        candidates.extend(output)
    if kwargs.get("use_cache") is not False:
        candidates.append(given_cache(kwargs))
    for candidate in candidates:
        if hasattr(candidate, "get_seq_length") and (
            hasattr(candidate, "layers") or hasattr(candidate, "self_attention_cache")
        ):
            return candidate
    return None
