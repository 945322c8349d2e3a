"""A tiny random model of any causal LM type of transformers, for tests and for `families.report()`.

A type's own config class says what it is; only its sizes are made small. Where that alone gives no working
model, `EXCEPTIONS` says what to set: the one table in this package that knows types by name.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

DEPTH = 4

# Sizes of the tiny model, by the names that config classes use for the same thing. A field is set only where
# the class has a larger one, so that each type keeps its own kind of norms, positions, activation and biases.
TINY_SIZES: dict[int, tuple[str, ...]] = {
    256: ("vocab_size", "max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length")
    + ("max_seq_len", "vocab_size_per_layer_input"),
    64: ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "d_inner", "ffn_hidden_size", "encoder_ffn_dim")
    + (
        "decoder_ffn_dim",
        "moe_intermediate_size",
        "shared_expert_intermediate_size",
        "expert_ffn_hidden_size",
    )
    + ("intermediate_size_mlp", "dense_intermediate_size", "shared_intermediate_size", "mamba_d_ssm")
    + ("block_ff_dim", "conv_dim", "conv_dim_out", "shared_experts_intermediate_size"),
    32: ("hidden_size", "n_embd", "d_model", "embed_dim", "model_dim", "emb_dim", "dim", "lru_width")
    + ("word_embed_proj_dim", "embedding_size", "num_experts_dim"),
    # (Few heads of an indexer would often agree on a score of exactly 0, and keys would tie.)
    16: (
        "index_n_heads",
        "kv_lora_rank",
        "q_lora_rank",
        "o_lora_rank",
        "hc_lowrank",
        "laurel_rank",
        "mamba_d_state",
        "ssm_state_size",
    )
    + ("hidden_size_per_layer_input", "rotary_emb_dim"),
    8: (
        "head_dim",
        "kv_channels",
        "rotary_dim",
        "sliding_window",
        "v_head_dim",
        "qk_nope_head_dim",
        "dim_head",
    )
    + (
        "qk_rope_head_dim",
        "linear_key_head_dim",
        "linear_value_head_dim",
        "index_head_dim",
        "global_head_dim",
    )
    + (
        "window_size",
        "local_attention",
        "attention_window_size",
        "sliding_window_size",
        "attention_chunk_size",
    )
    + (
        "keep_window_size",
        "index_topk",
        "mamba_d_head",
        "mamba_head_dim",
        "swa_head_dim",
        "swa_v_head_dim",
        "indexer_head_dim",
        "swa_rope_head_dim",
    ),
    DEPTH: ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers")
    + ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    + ("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    + ("linear_num_value_heads", "mamba_n_heads", "mamba_num_heads", "swa_num_attention_heads"),
    2: ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_experts_per_tok", "moe_k")
    + (
        "linear_num_key_heads",
        "moe_topk",
        "swa_num_key_value_heads",
        "num_experts_per_token",
        "expert_layer_period",
    ),
    1: ("n_group", "topk_group", "first_k_dense_replace", "num_dense_layers", "n_shared_experts"),
}
# Multi-head latent attention derives these from its own sizes, and has as many key as query heads.
LATENT_DERIVED = ("head_dim", "num_key_value_heads")
# Lists with one entry a layer: cut to the tiny model's depth.
PER_LAYER_LISTS = ("layer_types", "attention_layers", "block_types", "layers_block_type", "mlp_layer_types")
FLAGS = {"is_decoder": True}  # encoder types with a causal head are causal only on request
LARGEST = 20_000_000  # parameters; a type that the table above does not shrink below this is not tried

# What a type's own defaults leave open, or what must fit a smaller depth; by model_type of the (sub)config.
EXCEPTIONS: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"num_experts": 4, "n_group": 2, "topk_group": 1, "num_key_value_heads": 4},
    "bamba": {"mamba_n_heads": 4, "mamba_d_head": 16, "attn_layer_indices": [1, 3]},
    "blenderbot": {
        "encoder_layers": DEPTH
    },  # transformers' cache has that many layers for the decoder alone, too
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"] * 2}
    | {
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0},
        }
    },
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}}
    | {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_head_dim": 16}
    | {"swa_q_lora_rank": 16, "swa_kv_lora_rank": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8}
    | {"head_dim": 16, "num_key_value_heads": 4},
    "dots3_note_audio_encoder": {"adapter_input_size": 32, "adapter_out_dim": 32},
    "dots3_note_vision_encoder": {"adapter_in_dim": 32, "adapter_out_dim": 32},
    "falcon_h1": {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_ssm": 64},
    "gemma3n_text": {
        "num_kv_shared_layers": 2,
        "num_hidden_layers": 6,
        "altup_num_inputs": 2,
        "intermediate_size": 64,
    }
    | {"layer_types": ["sliding_attention", "full_attention"] * 3},
    "granitemoehybrid": {"mamba_n_heads": 4, "mamba_d_head": 16}
    | {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "linear_head_dim": 8,
        "linear_num_heads": 4,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "longcat_flash": {"head_dim": 8, "num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 2},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "nemotron_h": {"n_groups": 2, "mamba_num_heads": 4, "mamba_head_dim": 16},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8}
    | {"indexer_budget": 8, "indexer_compress_ratio": 4, "ngram_vocab_size_base": 256},
    "xmod": {"default_language": "en_XX"},
    "zamba": {"n_mamba_heads": 2, "attention_head_dim": 16, "num_key_value_heads": 4}
    | {"layers_block_type": ["linear_attention", "linear_attention", "hybrid", "linear_attention", "hybrid"]}
    | {"num_hidden_layers": 5},
}


def tiny_model(model_type: str, **changes: Any) -> PreTrainedModel:
    """A small model of the given type on the CPU, fp32, random weights from a fixed seed, in eval mode;
    `changes` are made to its config.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = tiny_config(CONFIG_MAPPING[model_type], **changes)
    with torch.device("meta"):  # costs no memory: some types stay at billions of parameters
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ModlabError(f"the tiny model has {parameters / 1e6:,.0f} M parameters: TINY_SIZES miss a size")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        # What a class starts at a constant (biases, norms, gates) would hide mistakes, or make tokens tie.
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.numel() > 1 and parameter.min() == parameter.max():
                    parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def tiny_config(config_class: type[PretrainedConfig], **wanted: Any) -> PretrainedConfig:
    """An instance of the config class with small sizes; all else as wanted, or as the class has it."""
    default = config_class()
    # What a type sets for single layers is hidden from getattr, not from vars.
    fields = vars(default)
    aliases = getattr(config_class, "attribute_map", {})
    changes: dict[str, Any] = {
        name: tiny_config(type(fields[name]))
        for name in getattr(config_class, "sub_configs", {})
        if fields.get(name) is not None
    }

    def settable(name: str) -> Any:
        """The default's value of a plain field; None for an absent, aliased or computed one."""
        computed = isinstance(getattr(config_class, name, None), property)
        return None if computed or name in aliases else fields.get(name)

    latent = "qk_rope_head_dim" in fields
    for size, names in TINY_SIZES.items():
        for name in names:
            if latent and name in LATENT_DERIVED:
                continue
            value = settable(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > size:
                changes[name] = size
    if latent and "num_attention_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    for name in PER_LAYER_LISTS:
        value = settable(name)
        if isinstance(value, (list, tuple)):
            changes[name] = every_kind(list(value), DEPTH)
    # Special tokens lie beyond the tiny vocabulary, where torch's embedding has no padding row for them.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(settable(name), int):
            changes[name] = 0
    changes.update((name, flag) for name, flag in FLAGS.items() if isinstance(settable(name), bool))
    changes.update(EXCEPTIONS.get(config_class.model_type, {}))
    return config_class(**{**changes, **wanted})


def every_kind(values: list[Any], count: int) -> list[Any]:
    """The first `count` of a list with one entry a layer; kinds that come later take the place of repeats."""
    chosen = values[:count]
    for value in values[count:]:
        repeats = [i for i, other in enumerate(chosen) if other in chosen[:i]]
        if value not in chosen and repeats:
            del chosen[repeats[-1]]
            chosen.append(value)
    return chosen


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the log lines and bars of a hundred odd configs away."""
    logging = importlib.import_module("transformers.utils.logging")
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
