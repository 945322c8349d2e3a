"""Which causal language models can be converted: found out by converting a tiny random one of each type.

A row of the report is a fact about the installed transformers, not a promise from a list. The type's own
class is built with small sizes and random weights and converted. With every gate open its logits must be the
dense model's, in one forward and in cached steps; with tokens skipped they must be those of the masked
reference, and the same in cached steps. Whatever goes wrong is the reason.
"""

import gc
import importlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from modlab.errors import ModlabError

if TYPE_CHECKING:
    import pandas
    from torch import Tensor
    from transformers import PretrainedConfig, PreTrainedModel

# What the project promises; the rest of the report is what turned out to work.
REQUIRED = ("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "gpt2")

PROBE_TOKENS = 12
CACHED_PREFIX = 8  # of the probe's tokens; the rest are fed one by one through the ragged cache
TOLERANCE = 1e-4  # logit difference that counts as fp32 rounding, as a share of the largest logit

# Sizes of the tiny model, by the names that config classes use for the same thing. A field is set only where
# the class has a larger one, so that each type keeps its own kind of norms, positions, activation and biases.
TINY_SIZES: dict[int, tuple[str, ...]] = {
    512: ("vocab_size",),
    256: ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "max_seq_len"),
    128: ("intermediate_size", "n_inner", "ffn_dim", "d_ff", "d_inner", "ffn_hidden_size", "encoder_ffn_dim")
    + ("decoder_ffn_dim", "moe_intermediate_size", "shared_expert_intermediate_size"),
    64: (
        "hidden_size",
        "n_embd",
        "d_model",
        "embed_dim",
        "model_dim",
        "emb_dim",
        "dim",
        "word_embed_proj_dim",
    ),
    16: ("head_dim", "kv_channels", "rotary_dim"),
    8: ("sliding_window",),
    6: ("num_hidden_layers", "n_layer", "num_layers", "n_layers", "encoder_layers", "decoder_layers"),
    4: ("num_attention_heads", "n_head", "num_heads", "n_heads", "encoder_attention_heads")
    + ("decoder_attention_heads", "num_experts", "num_local_experts", "n_routed_experts"),
    2: ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "num_experts_per_tok"),
    1: ("n_group", "topk_group"),
}
# Multi-head latent attention derives these from its own sizes, and has as many key as query heads.
LATENT_DERIVED = ("head_dim", "num_key_value_heads")
# Lists with one entry a layer: cut to the tiny model's depth.
PER_LAYER_LISTS = ("layer_types", "attention_layers", "block_types", "layers_block_type", "mlp_layer_types")
FLAGS = {"is_decoder": True}  # encoder types with a causal head are causal only on request
LARGEST = 50_000_000  # parameters; a type that the table above does not shrink below this is not tried


def causal_types() -> dict[str, str]:
    """Every model_type that the installed transformers has a causal LM for, with its class name."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return {
        model_type: names if isinstance(names, str) else names[0]
        for model_type, names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    }


def report(model_types: Iterable[str] | None = None, progress: bool = True) -> "pandas.DataFrame":
    """Try to convert a tiny random model of each causal LM type.

    Args:
        model_types: the types to try, by `config.model_type`; None tries all of the installed transformers.
        progress: show a bar on stderr.

    Returns:
        One row a type: model_type, class_name, supported (bool), reason ("" where supported, else one line).

    Raises:
        ModlabError: a name in `model_types` is not a causal LM type of the installed transformers.
    """
    import pandas
    from tqdm.auto import tqdm

    known = causal_types()
    wanted = list(known) if model_types is None else list(model_types)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        import transformers

        raise ModlabError(
            f"transformers {transformers.__version__} has no causal LM type {', '.join(map(repr, unknown))}; "
            "modlab.families.causal_types() lists those it has."
        )
    rows = []
    for model_type in (bar := tqdm(wanted, unit="type", disable=not progress)):
        bar.set_description(model_type)
        reason = why_not(model_type)
        rows.append((model_type, known[model_type], not reason, reason))
        gc.collect()
    return pandas.DataFrame(rows, columns=["model_type", "class_name", "supported", "reason"])


def why_not(model_type: str) -> str:
    """The reason why a model of this type cannot be converted, in one line; "" if it can."""
    stage = "no tiny model could be built"
    try:
        with _quiet():
            model = tiny_model(model_type)
            stage = ""
            return _probe(model)
    except Exception as problem:  # whatever a third-party class raises is an answer here
        first_line = next((line.strip() for line in str(problem).splitlines() if line.strip()), "no message")
        name = "" if isinstance(problem, ModlabError) else f"{type(problem).__name__}: "
        return (f"{stage}: " if stage else "") + f"{name}{first_line}"[:300]


def tiny_model(model_type: str) -> "PreTrainedModel":
    """A small model of the given type on the CPU, fp32, random weights from a fixed seed, in eval mode."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    config = tiny_config(CONFIG_MAPPING[model_type])
    with torch.device("meta"):  # costs no memory: some types stay at billions of parameters
        parameters = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if parameters > LARGEST:
        raise ModlabError(f"TINY_SIZES leave it at {parameters / 1e6:,.0f} M parameters")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model.eval()


def tiny_config(config_class: "type[PretrainedConfig]") -> "PretrainedConfig":
    """An instance of the config class with small sizes; everything else as the class has it by default."""
    default = config_class()
    aliases = getattr(config_class, "attribute_map", {})
    changes: dict[str, Any] = {
        name: tiny_config(type(getattr(default, name)))
        for name in getattr(config_class, "sub_configs", {})
        if getattr(default, name, None) is not None
    }

    def settable(name: str) -> Any:
        """The default's value of a plain field; None for an absent, aliased or computed one."""
        computed = isinstance(getattr(config_class, name, None), property)
        return None if computed or name in aliases else getattr(default, name, None)

    latent = hasattr(default, "qk_rope_head_dim")
    for size, names in TINY_SIZES.items():
        for name in names:
            if latent and name in LATENT_DERIVED:
                continue
            value = settable(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > size:
                changes[name] = size
    if latent and "num_attention_heads" in changes:
        changes["num_key_value_heads"] = changes["num_attention_heads"]
    depth = next((changes[name] for name in TINY_SIZES[6] if name in changes), None)
    for name in PER_LAYER_LISTS:
        value = settable(name)
        if isinstance(value, (list, tuple)):
            changes[name] = list(value)[:depth]
    # Special tokens lie beyond the tiny vocabulary, where torch's embedding has no padding row for them.
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        if isinstance(settable(name), int):
            changes[name] = 0
    changes.update((name, flag) for name, flag in FLAGS.items() if isinstance(settable(name), bool))
    return config_class(**changes)


def _probe(model: "PreTrainedModel") -> str:
    """Convert `model` and hold it against itself, dense and masked: the reason why it fails, or ""."""
    import torch
    from torch import Tensor

    import modlab
    from modlab.cache_argument import cache_argument
    from modlab.ops.reference import masked_execution

    embeddings: Any = model.get_input_embeddings()
    vocab = embeddings.weight.shape[0]
    ids_BT = torch.randint(3, vocab, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(0))

    def logits() -> Tensor:
        return model(input_ids=ids_BT, use_cache=False).logits

    def logits_in_steps() -> Tensor:
        """A prefill of the first tokens, then one token a forward, through one ragged cache."""
        cache, name = modlab.RaggedCache(model), cache_argument(model)
        parts = [ids_BT[:, :CACHED_PREFIX], *ids_BT[:, CACHED_PREFIX:].split(1, dim=1)]
        return torch.cat(
            [model(input_ids=p, use_cache=True, **{name: cache}).logits for p in parts], dim=1
        )

    def check(claim: str, got_BTV: Tensor, wanted_BTV: Tensor) -> str:
        worst = (got_BTV - wanted_BTV).abs().max().item()
        scale = wanted_BTV.abs().max().item()
        return (
            ""
            if worst <= TOLERANCE * scale
            else f"{claim}: logits differ by {worst / scale:.1g} of the largest"
        )

    with torch.no_grad():
        try:
            dense_BTV = logits()
        except Exception as problem:
            raise ModlabError(
                f"the tiny dense model does not run: {type(problem).__name__}: {problem}"
            ) from problem
        if not torch.isfinite(dense_BTV).all():
            return "the tiny dense model gives logits that are not finite"
        modlab.convert(model)
        opened_BTV = logits()
        if not torch.equal(opened_BTV, dense_BTV):
            return (
                check("conversion changes the model", opened_BTV, dense_BTV)
                or "conversion changes the last bits"
            )
        open_gates = check("the ragged cache differs from the dense model", logits_in_steps(), dense_BTV)
        with modlab.routing_override(model, _some_tokens):
            routed_BTV = logits()
            with masked_execution(model):
                masked_BTV = logits()
            if not check("", routed_BTV, dense_BTV):
                return "skipping tokens does not change the logits: the routers do not reach the layers"
            return (
                open_gates
                or check("skipping differs from the masked reference", routed_BTV, masked_BTV)
                or check("skipping in cached steps differs from one forward", logits_in_steps(), routed_BTV)
            )


def _some_tokens(layer: int, gate_BT: "Tensor", position_ids_BT: "Tensor") -> "Tensor":
    """A fixed routing that keeps three in five tokens, other ones in each layer, however they are chunked."""
    return (position_ids_BT * 7 + layer * 3) % 5 < 3


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the log lines of a hundred odd configs off the progress bar."""
    logging = importlib.import_module("transformers.utils.logging")
    level = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        logging.set_verbosity(level)
