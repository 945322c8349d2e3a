"""Packed execution of a routed module: kept tokens are gathered, run and put back; skipped ones cost nothing.

Outside training no projection, attention or MLP row is computed for a skipped token or for padding: rows of a
batch that keep the same number of tokens run together, others on their own (in decoding all rows that keep
run together). In training all rows run together, right-padded to the longest, which suits a GPU better.

The number of kept tokens shapes the tensors, so each routed layer costs one host sync a forward.

Shape letters: B batch rows, R rows of one group, T tokens in, S kept tokens (of a row, or
of all rows in one line), K keys, D model dim.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from modlab.cache.layer import RaggedLayer
from modlab.cache.ragged import PackedView, RaggedCache
from modlab.cache.recent import RecentLayer
from modlab.errors import ModlabError
from modlab.execution.gate import gated_output, scaled_branches
from modlab.execution.masks import (
    MaskValues,
    as_attention_mask,
    of_keys,
    recent_mask,
    untold_window,
    visible_mask,
)
from modlab.execution.rounded import rounding
from modlab.execution.stored_keys import StoredView, attends_directly, changed
from modlab.hf.arguments import LayerArguments, take_tokens
from modlab.routing.record import by_gate
from modlab.routing.rule import over

if TYPE_CHECKING:
    from modlab.execution.site import Site


CHUNK = 1024
"""Tokens of a prompt that run at once where a mask hides keys from them."""


@dataclass
class Group:
    """Rows that run in one call: `index_RS` holds the time positions of their kept tokens.

    With `padded`, the slots of a row beyond its kept tokens hold skipped ones; causality keeps them from
    being seen, and their outputs are dropped. `keeps_all` is False where some of the tokens run and are not
    kept.
    """

    rows: list[int]
    index_RS: Tensor
    padded: bool = False
    keeps_all: bool = True


def exact_groups(keep_BT: Tensor, counts: list[int], one_row_each: bool = False) -> list[Group]:
    """Rows grouped by how many tokens they keep, these in order; rows that keep nothing are in no group."""
    if len(counts) == 1:
        return [Group([0], keep_BT[0].nonzero()[None, :, 0])] if counts[0] else []
    rows_by_count: dict[Any, list[int]] = {}
    for row, count in enumerate(counts):
        if count:
            rows_by_count.setdefault((count, row if one_row_each else None), []).append(row)
    order_BT = kept_first(keep_BT)
    return [Group(rows, order_BT[rows, :count]) for (count, _), rows in rows_by_count.items()]


def padded_group(keep_BT: Tensor, counts: list[int]) -> list[Group]:
    """All rows together: each row's kept tokens, then as many skipped ones as the longest row needs."""
    longest = max(counts)
    if not longest:
        return []
    return [Group(list(range(len(counts))), kept_first(keep_BT)[:, :longest], padded=min(counts) < longest)]


def kept_first(keep_BT: Tensor) -> Tensor:
    """Time positions [B, T] with each row's kept tokens first, both parts in order."""
    return (~keep_BT).to(torch.uint8).argsort(dim=1, stable=True)


def run_packed(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs `module` on the kept tokens only; where routing decides about the cache alone (`site.recent`), on
    all tokens but padding. Arguments and result as in `reference.run_masked`; a cache is allowed.
    """
    x_BTD = arguments.hidden
    cache = arguments.cache()
    counts, kept = _counts(site)
    layer = cache.layers[site.layer_idx] if cache is not None else None
    was_ragged = False
    if isinstance(layer, RaggedLayer):
        was_ragged = any(n != layer.cumulative_length for n in layer.lengths) or hides_keys(layer)
        layer.begin(counts, arguments.time, x_BTD.device)
    elif layer is not None:
        raise ModlabError(
            f"cache layer {site.layer_idx} is not ragged: use modlab.RaggedCache of this very model."
        )

    everything = all(count == arguments.time for count in kept)
    if everything and not was_ragged and (layer is None or site.window is None):
        # Nothing to skip and nothing ever skipped: the dense call itself, mask and all, bit for bit.
        times = torch.arange(arguments.time, device=x_BTD.device)
        group = Group(list(range(arguments.batch)), times.expand(arguments.batch, -1))
        changes = rounding(module, arguments, site) | _cache_changes(arguments, site, cache, layer, group)[0]
        with scaled_branches(module, site.branch_ends, site.decision.gate if site.form == "scaled" else None):
            with attention_kernels(x_BTD) if layer is not None else contextlib.nullcontext():
                y, rest = arguments.run(dense, changes)
        skipped = x_BTD if site.residual else 0.0
        out = gated_output(site.form, y, skipped, site.decision.gate, module.training)
    elif attends_directly(site, layer, arguments.mask(), module.training, arguments.one_row_each):
        out, rest = _run_directly(dense, arguments, site, cache, layer, counts, kept)
    else:
        out, rest = _run_groups(module, dense, arguments, site, cache, layer, counts, kept)
    if isinstance(layer, RaggedLayer):
        layer.finish()
    return out, rest


def _run_groups(
    module: nn.Module,
    dense: Callable[..., Any],
    arguments: LayerArguments,
    site: Site,
    cache: RaggedCache | None,
    layer: RaggedLayer | None,
    counts: list[int],
    kept: list[int],
) -> tuple[Tensor, Any]:
    x_BTD, runs, gate = arguments.hidden, site.runs, site.decision.gate
    if module.training and cache is None and not arguments.one_row_each:
        groups = padded_group(runs, counts)
    else:
        # An attention module with a window of its own counts back from the newest key: rows must not differ.
        own_window = site.window is not None and layer is not None and layer.sliding_window is None
        single = "flash" in site.attention or arguments.one_row_each or own_window
        groups = exact_groups(runs, counts, one_row_each=single)
    for group in groups:
        group.keeps_all = all(kept[row] == counts[row] for row in group.rows)
    chunked = site.recent is not None and layer is not None and not site.last_alone
    if chunked and not site.call.sees_future(arguments.mask()):
        groups = [part for g in groups for part in (_in_chunks(g) if hides(g, layer) else [g])]
    rest: Any = site.empty_rest
    if not groups and site.residual:
        return x_BTD, rest
    out = x_BTD.clone() if site.residual else torch.zeros_like(x_BTD)
    for group in groups:
        rows_R1 = torch.tensor(group.rows, device=x_BTD.device)[:, None]
        changes, keys_RK = _cache_changes(arguments, site, cache, layer, group)
        changes |= rounding(module, arguments, site)
        changes |= arguments.select(rows_R1, group.index_RS, keys_RK, site.call.num_columns)
        mask_name = arguments.mask_name()
        if mask_name is not None:
            asking = replace(group, index_RS=group.index_RS[:, -1:]) if site.last_alone else group
            changes[mask_name] = _group_mask(
                site, asking, rows_R1, keys_RK, arguments.mask(), x_BTD.dtype, layer
            )
        gate_RS = take_tokens(gate, rows_R1, group.index_RS)
        with scaled_branches(module, site.branch_ends, gate_RS if site.form == "scaled" else None):
            with attention_kernels(x_BTD):
                y_RSD, rest = arguments.run(dense, changes)
        skipped = changes[arguments.hidden_name] if site.residual else 0.0
        y_RSD = gated_output(site.form, y_RSD, skipped, gate_RS, module.training)
        where = (rows_R1.expand_as(group.index_RS), group.index_RS)
        if group.padded:  # every slot is a token of its own, so that none has to be counted out on the host
            y_RSD = torch.where(over(runs[where], y_RSD), y_RSD, skipped)
        out.index_put_(where, y_RSD.to(out.dtype))
    return out, tuple(None for _ in rest)


def _run_directly(
    dense: Callable[..., Any],
    arguments: LayerArguments,
    site: Site,
    cache: Any,
    layer: Any,
    counts: list[int],
    kept: list[int],
) -> tuple[Tensor, Any]:
    """An attention, over the cache as it lies there (`stored_keys.py`)."""
    call, rows = site.call, list(range(arguments.batch))
    if all(count == arguments.time for count in counts):  # no padding: nothing to gather, nothing to put back
        keep = None if kept == counts else site.decision.keep
        layer.claim(rows, call.columns.expand(len(rows), -1), keep)
        out, rest = _attend(dense, arguments, site, StoredView(cache, layer, rows, site.recent), {})
        return out, tuple(None for _ in rest)
    out, rest = torch.zeros_like(arguments.hidden), site.empty_rest
    for group in exact_groups(site.runs, counts):
        rows_R1 = torch.tensor(group.rows, device=out.device)[:, None]
        some_go = any(kept[row] != counts[row] for row in group.rows)
        layer.claim(group.rows, call.columns[group.index_RS], _kept(site, group) if some_go else None)
        view = StoredView(cache, layer, group.rows, site.recent)
        chosen = arguments.select(rows_R1, group.index_RS)
        y_RSD, rest = _attend(dense, arguments, site, view, chosen)
        out.index_put_((rows_R1.expand_as(group.index_RS), group.index_RS), y_RSD.to(out.dtype))
    return out, tuple(None for _ in rest)


def _attend(
    dense: Callable[..., Any], arguments: LayerArguments, site: Site, view: StoredView, chosen: dict[str, Any]
) -> tuple[Tensor, Any]:
    """One call of the module: without a mask, and with `view` for its cache."""
    mask_name, cache_name = arguments.mask_name(), arguments.cache_name()
    assert mask_name is not None and cache_name is not None
    try:
        y, rest = arguments.run(dense, chosen | {mask_name: None, cache_name: view})
    finally:
        view.attending.end()
    if not view.attending.met:
        raise changed()
    return y, rest


def attention_kernels(x_BTD: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Keeps torch's sdpa off cuDNN while it runs on kept tokens, or on a ragged cache, on a GPU.

    cuDNN makes a new plan for every shape it has not met, and these have a new shape almost every step:
    measured on an H200, 3.6 ms a kept layer and token at 8k, where the layer itself takes 0.8 ms
    (docs/log.md).
    """
    if not x_BTD.is_cuda:
        return contextlib.nullcontext()
    return sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH])


def _cache_changes(
    arguments: LayerArguments, site: Site, cache: RaggedCache | None, layer: RaggedLayer | None, group: Group
) -> tuple[dict[str, Any], Tensor | None]:
    """Puts a view on the group's rows where the cache was; returns it and its keys' columns [R, K]."""
    name = arguments.cache_name()
    if cache is None or layer is None or name is None:
        return {}, None
    kept_RS = None if group.keeps_all else _kept(site, group)
    keys_RK = layer.stage(group.rows, site.call.columns[group.index_RS], kept_RS)
    return {name: PackedView(cache, layer, group.rows)}, keys_RK


def _group_mask(
    site: Site,
    group: Group,
    rows_R1: Tensor,
    keys_RK: Tensor | None,
    given: Any,
    dtype: torch.dtype,
    layer: RaggedLayer | None,
) -> Tensor | None:
    """Mask for one group, or None where the attention's own causal flag says the same."""
    S = group.index_RS.shape[1]
    flash = "flash" in site.attention
    hidden = hides(group, layer)
    if flash and (site.window is not None or hidden):
        what = "a sliding window of a routed layer" if site.window is not None else "skip='kv'"
        raise ModlabError(f"{what} needs a mask: use model.set_attn_implementation('sdpa').")
    queries_RS = site.call.columns[group.index_RS]
    columns_RK = queries_RS if keys_RK is None else keys_RK
    values = MaskValues(given, rows_R1, group.index_RS, columns_RK, site.call.num_columns)
    fresh = keys_RK is None or keys_RK.shape[1] == S  # no cached key before the new ones
    same = len(group.rows) == 1 or fresh
    plain = same and site.call.is_causal(given) and not (site.needs_mask or hidden)
    if site.window is None and plain and (flash or (site.attention == "sdpa" and (fresh or S == 1))):
        return None
    if flash and not site.call.is_causal(given):
        raise ModlabError(
            "packed documents and masks that are more than causal need a mask in routed layers: use "
            "model.set_attn_implementation('sdpa')."
        )
    allowed = visible_mask(values, queries_RS, columns_RK, untold_window(values, site), site.attention)
    if hidden:
        assert site.recent is not None
        kept = layer.key_kept(group.rows) if isinstance(layer, RecentLayer) else _kept(site, group)
        at_RS, at_RK = _places(group, layer, columns_RK)
        allowed = allowed & (of_keys(kept, site.query_heads) | recent_mask(at_RS, at_RK, site.recent))
    if group.padded:
        # The slots behind a row's kept tokens hold skipped ones, which nobody attends to but they themselves.
        counts_R1 = site.runs.sum(1)[rows_R1]
        held_RS = torch.arange(S, device=allowed.device) < counts_R1
        itself = torch.eye(S, dtype=torch.bool, device=allowed.device)
        allowed = (allowed & held_RS[:, None, None, :]) | itself
    return as_attention_mask(allowed, site.attention, dtype, values)


def _places(group: Group, layer: RaggedLayer | None, columns_RK: Tensor) -> tuple[Tensor, Tensor]:
    """Places of a group's queries and keys among their row's held tokens: [R or 1, S] and [1, K].

    Of two tokens of which the earlier one is not kept, these places are as far apart as the tokens are in the
    text, whatever the padding: had one between them been dropped, the earlier one would have been dropped
    before.
    """
    S, device = group.index_RS.shape[1], columns_RK.device
    held = [S] * len(group.rows) if layer is None else layer.held(group.rows)
    at_RK = torch.arange(columns_RK.shape[1], device=device)[None]
    if len(set(held)) == 1:
        return torch.arange(held[0] - S, held[0], device=device)[None], at_RK
    first_R1 = torch.tensor([[n - S] for n in held], device=device)
    return first_R1 + torch.arange(S, device=device), at_RK


def _in_chunks(group: Group) -> list[Group]:
    """A group whose keys are hidden by a mask, cut along its tokens: a mask of all of them would be as large
    as the square of the prompt. Each chunk meets the keys of those before it in the cache."""
    return [replace(group, index_RS=index_RS) for index_RS in group.index_RS.split(CHUNK, dim=1)]


def _counts(site: Site) -> tuple[list[int], list[int]]:
    """How many tokens of each row run, and how many are kept, by all gates of the layer: one host sync."""
    keep, runs = site.decision.keep, site.runs
    if runs is keep:
        counts: list[int] = keep.sum(1).tolist()
        return counts, counts
    keep = by_gate(keep).all(-1)
    both: list[list[int]] = torch.stack([runs.sum(1), keep.sum(1)]).tolist()
    return both[0], both[1]


def _kept(site: Site, group: Group) -> Tensor:
    """Which tokens of a group are kept, bool [R, S], or [R, S, G] by the layer's gates."""
    keep = site.decision.keep
    rows_R1 = torch.tensor(group.rows, device=keep.device)[:, None]
    return keep[rows_R1, group.index_RS]


def hides_keys(layer: RaggedLayer | None) -> bool:
    """Whether the cache holds tokens that not every later token may attend to, for the router's sake."""
    return isinstance(layer, RecentLayer) and layer.has_skipped


def hides(group: Group, layer: RaggedLayer | None) -> bool:
    """Whether a mask has to hide keys from a group's tokens: their own, or some in the cache."""
    return not group.keeps_all or hides_keys(layer)


def run_packed_mlp(
    module: nn.Module, dense: Callable[..., Any], arguments: LayerArguments, site: Site
) -> tuple[Tensor, Any]:
    """Runs an MLP on the kept tokens of all rows at once: no token of it looks at another."""
    x_BTD, keep, gate = arguments.hidden, site.decision.keep, site.decision.gate
    kept_S = keep.flatten().nonzero()[:, 0]
    if not len(kept_S):
        return torch.zeros_like(x_BTD), site.empty_rest
    picked_1SD = x_BTD.flatten(0, 1).index_select(0, kept_S)[None]
    y_1SD, rest = arguments.run(dense, {arguments.hidden_name: picked_1SD})
    gate_1S = gate.flatten().index_select(0, kept_S)[None]
    y_1SD = gated_output(site.form, y_1SD, 0.0, gate_1S, module.training)
    out = torch.zeros_like(x_BTD).flatten(0, 1).index_copy(0, kept_S, y_1SD[0].to(x_BTD.dtype))
    return out.view_as(x_BTD), tuple(None for _ in rest)
