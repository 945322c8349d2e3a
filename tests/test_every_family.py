"""Every causal LM type that the installed transformers registers: it passes the whole proof, or is refused for the
reason written down here.

By default the promised types and one type for each mechanism run; `--all-families` runs them all. What is claimed
of a type, and how, is in modlab/proof.py.
"""

import re
from collections.abc import Iterator

import pytest
import torch

from modlab import families
from modlab.proof import FreshProcess

# One type for each way in which layers differ, beside the promised ones.
MECHANISMS = {
    "bloom": "ALiBi, one table for all rows and heads",
    "mpt": "ALiBi without a batch axis, inverted boolean masks",
    "opt": "positional arguments, learned positions",
    "gptj": "attention and MLP in parallel",
    "gpt_neo": "a window inside the attention module",
    "mvp": "layers that return a tuple of one",
    "bert": "an encoder type as a decoder",
    "roformer": "rotary tables with an axis for heads",
    "doge": "attention that adds a mask of its own",
    "dbrx": "attention one module deeper",
    "deepseek_v3": "latent attention, experts in groups",
    "mixtral": "mixture of experts",
    "gpt_oss": "attention sinks",
    "gemma3": "a model of several parts, whose masks are made outside the decoder",
    "gemma3n_text": "parallel residual streams, inputs by layer, shared keys and values",
    "gemma4_text": "layers with different heads",
    "llama4_text": "chunked layers beside full ones",
    "qwen3_next": "linear attention beside softmax attention",
    "jamba": "Mamba layers beside softmax attention",
    "recurrent_gemma": "recurrent layers that padding leaks through",
}
"""type: what it stands for."""

NO_ATTENTION = "it has no softmax attention"
INDEXED = "its attention is sparse: an indexer picks the keys"
STATE = "it keeps a recurrent state beside its keys and values"
UNSUPPORTED = {
    "axk2": INDEXED,
    "mamba": NO_ATTENTION,
}
"""type: a regular expression that its reason must match."""


def fast(model_type: str) -> bool:
    return model_type in families.REQUIRED or model_type in MECHANISMS


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-families")
    chosen = [name for name in families.causal_types() if everything or fast(name)]
    metafunc.parametrize("model_type", chosen)


@pytest.fixture(scope="session")
def fresh() -> Iterator[FreshProcess]:
    with FreshProcess() as process:
        yield process


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_family(model_type: str, fresh: FreshProcess) -> None:
    reason = families.why_not(model_type, fresh)
    expected = UNSUPPORTED.get(model_type)
    if expected is None:
        assert not reason, f"{model_type} was supported and is not any more: {reason}"
    elif not reason:
        pytest.fail(f"{model_type} is supported now: take it out of UNSUPPORTED ({expected!r}).")
    else:
        assert re.search(expected, reason), f"{model_type} is refused for another reason than {expected!r}"
