"""Compare: one prompt continued at two thresholds, side by side, with what differs marked."""

from __future__ import annotations

import time
from difflib import SequenceMatcher
from typing import Any

import torch
import traitlets as t

from modlab.data.pieces import as_text, encode
from modlab.hf.model import model_name
from modlab.routing.threshold import check_threshold
from modlab.traces.run import check_ids
from modlab.widgets.jobs import REPORT_EVERY, Job
from modlab.widgets.model_access import trained_for, using
from modlab.widgets.pictures.panels import compare_svg
from modlab.widgets.views import ModelView
from modlab.widgets.writing import Writing, write_in_turns


class Compare(ModelView, view="compare"):
    """A prompt continued greedily at two thresholds, side by side, a token of each in turn.

    The model's own thresholds are not touched. With fast generation, one side is written after the other.

    Args:
        model: a converted model whose gates decide.
        tokenizer: its tokenizer.
        prompt: the text to continue; it can be changed in the widget.
        p: the two thresholds.
        max_new_tokens: at most so many tokens each.

    Attributes:
        sides: what was generated so far: p, prompt, pieces (text of each token), same (whether the other side
            has the token, too, in the same order), done, kv_bytes (allocated) and dense_bytes of its cache,
            seconds (spent on this side alone), first_s (to the first token), tokens_per_s (after it).
    """

    prompt = t.Unicode("").tag(sync=True, echo_update=False)
    ps = t.List(t.Float(), minlen=2, maxlen=2).tag(sync=True, echo_update=False)
    max_new_tokens = t.Int(80, min=1).tag(sync=True, echo_update=False)
    sides = t.List(t.Dict()).tag(sync=True)

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompt: str,
        p: tuple[float, float] = (0.3, 0.7),
        max_new_tokens: int = 80,
    ) -> None:
        from modlab.routing.state import gated_routing_of

        gated_routing_of(model)
        self._model, self._tokenizer = model, tokenizer
        super().__init__(
            prompt=as_text(tokenizer, prompt),
            ps=[check_threshold(x) for x in p],
            max_new_tokens=max_new_tokens,
            summary={"model": model_name(model), "trained": trained_for(model)},
        )

    @property
    def result(self) -> list[dict[str, Any]]:
        """The two sides, as `sides`, each with `text`, its continuation as one string."""
        return [{**side, "text": "".join(side["pieces"])} for side in self.sides]

    def run(self) -> list[dict[str, Any]]:
        """Generate both sides now, and return `result`."""
        self._generate(self.prompt, list(self.ps), self.max_new_tokens, None)
        return self.result

    def _work(self, content: dict[str, Any]) -> Any:
        if content.get("type") != "generate":
            return None
        return lambda job: self._generate(
            str(content["prompt"]), [float(p) for p in content["ps"]], int(content["max_new_tokens"]), job
        )

    def _generate(self, prompt: str, ps: list[float], count: int, job: Job | None) -> None:
        before = list(self.sides)
        writings = [Writing(self._tokenizer, check_threshold(p)) for p in ps]
        told = time.monotonic()

        def after() -> None:
            nonlocal told
            if job is None:
                return
            written = sum(len(writing.ids) for writing in writings)
            job.report(f"{written} of {2 * count} tokens", written / (2 * count))
            if time.monotonic() - told > REPORT_EVERY:  # show them as they grow
                told = time.monotonic()
                self._tell(prompt, writings)

        try:
            with using(self._model, job, by_layer=False):
                write_in_turns(self._model, writings, self._encode(prompt), count, after)
            self._tell(prompt, writings)
        except BaseException:
            self.sides = before
            raise

    def _encode(self, prompt: str) -> torch.Tensor:
        ids = encode(self._tokenizer, prompt)[0]
        check_ids(self._model, ids)
        return torch.tensor([ids], device=self._model.device)

    def _tell(self, prompt: str, writings: list[Writing]) -> None:
        same = _same([writing.ids for writing in writings], all(writing.done for writing in writings))
        self.sides = [_side(prompt, w, flags) for w, flags in zip(writings, same, strict=True)]

    def _svg(self) -> str:
        return compare_svg(self.sides)


def _same(ids: list[list[int]], done: bool) -> list[list[bool]]:
    """Whether the other side has each token, too, in the same order. While they grow, what one side is ahead
    of the other is not missing there."""
    end = None if done else min(map(len, ids))
    match = SequenceMatcher(None, ids[0][:end], ids[1][:end], autojunk=False)
    same = [[end is not None and i >= end for i in range(len(side))] for side in ids]
    for a, b, size in match.get_matching_blocks():
        same[0][a : a + size] = same[1][b : b + size] = [True] * size
    return same


def _side(prompt: str, writing: Writing, same: list[bool]) -> dict[str, Any]:
    kv_bytes, dense_bytes = writing.bytes
    return {
        "p": writing.p,
        "prompt": prompt,
        "pieces": list(writing.pieces),
        "same": same,
        "done": writing.done,
        "seconds": writing.seconds,
        "first_s": writing.first_s,
        "tokens_per_s": writing.tokens_per_s,
        "kv_bytes": kv_bytes,
        "dense_bytes": dense_bytes,
    }
