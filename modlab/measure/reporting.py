"""One report of what routing costs a model and what it saves, both sides from one load.

found = modlab.measure.report(model, {"novels": novels, "code": code}, tokenizer, savings=(2, 4))
found.write("report.html")  # and report.json next to it
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError, check_count
from modlab.measure.divergence import divergence, named_texts
from modlab.probes.distances import DISTANCES
from modlab.probes.key_value import retrieval
from modlab.probes.long_tasks import checked_tasks, mean_scores, ruler
from modlab.probes.paired import dense_rows, recall_gap, retrieval_gap
from modlab.probes.repeated_passage import recall
from modlab.probes.ruler_tasks import TASKS
from modlab.routing.kv_saving import set_kv_saving, threshold_for
from modlab.routing.state import routing_of, thresholds_restored

if TYPE_CHECKING:
    import pandas as pd
    from transformers import PreTrainedModel


@dataclass
class Setting:
    """The measures of one threshold; each table as its function returns it.

    Attributes:
        asked: KV saving that the thresholds were set to; None: the model's own.
        divergence: a line a text.
        recall, retrieval: a line a distance.
        tasks: RULER-kind ones, a line a task and length; None if they were not asked.
    """

    asked: float | None
    divergence: pd.DataFrame
    recall: pd.DataFrame
    retrieval: pd.DataFrame
    tasks: pd.DataFrame | None

    @property
    def kv_saving(self) -> float:
        """Dense bytes over allocated ones, over all texts together."""
        return float(self.divergence["dense_kv_bytes"].sum() / self.divergence["kv_bytes"].sum())

    @property
    def kl_far(self) -> float:
        """Nats a token at far positions, mean over the texts."""
        return float(self.divergence["kl_far"].mean())

    @property
    def of_dense(self) -> float:
        """Share of the questions that the dense model answers which this one answers too, all distances."""
        right = self.retrieval["dense_right"]
        return (
            float((self.retrieval["of_dense"].fillna(0) * right).sum() / right.sum())
            if right.sum()
            else math.nan
        )

    def row(self) -> dict[str, Any]:
        """As a row of this project's result files."""
        by_distance = self.recall.set_index("distance")
        asked = self.retrieval.set_index("distance")
        texts = self.divergence.set_index("text")
        return {
            "ratio_asked": self.asked,
            "ratio": self.kv_saving,
            "kl_far": self.kl_far,
            "kl_far_by_text": texts["kl_far"].to_dict(),
            "kl_near_by_text": texts["kl_near"].to_dict(),
            "top1_far_by_text": texts["top1_far"].to_dict(),
            "keep_by_text": texts["keep_ratio"].to_dict(),
            "ratio_by_text": texts["kv_saving"].to_dict(),
            "recall_gap": by_distance["gap"].to_dict(),
            "recall_gap_stderr": by_distance["stderr"].to_dict(),
            "recall_dense": by_distance["dense"].to_dict(),
            "retrieval": asked["routed"].to_dict(),
            "retrieval_dense": asked["dense"].to_dict(),
            "retrieval_of_dense": asked["of_dense"].to_dict(),
            "tasks": {} if self.tasks is None else {
                f"{line['task']} {line['length']}": {
                    "score": line["routed"], "dense": line["dense"], "stderr": line["stderr"],
                }
                for line in self.tasks.to_dict("records")
            },
        }  # fmt: skip


@dataclass
class Report:
    """What `report` found.

    Attributes:
        name: of the model.
        settings: one for each saving asked for.
        source: what a published figure carries: data, command, date, device, versions.
        kv_cache_dtype: how the routed side stored keys and values (`MoDConfig.kv_cache_dtype`).
    """

    name: str
    settings: list[Setting]
    source: dict[str, Any] = field(default_factory=dict)
    kv_cache_dtype: str = "auto"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready, with `rows` as in this project's result files; what is not a number is None."""
        found: dict[str, Any] = _plain(
            {
                "what": "report",
                "model": self.name,
                "kv_cache_dtype": self.kv_cache_dtype,
                **self.source,
                "rows": [s.row() for s in self.settings],
            }  # fmt: skip
        )
        return found

    def to_html(self) -> str:
        """A page that needs no network: the figures that decide, then curves, then all tables."""
        from modlab.measure.report_page import page

        return page(self)

    def write(self, path: str | Path) -> Path:
        """Writes the page, and the figures as .json next to it.

        Returns:
            where the figures are.

        Raises:
            ModlabError: no name of a page, or a .json next to it that is none of a report.
        """
        page = Path(path)
        figures = figures_of(page)
        figures.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")
        page.write_text(self.to_html(), encoding="utf-8")
        return figures


def figures_of(page: Path) -> Path:
    """Where the figures of a page go; a file of that name which no report wrote is not overwritten."""
    if page.suffix not in (".html", ".htm"):
        raise ModlabError(f"{str(page)!r}: give a page's name, such as report.html.")
    figures = page.with_suffix(".json")
    if figures.exists():
        try:
            found = json.loads(figures.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or found.get("what") != "report":
            raise ModlabError(
                f"{figures} would be overwritten by the figures of {page}, and no report wrote it: give the "
                "page another name."
            )
    return figures


def report(
    model: PreTrainedModel,
    texts: Any,
    tokenizer: Any,
    *,
    savings: Iterable[float] = (),
    name: str = "",
    seq_len: int | None = None,
    rows: int = 4,
    distances: Iterable[int] = DISTANCES,
    questions: int = 64,
    pairs: int = 8,
    lengths: Iterable[int] = (),
    samples: int = 20,
    seed: int = 0,
    batch_size: int = 1,
    progress: bool = True,
    each: Callable[[Report], None] | None = None,
) -> Report:
    """Divergence by text, recall and retrieval by distance, RULER-kind tasks: dense and routed side by side.

    Args:
        model: a converted model; its thresholds are as before afterwards.
        texts: as for `divergence`. The probes take their material from the first one.
        tokenizer: the model's.
        savings: KV savings to measure at (`modlab.set_kv_saving`); by default the present thresholds alone.
        name: of the model, for the page.
        seq_len, rows: of the divergence.
        distances, questions, pairs: of recall and retrieval; with 200 questions the standard error
            is 0.02 to 0.04.
        lengths, samples: of RULER-kind tasks; no length, no tasks, since writing the answers takes long.
        seed: of all material.
        batch_size: rows at once.
        progress: show progress bars.
        each: called with the report so far whenever a saving has been measured: what is written then
            outlives an interruption.

    Raises:
        ModlabError: a dense model, routers that know no such saving, too little text.
    """
    routing = routing_of(model)
    named = named_texts(texts)
    first = next(iter(named.values()))
    asked = list(savings)
    for saving in asked:  # before hours of measuring
        if routing.trained is None:
            raise ModlabError(
                f"savings={asked}: these routers know no thresholds by KV saving; leave it out."
            )
        threshold_for(model, saving)
    far_distances, lengths = tuple(distances), tuple(lengths)
    counts = {"questions": questions, "pairs": pairs, "samples": samples, "batch_size": batch_size}
    for what, count in counts.items():
        check_count(what, count)
    for count in far_distances:
        check_count("distance", count)
    if lengths:
        checked_tasks(model, TASKS, lengths)
    shared: dict[str, Any] = {"seed": seed, "batch_size": batch_size, "progress": progress}
    far = {"distances": far_distances, "rows": questions, **shared}
    dense: dict[str, pd.DataFrame] = {}
    answers = None
    found = Report(name or type(model).__name__, [], kv_cache_dtype=routing.config.kv_cache_dtype)
    for saving in asked or [None]:  # type: ignore[list-item]
        with thresholds_restored(model) if saving is not None else contextlib.nullcontext():
            if saving is not None:
                set_kv_saving(model, saving)
            # first, as it refuses what does not fit before it runs anything
            apart = divergence(model, named, tokenizer, seq_len=seq_len, rows=rows, **shared)
            if not dense:  # the same at all savings
                dense["recall"] = dense_rows(recall, model, first, tokenizer, **far)
                dense["retrieval"] = dense_rows(retrieval, model, first, tokenizer, pairs=pairs, **far)
            recalled = recall_gap(model, first, tokenizer, dense=dense["recall"], **far)
            retrieved = retrieval_gap(model, first, tokenizer, pairs=pairs, dense=dense["retrieval"], **far)
            if lengths:
                answers = ruler(
                    model, first, tokenizer, lengths=lengths, samples=samples, by_row=True, dense=answers,
                    **shared,
                )  # fmt: skip
            tasks = None if answers is None else mean_scores(answers)
            found.settings.append(Setting(saving, apart, recalled, retrieved, tasks))
        if each is not None:
            each(found)
    return found


def _plain(value: Any) -> Any:
    """With names for keys, Python's numbers, and None for what is not a number."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
