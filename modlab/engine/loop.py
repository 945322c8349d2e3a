"""Greedy search and sampling over the engine, in step with transformers' own loop.

The host reads a step's tokens only after the next step has been handed to the GPU: a stop is noticed one step
late, that step's result is dropped, and the GPU never waits for the host.

Shape letters: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from modlab.engine.prefill import prefill
from modlab.kv_bytes import allocated_bytes
from modlab.routing_table import RoutingTable

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from modlab.engine.engine import Engine


@torch.no_grad()
def generate_tokens(
    engine: Engine,
    ids_BT: Any,
    mask_BT: Tensor | None,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> Tensor:
    """What `GenerationMixin._sample` returns: the prompts with the new tokens behind them, long [B, T]."""
    B, prompt = ids_BT.shape
    settings: Any = generation_config
    sampling = bool(settings.do_sample)
    pad = settings._pad_token_tensor
    has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    limit = stopping_criteria.max_length
    override = engine.routing.override if engine.routing is not None else None

    step = engine.step(B)
    tables = step.tables
    started = time.perf_counter()
    logits_BV, caches, counts = prefill(engine, ids_BT, mask_BT)
    tables.attach(caches, prompt, counts)
    tables.force(
        {i: override.for_rows(i, B, engine.device) for i in tables.routers}
        if isinstance(override, RoutingTable)
        else {}
    )
    best_B: Tensor | None = None
    finished_B = torch.zeros(B, dtype=torch.bool, device=ids_BT.device)
    while True:
        if sampling or logits_processor or best_B is None:
            scores_BV = logits_processor(ids_BT, logits_BV.to(torch.float32, copy=True))
            if sampling:
                next_B = torch.multinomial(scores_BV.softmax(-1), num_samples=1)[:, 0]
            else:
                next_B = scores_BV.argmax(-1)
        else:
            next_B = best_B
        if has_eos:
            next_B = torch.where(finished_B, pad.to(next_B.device), next_B)
        ids_BT = torch.cat([ids_BT, next_B[:, None]], dim=1)
        finished_B = finished_B | stopping_criteria(ids_BT, None)  # type: ignore[arg-type]
        news = _Late(finished_B, next_B)
        full = limit is not None and ids_BT.shape[1] >= limit
        if not full:
            tables.token.copy_(next_B[:, None])
            step.run()
            logits_BV, best_B = step.logits, step.best
        stopped, tokens = news.read()
        if streamer is not None:
            streamer.put(tokens)
        if full or stopped:
            break
    if streamer is not None:
        streamer.end()
    tables.read_lengths()
    engine.last = {
        "rows": B,
        "prompt_tokens": counts,
        "new_tokens": ids_BT.shape[1] - prompt,
        "seconds": time.perf_counter() - started,
        "kv_bytes": allocated_bytes([vars(cache) for cache in caches]),
        "kept_tokens": [list(cache.lengths) for cache in caches],
    }
    return ids_BT


class _Late:
    """Whether all rows are finished, and their tokens, copied to the host while the GPU goes on."""

    def __init__(self, finished_B: Tensor, tokens_B: Tensor) -> None:
        both = torch.cat([finished_B.all()[None].long(), tokens_B])
        if both.is_cuda:
            self.host = torch.empty(both.shape, dtype=both.dtype, pin_memory=True)
            self.host.copy_(both, non_blocking=True)
            self.event: Any = torch.cuda.Event()
            self.event.record()
        else:
            self.host, self.event = both, None

    def read(self) -> tuple[bool, Tensor]:
        """(all rows finished, tokens [B]); waits for the copy only."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.host[0]), self.host[1:]
