"""What every routing picture draws from: one text, its tokens, the gates and decisions of each routed layer.

Pictures are drawn by `modlab.widgets.pictures`, which needs no widget library; it is imported when one is
asked for, so that a trace can draw itself and this module stays plain NumPy.

Shape letters: T tokens of the one text, R gates of the routed layers (one a layer, unless
a skip has more), L decoder layers.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from modlab.config import KVCacheDtype
from modlab.errors import ModlabError
from modlab.routing import rule
from modlab.routing.threshold import check_threshold
from modlab.skips import named
from modlab.traces.trace_file import ARRAYS, DAMAGE, read_trace, write_trace

_META = (
    "tokens", "layers", "num_layers", "keep_first", "kv_bytes_per_token", "model", "skip", "keep_recent",
    "stored_bytes_per_token", "kv_cache_dtype",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """The routing of one text. Plain NumPy: no model, no tokenizer, no torch needed to draw or to store it.

    Attributes:
        tokens: T pieces of the text, "".join(tokens) is the text; a token that ends no character is "".
        token_ids: int64[T].
        gate: float32[R, T], sigmoid of the router logit.
        keep: bool[R, T], the decision that was executed.
        layers: index of the decoder layer of each of the R rows, ascending; a layer with several gates has as
            many rows.
        num_layers: L, routed and dense layers together.
        thresholds: float32[R], the p of each row at the time of the run.
        keep_first: the first so many tokens are kept whatever their gate.
        loss: float32[T], nats for predicting token t from those before it; NaN at 0.
        kv_bytes_per_token: bytes of K and V together of one token in one layer of a dense cache.
        model: a name to show.
        skip: what a skipped token skips: "layer", "attention", "mlp" (then K/V stay, and nothing is saved),
            or "kv", its place in the cache alone.
        keep_recent: with "kv", how many of the latest tokens are in the cache at the end of the text, kept or
            not; else 0.
        stored_bytes_per_token: bytes of one token that a routed layer stores: less than `kv_bytes_per_token`
            with keys and values in fewer bits, else (also if 0 is given) as many.
        kv_cache_dtype: how it stores them, as of `MoDConfig`; "" (of older files) is "int8" where those are
            less, else "auto".
    """

    tokens: list[str]
    token_ids: NDArray[np.int64]
    gate: NDArray[np.float32]
    keep: NDArray[np.bool_]
    layers: list[int]
    num_layers: int
    thresholds: NDArray[np.float32]
    keep_first: int
    loss: NDArray[np.float32]
    kv_bytes_per_token: int
    model: str = ""
    skip: str = "layer"
    keep_recent: int = 0
    stored_bytes_per_token: int = 0
    kv_cache_dtype: str = ""

    def __post_init__(self) -> None:
        if not self.stored_bytes_per_token:
            object.__setattr__(self, "stored_bytes_per_token", self.kv_bytes_per_token)
        if not self.kv_cache_dtype:
            fewer = self.stored_bytes_per_token < self.kv_bytes_per_token
            object.__setattr__(self, "kv_cache_dtype", "int8" if fewer else "auto")
        for name, dtype in ARRAYS.items():
            object.__setattr__(self, name, np.ascontiguousarray(getattr(self, name), dtype=dtype))
        R, T = len(self.layers), len(self.tokens)
        if not R or not T:
            raise ModlabError(f"RoutingTrace needs a routed layer and a token; got {R} layers, {T} tokens.")
        want = {"token_ids": (T,), "gate": (R, T), "keep": (R, T), "thresholds": (R,), "loss": (T,)}
        for name, shape in want.items():
            if getattr(self, name).shape != shape:
                raise ModlabError(
                    f"RoutingTrace.{name} has shape {getattr(self, name).shape}; {R} routed layers and "
                    f"{T} tokens need {shape}."
                )
        layers = list(self.layers)
        if len(set(layers)) < len(layers) and not named(self.skip).several_gates:
            raise ModlabError(
                f"RoutingTrace.layers has a layer more than once, {self.layers}, but skip={self.skip!r} has "
                'one gate a layer; skip="kv" may have several.'
            )
        if layers != sorted(layers) or layers[0] < 0 or layers[-1] >= self.num_layers:
            raise ModlabError(
                f"RoutingTrace.layers must ascend in 0..{self.num_layers - 1}, not {self.layers}."
            )

    @property
    def text(self) -> str:
        """The text that was traced."""
        return "".join(self.tokens)

    @property
    def keep_ratio(self) -> NDArray[np.float64]:
        """float64[R]: share of the tokens that each routed layer kept."""
        return self.keep.mean(axis=1)

    @property
    def kv_saving(self) -> float:
        """Dense over stored K/V, >= 1: 1 / mean share of the dense bytes stored over all L layers, dense ones
        counting 1."""
        return self._saving(self.keep)

    @property
    def mean_loss(self) -> float:
        """Mean over the predicted tokens, nats; NaN for a text of one token."""
        predicted = self.loss[~np.isnan(self.loss)]
        return float(predicted.mean()) if len(predicted) else float("nan")

    def preview_keep(self, p: ArrayLike) -> NDArray[np.bool_]:
        """What the recorded gates would decide at threshold p (one number, or one for each of the R rows).

        bool[R, T]. A preview only: in a real run a token that skips one layer reaches the later routers
        with another state, so their gates change with p as well.
        """
        values: list[Any] = [p] if np.ndim(p) == 0 else list(np.asarray(p, dtype=object).ravel())
        p_R1 = np.array([check_threshold(value) for value in values], dtype=np.float32)[:, None]
        if len(values) not in (1, len(self.layers)):
            raise ModlabError(f"preview_keep needs one p or {len(self.layers)} of them, not {len(values)}.")
        position = np.arange(len(self.tokens))[None]
        keep: NDArray[np.bool_] = rule.kept(self.gate, p_R1, position, self.keep_first)
        return keep

    def preview_saving(self, p: ArrayLike) -> float:
        """`kv_saving` of `preview_keep(p)`."""
        return self._saving(self.preview_keep(p))

    def _saving(self, keep: NDArray[np.bool_]) -> float:
        stored = named(self.skip).stored(keep, self.keep_recent)
        rows = Counter(self.layers)
        routed = sum(share / rows[i] for i, share in zip(self.layers, stored.mean(axis=1), strict=True))
        return float(self.num_layers / (self.num_layers - len(rows) + routed * self.stored_share))

    @property
    def stored_share(self) -> float:
        """Share of a token's dense bytes that a routed layer stores of it: 1, less in fewer bits."""
        whole = self.kv_bytes_per_token
        return self.stored_bytes_per_token / whole if whole else 1.0

    def part(self, start: int, stop: int) -> RoutingTrace:
        """The tokens from `start` up to, not with, `stop`, for views of a text too long to draw whole.

        Gates, decisions and losses are those of the run over the whole text.

        Raises:
            ModlabError: the part holds no token.
        """
        chosen = slice(*slice(start, stop).indices(len(self.tokens)))
        if chosen.stop <= chosen.start:
            raise ModlabError(f"part({start}, {stop}) holds none of the {len(self.tokens):,} tokens.")
        return replace(
            self,
            tokens=self.tokens[chosen],
            token_ids=self.token_ids[chosen],
            gate=self.gate[:, chosen],
            keep=self.keep[:, chosen],
            keep_first=max(0, self.keep_first - chosen.start),
            keep_recent=max(0, self.keep_recent - (len(self.tokens) - chosen.stop)),
            loss=self.loss[chosen],
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one compressed .npz, no pickle inside; an older file is replaced only when all is written."""
        path = Path(path)
        arrays = {name: getattr(self, name) for name in ARRAYS}
        write_trace(path, arrays, {name: getattr(self, name) for name in _META})
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> RoutingTrace:
        """Read what `save` wrote. ModlabError if the file is missing, damaged or something else."""
        try:
            arrays, meta = read_trace(Path(path))
            meta = {
                "keep_recent": 0,
                "stored_bytes_per_token": 0,
                "kv_cache_dtype": "",
                **meta,
            }  # older files have none
            _check_described(meta, arrays)
            fields: dict[str, Any] = {**{name: meta[name] for name in _META}, **arrays}
            return cls(**fields)
        except FileNotFoundError:
            raise ModlabError(f"There is no file {path}. RoutingTrace.save(path) makes one.") from None
        except DAMAGE as error:
            raise ModlabError(
                f"{path} is not a routing trace, or it is damaged ({type(error).__name__}: {error}). "
                "Make it again with modlab.trace(...).save(path)."
            ) from error

    def to_html(self) -> str:
        """One page with everything inside (data, styles, script): opens from a file, without network."""
        from modlab.widgets.pictures.page import trace_page

        return trace_page(self)

    def to_svg(self) -> str:
        """A still picture of token by layer and of the text, for places that run no JavaScript."""
        from modlab.widgets.pictures.trace import trace_svg

        return trace_svg(self)

    def _repr_svg_(self) -> str:
        return self.to_svg()

    def __repr__(self) -> str:
        return (
            f"RoutingTrace({self.model or 'model'}: {len(self.tokens)} tokens, {len(set(self.layers))} of "
            f"{self.num_layers} layers routed, {self._gates()}kv_saving {self.kv_saving:.2f}x, "
            f"loss {self.mean_loss:.3f})"
        )

    def _gates(self) -> str:
        """How many gates there are, where that is not one a layer."""
        return f"{len(self.layers)} gates, " if len(self.layers) > len(set(self.layers)) else ""


def _check_described(meta: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> None:
    """Raises ValueError where a file says what no trace has."""
    for name in ("num_layers", "keep_first", "kv_bytes_per_token", "keep_recent", "stored_bytes_per_token"):
        if type(meta[name]) is not int or not 0 <= meta[name] < 2**31:
            raise ValueError(f"{name}={meta[name]!r:.60}")
    for name, kind in (("tokens", str), ("layers", int)):
        if not isinstance(meta[name], list) or not all(type(value) is kind for value in meta[name]):
            raise ValueError(f"{name} is not a list of {kind.__name__}")
    if meta["kv_cache_dtype"] not in ("", *get_args(KVCacheDtype)):
        raise ValueError(f"kv_cache_dtype={meta['kv_cache_dtype']!r:.60}")
    if not isinstance(meta["model"], str) or not isinstance(meta["skip"], str):
        raise ValueError(f"model={meta['model']!r:.60}, skip={meta['skip']!r:.60}")
    named(meta["skip"])  # says which there are
    for name in ("gate", "thresholds"):
        if not bool(((arrays[name] >= 0) & (arrays[name] <= 1)).all()):
            raise ValueError(f"{name} has values outside [0, 1]")
