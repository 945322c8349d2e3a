"""Run one text through a converted model and record what each router decided.

Shape letters: B rows (here one), T tokens, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from modlab.cache.stored import cache_sizes
from modlab.data.batches import check_vocabulary
from modlab.data.pieces import encode
from modlab.errors import ModlabError
from modlab.hf.model import context_length, device_of, eval_mode, model_name, vocabulary_size
from modlab.hf.names import given_cache
from modlab.routing.record import by_gate
from modlab.routing.state import is_converted, record_routing
from modlab.traces.routing_trace import RoutingTrace


def trace(model: Any, tokenizer: Any, text: Any) -> RoutingTrace:
    """Run `text` once through a converted model and record what each router decided.

    One forward in eval mode without gradients; the model's training mode and thresholds stay as they were.

    Args:
        model: a converted model.
        tokenizer: its tokenizer.
        text: a text, a chat (a list of messages, written by the chat template) or the token ids of one row.

    Raises:
        ModlabError: the model is not converted; the text is empty, longer than the model's context or of
            tokens that the model does not know.
    """
    return run_traced(model, tokenizer, text)[0]


def run_traced(model: Any, tokenizer: Any, text: Any) -> tuple[RoutingTrace, Any]:
    """`trace`, and the model's output: logits [1, T, V] and the cache that was filled (a RaggedCache)."""
    if not is_converted(model):
        raise ModlabError(
            f"{type(model).__name__} is not a Mixture-of-Depths model, so there is no routing to trace. "
            "Call modlab.convert(model) first."
        )
    ids, tokens = encode(tokenizer, text)
    check_ids(model, ids)
    ids_BT = torch.tensor([ids], device=device_of(model))
    with eval_mode(model), torch.no_grad(), record_routing(model) as recording:
        output = model(ids_BT, use_cache=True)
    step, routing = recording.steps[-1], model.mod
    whole, stored = cache_sizes(model, given_cache(output))
    gates = {i: by_gate(step.gate[i])[0].T.cpu().numpy() for i in routing.layers}
    layers = [i for i in routing.layers for _ in gates[i]]
    return RoutingTrace(
        tokens=tokens,
        token_ids=np.asarray(ids),
        gate=np.concatenate([gates[i] for i in routing.layers]),
        keep=np.concatenate([by_gate(step.keep[i])[0].T.cpu().numpy() for i in routing.layers]),
        layers=layers,
        num_layers=routing.num_layers,
        thresholds=np.asarray([routing.thresholds[i] for i in layers]),
        keep_first=routing.config.keep_first,
        loss=_token_loss(output.logits[0], ids_BT[0]),
        kv_bytes_per_token=whole,
        model=model_name(model),
        skip=routing.config.skip,
        keep_recent=routing.config.recent_stored,
        stored_bytes_per_token=stored,
        kv_cache_dtype=routing.config.kv_cache_dtype,
    ), output


def check_ids(model: Any, ids: list[int]) -> None:
    """Raises ModlabError if the model cannot read so many tokens, or does not know one of them."""
    check_vocabulary({"input_ids": torch.tensor(ids)}, vocabulary_size(model), "the text")
    limit = context_length(model)
    if limit and len(ids) > limit:
        raise ModlabError(
            f"The text has {len(ids):,} tokens; this model reads at most {limit:,} "
            "(config.max_position_embeddings). Shorten it, or trace it in parts."
        )


def _token_loss(logits_TV: Tensor, ids_T: Tensor, chunk: int = 512) -> NDArray[np.float32]:
    """float32[T], nats, NaN at 0. In chunks: a float32 copy of all logits may be gigabytes."""
    loss = torch.full((len(ids_T),), float("nan"))
    for start in range(1, len(ids_T), chunk):
        stop = min(start + chunk, len(ids_T))
        piece = torch.nn.functional.cross_entropy(
            logits_TV[start - 1 : stop - 1].float(), ids_T[start:stop].to(logits_TV.device), reduction="none"
        )
        loss[start:stop] = piece.cpu()
    return loss.numpy()
