"""Compare: one prompt continued at two thresholds, side by side, with what differs marked."""

from __future__ import annotations

import time
from difflib import SequenceMatcher
from typing import Any

import torch
import traitlets as t

from modlab.data.pieces import as_text, encode
from modlab.hf.model import eval_mode, model_name
from modlab.hf.names import given_cache
from modlab.routing.threshold import check_threshold
from modlab.traces.run import check_ids
from modlab.widgets.jobs import REPORT_EVERY, Job
from modlab.widgets.model_access import using
from modlab.widgets.pictures.panels import compare_svg
from modlab.widgets.views import ModelView


class Compare(ModelView, view="compare"):
    """A prompt continued greedily at two thresholds, side by side.

    The model's own thresholds are in place again afterwards.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        prompt: the text to continue; it can be changed in the widget.
        p: the two thresholds.
        max_new_tokens: at most so many tokens each.

    Attributes:
        sides: what was generated: p, prompt, pieces (text of each token), same (whether the other side has
            the token, too, in the same order), kv_bytes and dense_bytes of the cache at the end, seconds.
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
        from modlab.routing.state import routing_of

        routing_of(model)
        self._model, self._tokenizer = model, tokenizer
        super().__init__(
            prompt=as_text(tokenizer, prompt),
            ps=[check_threshold(x) for x in p],
            max_new_tokens=max_new_tokens,
            summary={"model": model_name(model)},
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
        sides: list[_Side] = [_Side(self._tokenizer, prompt, check_threshold(p)) for p in ps]
        try:
            with using(self._model, job, by_layer=False):
                ids = self._encode(prompt)
                for index, side in enumerate(sides):
                    self._one(side, ids, count, job, sides, index)
            self._tell(sides)
        except BaseException:
            self.sides = before
            raise

    def _encode(self, prompt: str) -> torch.Tensor:
        ids = encode(self._tokenizer, prompt)[0]
        check_ids(self._model, ids)
        return torch.tensor([ids], device=self._model.device)

    def _one(
        self, side: _Side, ids_BT: torch.Tensor, count: int, job: Job | None, sides: list[_Side], index: int
    ) -> None:
        from modlab.routing.state import set_threshold, thresholds_restored

        model, told = self._model, time.monotonic()
        pad = getattr(model.generation_config, "pad_token_id", None)

        def each(ids: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
            nonlocal told
            side.take(ids[0, ids_BT.shape[1] :].tolist())
            if job is not None:
                done = (index + len(side.ids) / count) / len(sides)
                job.report(f"p {side.p:g}: token {len(side.ids)} of {count}", done)
                if time.monotonic() - told > REPORT_EVERY:  # show it as it grows
                    told = time.monotonic()
                    self._tell(sides)
            return torch.zeros(len(ids), dtype=torch.bool, device=ids.device)

        with thresholds_restored(model), eval_mode(model), torch.no_grad():
            set_threshold(model, side.p)
            start = time.perf_counter()
            output = model.generate(
                ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                return_dict_in_generate=True,
                max_new_tokens=count,
                do_sample=False,
                pad_token_id=0 if pad is None else pad,
                stopping_criteria=[each],
            )
            side.seconds = time.perf_counter() - start
        cache = given_cache(output)
        side.kv_bytes, side.dense_bytes = int(cache.nbytes), int(cache.dense_nbytes)

    def _tell(self, sides: list[_Side]) -> None:
        match = SequenceMatcher(None, sides[0].ids, sides[1].ids, autojunk=False)
        growing = not sides[1].seconds  # until both are there, nothing is missing from the other one
        same = [[growing] * len(side.ids) for side in sides]
        for a, b, size in match.get_matching_blocks():
            same[0][a : a + size] = same[1][b : b + size] = [True] * size
        self.sides = [side.as_dict(flags) for side, flags in zip(sides, same, strict=True)]

    def _svg(self) -> str:
        return compare_svg(self.sides)


class _Side:
    """One continuation as it grows."""

    def __init__(self, tokenizer: Any, prompt: str, p: float) -> None:
        self.tokenizer, self.prompt, self.p = tokenizer, prompt, p
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.seconds = 0.0
        self.kv_bytes = self.dense_bytes = 0

    def take(self, ids: list[int]) -> None:
        """The tokens so far; each new one is what it adds to the text."""
        for count in range(len(self.ids) + 1, len(ids) + 1):
            text = self.tokenizer.decode(ids[:count])
            done = sum(len(piece) for piece in self.pieces)
            # Half a character decodes to U+FFFD: its text comes with the token that completes it.
            self.pieces.append("" if text.endswith("\ufffd") else text[done:])
        self.ids = ids

    def as_dict(self, same: list[bool]) -> dict[str, Any]:
        return {
            "p": self.p,
            "prompt": self.prompt,
            "pieces": list(self.pieces),
            "same": same,
            "seconds": self.seconds,
            "kv_bytes": self.kv_bytes,
            "dense_bytes": self.dense_bytes,
        }
