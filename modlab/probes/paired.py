"""A probe on a converted model and on its dense self: paired differences and their standard errors.

The standard error is that of the paired difference: the spread of how much one row changes, not of how hard
rows are, which is several times larger.
"""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from modlab.probes.dense_side import check_dense, digest_of, sign
from modlab.probes.key_value import retrieval
from modlab.probes.material import token_stream
from modlab.probes.repeated_passage import recall
from modlab.routing.state import routing_of, routing_off

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor
    from transformers import PreTrainedModel

KEYS = ["distance", "row"]
"""What names a line of a probe's table by row."""


def recall_gap(
    model: PreTrainedModel,
    data: Any,
    tokenizer: Any = None,
    *,
    dense: pd.DataFrame | None = None,
    **settings: Any,
) -> pd.DataFrame:
    """What routing costs in recall, by distance: loss on the second copy of a passage above the dense one's.

    Args:
        model: a converted model, at its present thresholds; the dense side is the same weights with routing
            off.
        data: as for `recall`.
        tokenizer: for texts.
        dense: the dense side, from `dense_rows(recall, ...)` with the same arguments, where it is known.
        settings: further arguments of `recall`.

    Raises:
        ModlabError: a dense model; `dense` is of other text or settings; and what `recall` raises.

    Returns:
        DataFrame, one line a distance: `distance`, `passages`; `dense` and `routed`, loss on the second copy
        in nats a token; `gap`, their difference, and its `stderr` over passages; `keep_ratio` of the first
        copy. `frame.attrs["left_out"]` as in `recall`.
    """
    table = _both(recall, model, data, tokenizer, dense, settings, "second_loss")
    table["gap"] = table["second_loss"] - table["second_loss_dense"]
    groups = table.groupby("distance")
    return _with_left_out(
        {
            "passages": groups["row"].count(),
            "dense": groups["second_loss_dense"].mean(),
            "routed": groups["second_loss"].mean(),
            "gap": groups["gap"].mean(),
            "stderr": _stderr(groups["gap"]),
            "keep_ratio": groups["first_keep_ratio"].mean(),
        },
        table,
    )


def retrieval_gap(
    model: PreTrainedModel, data: Any, tokenizer: Any, *, dense: pd.DataFrame | None = None, **settings: Any
) -> pd.DataFrame:
    """What routing costs in retrieval, by distance: of the values that the dense model gives, which remain.

    Args:
        model: as for `recall_gap`.
        data: as for `retrieval`.
        tokenizer: the model's.
        dense: the dense side, from `dense_rows(retrieval, ...)` with the same arguments, where it is known.
        settings: further arguments of `retrieval`.

    Returns:
        DataFrame, one line a distance: `distance`, `questions`; `dense` and `routed`, share of them that are
        answered; `difference`, routed less dense, and its `stderr` over questions; `dense_right`, how many
        the dense model answers, and `of_dense`, the share of these that the routed one answers too (NaN
        where there are none); `keep_ratio` of the asked assignment. `frame.attrs["left_out"]` as in `recall`.
    """
    table = _both(retrieval, model, data, tokenizer, dense, settings, "right")
    table["both"] = table["right"] & table["right_dense"]
    table["difference"] = table["right"].astype(float) - table["right_dense"].astype(float)
    groups = table.groupby("distance")
    dense_right = groups["right_dense"].sum()
    return _with_left_out(
        {
            "questions": groups["row"].count(),
            "dense": groups["right_dense"].mean(),
            "routed": groups["right"].mean(),
            "difference": groups["difference"].mean(),
            "stderr": _stderr(groups["difference"]),
            "dense_right": dense_right,
            "of_dense": groups["both"].sum() / dense_right.where(dense_right > 0),
            "keep_ratio": groups["keep_ratio"].mean(),
        },
        table,
    )


def dense_rows(
    probe: Callable[..., pd.DataFrame], model: Any, data: Any, tokenizer: Any, **settings: Any
) -> pd.DataFrame:
    """A probe's table of the dense model, a line a row: the same at all thresholds, so that several settings
    of one model are held against it. `frame.attrs["made_of"]` is a digest of text and settings, by which a
    dense side of other rows is refused."""
    routing_of(model)
    settings, stream_M = _all_settings(probe, settings), token_stream(data, tokenizer, model)
    table = _dense(probe, model, stream_M, tokenizer, settings)
    sign(table, digest_of(stream_M, settings))
    return table


def _dense(
    probe: Callable[..., Any], model: Any, stream_M: Tensor, tokenizer: Any, settings: dict[str, Any]
) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*distances left out")  # the routed side says it
        with routing_off(model):
            return probe(model, stream_M[None], tokenizer, **{**settings, "by_row": True})


def _all_settings(probe: Callable[..., Any], given: dict[str, Any]) -> dict[str, Any]:
    """With the defaults of those not given; several values as a tuple, since both sides read them."""
    parameters = inspect.signature(probe).parameters.values()
    known = {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}
    several = {
        name: tuple(value)
        for name, value in given.items()
        if isinstance(value, Iterable) and not isinstance(value, str)
    }
    return known | given | several


def _both(
    probe: Callable[..., Any],
    model: Any,
    data: Any,
    tokenizer: Any,
    dense: pd.DataFrame | None,
    settings: dict[str, Any],
    column: str,
) -> pd.DataFrame:
    """Row by row of the routed model, with the dense one's figures under `..._dense`."""
    routing_of(model)
    settings, stream_M = _all_settings(probe, settings), token_stream(data, tokenizer, model)
    if dense is None:
        dense = _dense(probe, model, stream_M, tokenizer, settings)
    else:
        check_dense(dense, digest_of(stream_M, settings), KEYS, column, f"dense_rows({probe.__name__}, ...)")
    routed = probe(model, stream_M[None], tokenizer, **{**settings, "by_row": True})
    table = routed.merge(dense, on=KEYS, suffixes=("", "_dense"), validate="one_to_one")
    table.attrs["left_out"] = routed.attrs["left_out"]
    return table


def _with_left_out(columns: dict[str, Any], table: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    found = pd.DataFrame(columns).reset_index()
    found.attrs["left_out"] = table.attrs["left_out"]
    return found


def _stderr(groups: Any) -> Any:
    """Of a group's mean; NaN where a group has a single row."""
    return groups.std() / groups.count().map(math.sqrt)
