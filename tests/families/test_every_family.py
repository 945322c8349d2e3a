"""Every causal LM type that the installed transformers registers: it passes the whole proof, or is refused
for the reason written down here.

By default the promised types and one type for each mechanism run; `--all-families` runs them all. What is
claimed of a type, and how, is in modlab/families/proof.py.
"""

import re
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version

import modlab
from modlab.conversion import selection
from modlab.errors import ModlabError
from modlab.families import support as families
from modlab.families.proof import FreshProcess, Unproven, prove
from modlab.families.tiny_models import tiny_model
from modlab.routing.state import masked_execution
from modlab.skips.probe import part_forms
from tests.helpers.one_branch import config_of, no_token, prove_one_branch

NEWEST = Version("5.24")
"""The transformers for which the tables below were written."""

# One type for each way in which layers differ, besides the promised ones.
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
    "llama4_text": "chunked layers next to full ones",
    "qwen3_next": "linear attention next to softmax attention",
    "jamba": "Mamba layers next to softmax attention",
    "recurrent_gemma": "recurrent layers that padding leaks through",
}
"""type: what it stands for."""

RECURRENT = "it has no softmax attention"
NO_KEYS = "take neither an attention mask nor a cache"
NO_LAYERS = r"no list of \S+ decoder layers, each with one softmax attention"
STATE = "a recurrent state next to its keys and values"
MORE_TOKENS = r"run on \[.*\] positions where the input has \[.*\] tokens"
UPSTREAM = "transformers' own model gives other logits in cached steps"
UNSUPPORTED = {
    "blt": NO_LAYERS,  # bytes, merged into patches
    "cpmant": MORE_TOKENS,  # a prompt of its own
    "deepseek_v4": "cache layer is a DeepseekV4...Cache, not plain keys",  # compressed keys and values
    "dory": "ran twice in one forward",
    "falcon_h1": STATE,
    "falcon_mamba": RECURRENT,
    "gemma3n": "needs packages that are not installed: PIL, timm",
    "gemma4_assistant": "a draft model",
    "gemma4_unified_assistant": "a draft model",
    "git": UPSTREAM,  # in a padded batch without an image
    "hrm_text": NO_LAYERS,  # two stacks, looped
    "inkling2_loop_text": STATE,
    "inkling2_text": STATE,
    "inkling_text": STATE,
    "longcat_flash": NO_LAYERS,  # two attentions a layer
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "minimax": "MiniMax uses cache of its own",
    "moshi": "its sliding window is the cache's, not the mask's",
    "musicgen": "several audio codes a step",
    "musicgen_melody": "several audio codes a step",
    "openai-gpt": "no cache of keys and values",
    "prophetnet": MORE_TOKENS,  # streams that predict further tokens
    "qwen4_exp": "picks blocks of keys",
    "qwen4_exp_text": "picks blocks of keys",
    "reformer": "attention is hashed",
    "rwkv": NO_KEYS,
    "xlm": NO_LAYERS,  # lists of attentions and of MLPs
    "xlnet": NO_KEYS,  # it caches hidden states
    "xlstm": RECURRENT,
    "zamba": STATE,
    "zamba2": STATE,
    "zaya": STATE,
}
"""type: a regular expression that its reason must match."""


REFUSALS = ("mamba", "falcon_h1", "dory", "cpmant", "moshi", "git")
"""Refused types that are tested by default."""


NOT_CAUSAL = "transformers' own model sees later tokens"
OLDER = {
    "big_bird": NOT_CAUSAL,
    "cohere_compass_text": "no tiny model of it works: RuntimeError: The expanded size",
    "doge": "transformers' own sdpa attention differs from its eager one",
    "megatron-bert": NOT_CAUSAL,
    "rembert": NOT_CAUSAL,
    "roformer": NOT_CAUSAL,
}
"""What transformers 5.17, the oldest supported, has wrong itself; a version up to `NEWEST` put it right."""


def fast(model_type: str) -> bool:
    return model_type in (*families.REQUIRED, *MECHANISMS, *REFUSALS)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    everything = metafunc.config.getoption("--all-families")
    if "model_type" in metafunc.fixturenames:
        chosen = [name for name in families.causal_types() if everything or fast(name)]
        metafunc.parametrize("model_type", chosen)
    elif "refused_type" in metafunc.fixturenames:
        known = set(families.causal_types()) & set(UNSUPPORTED) - WITHOUT_TINY_MODEL
        metafunc.parametrize("refused_type", sorted(n for n in known if everything or n in REFUSALS))
    elif "supported_type" in metafunc.fixturenames:
        names = [name for name in families.causal_types() if name not in {"gemma3n", *UNSUPPORTED}]
        metafunc.parametrize("supported_type", [n for n in names if everything or n in BRANCHES])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_family(model_type: str, fresh: FreshProcess) -> None:
    if model_type == "gemma3n" and find_spec("timm"):
        pytest.skip("whether it converts is not known where timm is installed")
    reason = families.why_not(model_type, fresh)
    expected = UNSUPPORTED.get(model_type)
    if reason and model_type in OLDER and Version(transformers.__version__) < NEWEST:
        expected = OLDER[model_type]
    if expected is None:
        assert not reason, f"{model_type} was supported and is not any more: {reason}"
    elif not reason:
        pytest.fail(f"{model_type} is supported now: take it out of UNSUPPORTED ({expected!r}).")
    else:
        assert re.search(expected, reason), f"{model_type} is refused, but not because {expected!r}: {reason}"


WITHOUT_TINY_MODEL = {"gemma3n", "gemma4_assistant", "musicgen", "musicgen_melody", "reformer"}


@pytest.mark.parametrize("skip", ["layer", "kv"])
def test_convert_refuses_what_the_report_refuses(refused_type: str, skip: str) -> None:
    """At conversion, not in the first forward, and never by being wrong."""
    with pytest.raises(ModlabError):
        modlab.convert(tiny_model(refused_type), modlab.MoDConfig(skip=skip, layers="all"))


# What the same type can be by its config, besides its default.
VARIANTS = [
    ("bloom", {"apply_residual_connection_post_layernorm": True}),
    ("falcon", {"alibi": True}),
    ("falcon", {"alibi": True, "parallel_attn": False, "bias": True}),
    ("falcon", {"new_decoder_architecture": True}),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}),
    ("gpt_bigcode", {"multi_query": False}),
    ("gpt_neox", {"use_parallel_residual": False}),
    ("mixtral", {"sliding_window": 8}),
    ("mpt", {"attn_config": {"alibi": False}}),
    ("opt", {"do_layer_norm_before": False, "word_embed_proj_dim": 16}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}),
    ("stablelm", {"use_parallel_residual": True, "qk_layernorm": True}),
]


@pytest.mark.parametrize(("name", "changes"), VARIANTS, ids=[f"{n}-{'-'.join(c)}" for n, c in VARIANTS])
def test_variant(name: str, changes: dict, fresh: FreshProcess, tmp_path: Path) -> None:
    prove(name, tmp_path / "model", fresh, **changes)


# Attention or MLP skipped alone.

# One type for each way in which layers use their branches.
BRANCHES = {
    "llama": "x + attention, + MLP",
    "bloom": "both branches add the residual",
    "mpt": "the MLP adds the residual",
    "bert": "the attention adds the residual, before a norm; no MLP module",
    "gpt_neox_japanese": "attention that returns its bias for the layer to add",
    "gptj": "attention and MLP in parallel",
    "gemma2": "norms after the branches",
    "olmo2": "norms after the branches alone",
    "dbrx": "attention one module deeper",
    "opt": "no MLP module",
    "llama4_text": "experts that return their tokens in one row, in some layers",
    "granitemoehybrid": "two MLPs side by side",
    "gemma3n_text": "parallel residual streams",
    "jetmoe": "weights that no module is called for",
    "bamba": "layers that return two outputs, Mamba layers among them",
    "mvp": "layers that return a tuple of one",
}
"""type: what it stands for."""

LATENT = ("axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear", "minicpm3")
LATENT += ("sarvam_mla", "youtu")
INDEXED = ("axk2", "deepseek_v32", "dots3_note", "dots3_note_text", "glm_moe_dsa", "hy_v4")
INDEXED += ("minimax_m3_vl_text",)
MIXES = "does not hide keys of one of its . KV heads alone|does not hide keys of one of its 16 KV heads"
NO_MODULE = "has no MLP module of its own"
NO_RESIDUAL = "adds the residual itself"
NOT_APART = "has no q_proj, k_proj, v_proj apart from each other"
NO_CACHE = "takes no cache of keys and values"
SHARES_KEYS = "shares its keys and values with other layers"
ALL_LOGITS = "computes the logits of all tokens of a prompt"
BERT_LIKE = ("bert", "bert-generation", "big_bird", "camembert", "data2vec-text", "electra", "ernie")
BERT_LIKE += ("megatron-bert", "rembert", "roberta", "roberta-prelayernorm", "roc_bert", "roformer")
BERT_LIKE += ("xlm-roberta", "xlm-roberta-xl", "xmod")
BART_LIKE = ("bart", "bigbird_pegasus", "biogpt", "blenderbot", "blenderbot-small", "marian", "mbart", "mvp")
BART_LIKE += ("opt", "pegasus", "plbart", "trocr", "whisper", "xglm")
HYBRID = (
    "bailing_hybrid",
    "bamba",
    "granitemoehybrid",
    "jamba",
    "kimi_linear",
    "lara_mini",
    "lfm2",
    "lfm2_moe",
)
HYBRID += ("lfm3", "nemotron_h", "olmo_hybrid", "qwen3_5", "qwen3_5_moe", "qwen3_5_moe_text", "qwen3_5_text")
HYBRID += ("qwen3_next", "recurrent_gemma")
ONE_MATRIX = (*BERT_LIKE, *LATENT, "axk2", "codegen", "dbrx", "deepseek_v32", "dots3_note", "dots3_note_text")
ONE_MATRIX += (
    "fuyu",
    "glm_moe_dsa",
    "gpt-sw3",
    "gpt2",
    "jetmoe",
    "mpt",
    "persimmon",
    "phi3",
    "phi4_multimodal",
)
SHARING = ("gemma3n_text", "gemma4", "gemma4_text", "gemma4_unified", "gemma4_unified_text")
GIVEN_NO_KEYS = dict.fromkeys(ONE_MATRIX, NOT_APART) | dict.fromkeys(
    ("bloom", "ctrl", "falcon", "gpt_bigcode", "gpt_neo", "gpt_neox", "gpt_neox_japanese"), NO_CACHE
)
WRITTEN = (
    dict.fromkeys((*BART_LIKE, "nemotron_h"), NO_MODULE)
    | {"granitemoehybrid": "a second MLP besides", "hy_v4": NOT_APART}
    | GIVEN_NO_KEYS
)
LEAVING = (
    dict.fromkeys(SHARING, SHARES_KEYS)
    | dict.fromkeys(("trocr", "whisper"), ALL_LOGITS)
    | {
        "hy_v4": "its sparse attention shares its pick",
        "mllama": "does not run where the input is text alone",
    }
    | GIVEN_NO_KEYS
)
REFUSED_BRANCHES: dict[str, dict[str, str]] = {
    "attention": dict.fromkeys((*BERT_LIKE, "bloom"), NO_RESIDUAL),
    "mlp": dict.fromkeys((*BERT_LIKE, *BART_LIKE, "ctrl", "nemotron_h"), NO_MODULE)
    | dict.fromkeys(("bloom", "mpt"), NO_RESIDUAL)
    | {"granitemoehybrid": "a second MLP besides"},
    "kv": dict.fromkeys(("mpt", "doge"), "does not add its mask"),
    "kv by head": dict.fromkeys(("mpt", "doge"), "does not add its mask")
    | dict.fromkeys(LATENT, "one latent for all heads .*gates='layer'")
    | dict.fromkeys(INDEXED, "picks keys for all KV heads at once")
    | dict.fromkeys(("mvp", "trocr", "xglm"), MIXES)  # they want a mask [B, 1, T, K]
    | dict.fromkeys(("jetmoe", "diffllama"), MIXES),  # heads in another order, values of two heads
    "written": WRITTEN,
    "sublayers": WRITTEN,
    "prompt": LEAVING | dict.fromkeys(("nemotron_h", "recurrent_gemma"), RECURRENT),
    "kv+prompt": LEAVING
    | dict.fromkeys(HYBRID, RECURRENT)
    | dict.fromkeys(("llama4", "llama4_text"), "its attention is chunked")
    | {"doge": "does not add its mask"},
}
"""By what is skipped, type: a regular expression that its reason must match."""
OLDER_GIVEN_NO_KEYS = {"gptj": NO_CACHE}
"""What transformers 5.17 refuses besides where keys are written apart."""


@pytest.mark.parametrize("skip", REFUSED_BRANCHES)
def test_one_branch_is_skipped_or_refused(supported_type: str, skip: str) -> None:
    if supported_type in OLDER and Version(transformers.__version__) < NEWEST:
        pytest.skip("this transformers has the type itself wrong")
    expected = REFUSED_BRANCHES[skip].get(supported_type)
    if skip in ("written", "sublayers", "prompt", "kv+prompt") and Version(transformers.__version__) < NEWEST:
        expected = OLDER_GIVEN_NO_KEYS.get(supported_type, expected)
    settings: dict = {"skip": skip}
    if skip == "kv by head":
        settings = {"skip": "kv", "gates": "kv_head", "router_hidden": 3}
    if expected is None:
        prove_one_branch(supported_type, **settings)
    else:
        with pytest.raises(ModlabError, match=expected):
            modlab.convert(tiny_model(supported_type), config_of(**settings))


@pytest.mark.parametrize("skip", ["layer", "prompt"])
@pytest.mark.parametrize("name", ["bamba", "mvp"])
def test_a_layer_returns_its_own_form_where_the_first_forward_keeps_nothing(name: str, skip: str) -> None:
    """No forward of the routed model has shown it by then."""
    model = modlab.convert(tiny_model(name), config_of(skip))
    ids = torch.arange(3, 12)[None]
    with torch.no_grad(), modlab.routing_override(model, no_token):
        packed = model(ids, use_cache=False).logits
        with masked_execution(model):
            masked = model(ids, use_cache=False).logits
    torch.testing.assert_close(packed, masked, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["bloom", "bert"])
def test_attention_that_loses_the_residual_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the refusal the computation by hand says no: it does not share the conversion's mistake."""

    def blind(*args, **kwargs):
        forms = part_forms(*args, **kwargs)
        return {i: {part: replace(f, refusal="") for part, f in parts.items()} for i, parts in forms.items()}

    monkeypatch.setattr(selection, "part_forms", blind)
    with pytest.raises(Unproven, match="by hand"):
        prove_one_branch(name, "attention")


def test_the_table_of_unsupported_types_has_no_stray_names() -> None:
    """Only types that some version registers: a typing error would hide behind an absent type."""
    newest = Version(transformers.__version__) >= NEWEST
    known = set(families.causal_types())
    assert not newest or set(UNSUPPORTED) <= known, set(UNSUPPORTED) - known
    assert set(families.REQUIRED) <= known
    for table in (MECHANISMS, BRANCHES, *REFUSED_BRANCHES.values()):
        assert not newest or set(table) <= known, set(table) - known
