"""An attention under another name for a while: each thread computes its own all the same."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import modlab
from modlab.execution.weighed_attention import weighing_attention
from modlab.execution.what_if_attention import flex_attention
from modlab.hf.attention_names import attention_name, attention_named
from tests.helpers.models import dense_llama, scatter_gates

IDS = torch.randint(3, 500, (2, 14), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def model_of(form: str) -> Any:
    model = dense_llama(num_hidden_layers=4)
    if form == "dense":
        return model
    skip = "kv" if form == "gates a head" else form
    heads = {"gates": "kv_head"} if form == "gates a head" else {}
    config = modlab.MoDConfig(skip=skip, layers=[1, 3], keep_recent=3, keep_first=1, **heads)  # type: ignore[arg-type]
    return scatter_gates(modlab.convert(model, config))


@pytest.mark.parametrize("block", [flex_attention, weighing_attention])
@pytest.mark.parametrize("form", ["dense", "kv", "gates a head", "layer", "attention"])
def test_a_forward_while_another_thread_trains(form: str, block: Any) -> None:
    """Training on a GPU lends the config another name inside each routed module."""
    model, inside, done = model_of(form), threading.Event(), threading.Event()

    def forwards() -> list[torch.Tensor]:
        with torch.no_grad():
            whole = model(IDS, attention_mask=MASK, use_cache=False).logits
            first = model(IDS[:, :9], attention_mask=MASK[:, :9], use_cache=True)
            cached = model(IDS[:, 9:], attention_mask=MASK, past_key_values=first.past_key_values).logits
        return [whole, first.logits, cached]

    def train() -> None:
        with block(model.config):
            inside.set()
            assert done.wait(60)

    want = forwards()
    with ThreadPoolExecutor(1) as other:
        training = other.submit(train)
        assert inside.wait(60)
        try:
            got = forwards()
        finally:
            done.set()
        training.result()
    assert all(map(torch.equal, got, want))
    assert model.config._attn_implementation == "sdpa"


def test_the_last_block_to_end_gives_the_name_back() -> None:
    config = dense_llama().config
    first, second = attention_named([config], "one"), attention_named([config], "one")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert (config._attn_implementation, attention_name(config)) == ("one", "sdpa")
    second.__exit__(None, None, None)
    assert (config._attn_implementation, attention_name(config)) == ("sdpa", "sdpa")


def test_another_name_waits() -> None:
    config, entered = dense_llama().config, threading.Event()

    def other() -> str:
        with attention_named([config], "two"):
            entered.set()
            return str(config._attn_implementation)

    with ThreadPoolExecutor(1) as thread:
        with attention_named([config], "one"):
            waiting = thread.submit(other)
            assert not entered.wait(0.05) and config._attn_implementation == "one"
        assert waiting.result(60) == "two"
    assert config._attn_implementation == "sdpa"


def test_a_block_that_fails_gives_the_name_back() -> None:
    config = dense_llama().config
    with pytest.raises(KeyboardInterrupt), attention_named([config], "one"):
        raise KeyboardInterrupt
    assert config._attn_implementation == "sdpa"
