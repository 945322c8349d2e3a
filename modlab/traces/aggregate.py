"""Routing over a corpus: how much each layer keeps of each class of tokens, and at each position.

Shape letters: C token classes, R routed layers, T tokens, by their position.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from modlab.data.batches import check_vocabulary, items_of
from modlab.data.pieces import encode
from modlab.errors import ModlabError
from modlab.hf.model import eval_mode, model_name, vocabulary_size
from modlab.measure import piece_length
from modlab.routing.record import kept_share
from modlab.routing.state import record_routing, routing_of
from modlab.traces.token_classes import CLASSES, classify

if TYPE_CHECKING:
    import pandas as pd

EXAMPLES = 5  # most frequent tokens told of each class


@dataclass
class RoutingAggregate:
    """Counts over all texts; ratios are made from them where they are asked for.

    Attributes:
        layers: index of each of the R routed layers.
        class_tokens: int64[C], tokens of each class of `token_classes.CLASSES`.
        class_kept: float64[C, R], how many of them each layer kept; shares of several gates.
        position_tokens: int64[T], texts (or pieces) that reach position t.
        position_kept: float64[T, R], in how many of them the layer kept the token at t.
        texts: how many texts.
        examples: the most frequent tokens of each class.
        model: a name to show.
    """

    layers: list[int]
    class_tokens: NDArray[np.int64]
    class_kept: NDArray[np.float64]
    position_tokens: NDArray[np.int64]
    position_kept: NDArray[np.float64]
    texts: int
    examples: list[list[str]] = field(default_factory=list)
    model: str = ""

    @property
    def tokens(self) -> int:
        """Tokens in all."""
        return int(self.class_tokens.sum())

    @property
    def keep_ratio(self) -> float:
        """Mean over the routed layers of the share of tokens kept."""
        return float(self.class_kept.sum() / (self.tokens * len(self.layers)))

    def by_class(self) -> pd.DataFrame:
        """One row a class that occurs: `tokens`, `layer_<i>` (keep ratio) for each routed layer, `mean`."""
        present = np.flatnonzero(self.class_tokens)
        names = [CLASSES[i] for i in present]
        return self._frame(self.class_tokens[present], self.class_kept[present], names, "class")

    def by_position(self, bins: int = 16) -> pd.DataFrame:
        """One row a range of positions, wider the later: `tokens`, `layer_<i>` (keep ratio), `mean`.

        Args:
            bins: at most so many ranges.
        """
        if bins < 1:
            raise ModlabError(f"bins={bins}: at least one range of positions is needed.")
        edges = position_edges(len(self.position_tokens), bins)
        tokens = np.add.reduceat(self.position_tokens, edges[:-1])
        kept = np.add.reduceat(self.position_kept, edges[:-1], axis=0)
        names = [
            f"{a}" if b - a == 1 else f"{a} - {b - 1}" for a, b in zip(edges[:-1], edges[1:], strict=True)
        ]
        return self._frame(tokens, kept, names, "position")

    def _frame(
        self, tokens: NDArray[np.int64], kept: NDArray[np.float64], names: list[str], index: str
    ) -> pd.DataFrame:
        import pandas as pd

        ratio = kept / np.maximum(tokens, 1)[:, None]
        frame = pd.DataFrame(ratio, columns=[f"layer_{i}" for i in self.layers])
        frame.insert(0, "tokens", tokens)
        frame["mean"] = ratio.mean(axis=1)
        frame.index = pd.Index(names, name=index)
        return frame

    def widget(self) -> Any:
        """`modlab.widgets.ClassHeatmap` of these counts."""
        from modlab.widgets import ClassHeatmap

        return ClassHeatmap(self)


def position_edges(length: int, bins: int) -> NDArray[np.int64]:
    """Edges 0 < ... < length of at most `bins` ranges, each about so many times as long as the one before."""
    grown = np.rint(np.geomspace(1, length, bins)).astype(np.int64)
    return np.unique(np.concatenate([[0], grown, [length]]))


def aggregate_routing(
    model: Any,
    tokenizer: Any,
    texts: Any,
    *,
    seq_len: int | None = None,
    progress: bool = True,
    report: Callable[[int, int], None] | None = None,
) -> RoutingAggregate:
    """Run every text once and count what each layer keeps, by class of token and by position.

    Args:
        model: a converted model, at its present thresholds.
        tokenizer: its tokenizer.
        texts: a text or several; chats and rows of token ids are taken, too. Longer ones are read in
            pieces, each from position 0.
        seq_len: longest piece in tokens; by default 2,048, or the model's context if that is shorter.
        progress: show a progress bar. Ctrl-C ends the run.
        report: called with (pieces done, pieces in all) after each; an exception in it ends the run.

    Raises:
        ModlabError: the model is dense, or no text has a token.
    """
    from tqdm.auto import tqdm

    routing = routing_of(model)
    layers = list(routing.layers)
    longest = piece_length(model, tokenizer, seq_len)
    pieces, count = _pieces(tokenizer, items_of(texts), longest)
    if not pieces:
        raise ModlabError("No text has a token: give at least one text with a character in it.")
    known = vocabulary_size(model)
    for ids, _ in pieces:
        check_vocabulary({"input_ids": torch.tensor(ids)}, known, "a text")
    reach = max(len(ids) for ids, _ in pieces)
    result = RoutingAggregate(
        layers=layers,
        class_tokens=np.zeros(len(CLASSES), np.int64),
        class_kept=np.zeros((len(CLASSES), len(layers))),
        position_tokens=np.zeros(reach, np.int64),
        position_kept=np.zeros((reach, len(layers))),
        texts=count,
        model=model_name(model),
    )
    seen: list[Counter[str]] = [Counter() for _ in CLASSES]
    decoder = model.get_decoder()  # the head's logits are not needed
    for done, (ids, tokens) in enumerate(
        tqdm(pieces, desc="Routing", unit="piece", disable=not progress), start=1
    ):
        with eval_mode(model), torch.no_grad(), record_routing(model) as recording:
            decoder(input_ids=torch.tensor([ids], device=model.device), use_cache=False)
        keep = recording.steps[-1].keep
        keep_TR = torch.stack([kept_share(keep[i])[0] for i in layers], dim=1).double().cpu().numpy()
        classes = np.asarray(classify(tokens))
        np.add.at(result.class_tokens, classes, 1)
        np.add.at(result.class_kept, classes, keep_TR)
        result.position_tokens[: len(ids)] += 1
        result.position_kept[: len(ids)] += keep_TR
        for token, kind in zip(tokens, classes, strict=True):
            seen[kind][token] += 1
        if report is not None:
            report(done, len(pieces))
    result.examples = [[token for token, _ in counter.most_common(EXAMPLES)] for counter in seen]
    return result


def _pieces(
    tokenizer: Any, texts: Iterable[Any], longest: int | None
) -> tuple[list[tuple[list[int], list[str]]], int]:
    """(ids, token texts) of at most `longest` tokens each, and how many texts they are from."""
    pieces: list[tuple[list[int], list[str]]] = []
    count = 0
    for text in texts:
        if isinstance(text, str) and not text:
            continue
        ids, tokens = encode(tokenizer, text)
        count += 1
        step = longest or len(ids)
        for start in range(0, len(ids), step):
            pieces.append((ids[start : start + step], tokens[start : start + step]))
    return pieces, count
