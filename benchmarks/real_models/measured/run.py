"""One process of a run: loads the model, takes pieces until none is left."""

from __future__ import annotations

import os
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.real_models.measured.pieces import Folder, run_all
from benchmarks.real_models.measured.product import Product
from benchmarks.real_models.measured.settings import Setting, settings
from benchmarks.real_models.measured.work import CONTROLLED, KINDS, Sizes, Work
from benchmarks.real_models.texts import Data
from modlab.bench.results import circumstances, source_commit
from modlab.errors import ModlabError

ORIGIN = "origin"
KV_CACHE_DTYPE = "kv_cache_dtype"
"""In the origin of a run, and in each of its rows: how keys and values were stored."""
FIT = "fit"
"""Of routers that were only fitted: how long that took."""


def run(
    model: Path,
    routers: Path | None,
    data: Path,
    questions: Path | None,
    out: Path,
    savings: list[float],
    kinds: tuple[str, ...],
    *,
    about: dict[str, Any],
    recent: list[int] | None = None,
    commit: str | None = None,
    device: str = "cuda",
    fast: bool = True,
    minutes: float | None = None,
    sizes: dict[str, Any] | None = None,
    dense: Path | None = None,
    kv_cache_dtype: str = "auto",
) -> list[str]:
    """Measures what nobody has measured in `out`; see `work.py`.

    Args:
        recent: for each of `savings`, how many of the latest tokens stay anyway (default: what the routers
            know). Where that is not what they know, the setting's pieces have names of their own. With it
            settings are measured in the order given; without, those with controls first.
        dense: file of the dense side, which processes and runs of one model share.
        kv_cache_dtype: as of `MoDConfig`; one for all that is in `out`. `savings` are of both together, what
            the type saves and what routing does.

    Returns:
        names of the pieces that failed.

    Raises:
        ModlabError: no such kind, questions without their folder, settings that are none, or `out` holds
            what was measured with another `kv_cache_dtype`.
    """
    begun = time.monotonic()
    asked = settings(savings, recent)
    for kind in kinds:
        if kind not in KINDS:
            raise ModlabError(f"there is no kind {kind!r}: choose some of {', '.join(KINDS)}.")
    chosen = kinds or KINDS
    if questions is None and {"humaneval", "shots"} & set(chosen):
        raise ModlabError("--questions: HumanEval and many shots need the folder of the evaluation sets.")

    folder = Folder(out)
    known = folder.read(ORIGIN).get(KV_CACHE_DTYPE, "auto") if folder.done(ORIGIN) else kv_cache_dtype
    if known != kv_cache_dtype:
        raise ModlabError(
            f"{out} was measured with kv_cache_dtype={known!r}, not {kv_cache_dtype!r}: give another folder."
        )

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begun:6.1f} {os.getpid()}] {text}", flush=True)

    product = Product.load(model, routers, device, fast, kv_cache_dtype)
    say(f"{product.name}: loaded, {product.routing!r}")
    if not folder.done(ORIGIN):
        folder.write(ORIGIN, {"model": model.name, **about, **origin(product, commit)})
    shapes = Sizes(**_sizes(sizes or {}))
    work = Work(product, Data.load(data), questions or data, folder, shapes, dense)
    deadline = None if minutes is None else begun + 60 * minutes
    own = [s if s.recent != product.recent_for(s.saving) else Setting(s.saving) for s in asked]
    if recent is None:
        own.sort(key=lambda one: (one.saving not in CONTROLLED, one.saving))
    failed = run_all(work.pieces(own, chosen), folder, say, deadline)
    say(f"nothing left to do; failed: {', '.join(failed) or 'none'}")
    return failed


def _sizes(given: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in given.items()}


def origin(product: Product, commit: str | None) -> dict[str, Any]:
    """What a record says of itself: command, commit, date, device, versions, and how the model is routed."""
    paths = {word: Path(word).name for word in sys.argv[1:] if "/" in word}
    return {
        "command": shlex.join(
            ["python", "-m", "benchmarks.real_models", *(paths.get(word, word) for word in sys.argv[1:])]
        ),
        "commit": commit or source_commit(),
        **circumstances(product.device, product.dtype),
        "granularity": "head" if max(product.routing.gates.values()) > 1 else "layer",
        KV_CACHE_DTYPE: product.routing.config.kv_cache_dtype,
        "keep_first": product.first,
    }
