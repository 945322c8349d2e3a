"""`modlab.enable_fast_generation`: the documented switch, and what it refuses.

Shape letters: B rows, T tokens in, V vocabulary.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from modlab.anatomy import attention_windows, decoder_layers, decoder_of, indexed
from modlab.cache_argument import CACHE_ARGUMENTS, given_cache
from modlab.engine.attention import CannotCapture
from modlab.engine.branch import HostBranch
from modlab.engine.engine import Engine
from modlab.engine.loop import generate_tokens
from modlab.engine.prefill import prefill
from modlab.engine.step import Step
from modlab.errors import ModlabError
from modlab.layer import RoutedModule, extend, restore
from modlab.routing import is_converted
from modlab.routing_table import RoutingTable

PROBE_LENGTHS = (7, 4)
PROBE_STEPS = 3


class FastModel(RoutedModule):
    """Mixed into the class of a model with fast generation (of that object only): `generate` comes here for
    greedy search and sampling, and goes to transformers' own loop for all that the engine does not do.
    """

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Notes whether the user brought a cache of their own, which must be used and filled."""
        self.__dict__["mod_own_cache"] = given_cache(model_kwargs) is not None
        dense: Any = super()
        return dense._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: Any,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """transformers' hook for greedy search and sampling."""
        engine: Engine = self.__dict__["mod_engine"]
        reason = _refusal(self, engine, generation_config, synced_gpus, input_ids, model_kwargs)
        engine.last = {"fast": reason is None, "why": reason or ""}
        if reason is not None:
            dense: Any = super()
            return dense._sample(
                input_ids, logits_processor, stopping_criteria, generation_config,
                synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
            )  # fmt: skip
        facts = dict(engine.last)
        with engine.lock, on_device(engine.device):
            try:
                tokens = generate_tokens(
                    engine, input_ids, model_kwargs.get("attention_mask"), logits_processor,
                    stopping_criteria, generation_config, streamer,
                )  # fmt: skip
            finally:
                engine.release()  # also after an interrupt: a cache may be most of the memory
            engine.last = facts | engine.last
        return tokens

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise ModlabError(
            "a model with fast generation holds captured CUDA graphs, which cannot be copied: "
            "modlab.disable_fast_generation(model) first."
        )


def enable_fast_generation(
    model: PreTrainedModel, compile: bool = True, check: bool = True
) -> PreTrainedModel:
    """Lets `model.generate` use modlab's engine for greedy search and sampling.

    Prompts are run without padding, every routed layer on its kept tokens; on CUDA each further token is one
    CUDA graph, in which a layer that no row needs is skipped by an IF node on the GPU. Beam search, assisted
    decoding, a cache of your own, recorded routing and returned scores go the ordinary way as before;
    `fast_generation_report` says which way the latest call went and why.

    Works for dense models too, so that the two can be compared on equal terms. Generations in several threads
    wait for each other; other forwards of the model must not run meanwhile.

    Args:
        model: dense or converted, on one device, in eval mode.
        compile: compile the layers of the decoding step with torch.compile (on CUDA; the first `generate`
            of each batch size then takes longer).
        check: compare the engine with the ordinary forward on a small random batch first.

    Returns:
        the same model.

    Raises:
        ModlabError: the engine does not cover this model; the message says why. The model is unchanged.
    """
    reason = _model_refusal(model)
    if reason is not None:
        raise ModlabError(f"fast generation does not cover this {type(model).__name__}: {reason}.")
    disable_fast_generation(model)
    try:
        engine = Engine(model, compile)
        if check:
            with on_device(engine.device):
                _probe(model, engine)
    except (CannotCapture, TypeError, AttributeError, RuntimeError) as error:
        raise ModlabError(
            f"fast generation does not cover this {type(model).__name__}: {error}. "
            "The ordinary generate works."
        ) from error
    extend(model, FastModel)
    model.__dict__["mod_engine"] = engine
    return model


def disable_fast_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `enable_fast_generation` and frees its graphs; returns the same model."""
    if is_fast(model):
        restore(model)
        for name in ("mod_engine", "mod_own_cache"):
            model.__dict__.pop(name, None)
    return model


def is_fast(model: Any) -> bool:
    """True between `enable_fast_generation` and `disable_fast_generation`."""
    return isinstance(model, FastModel)


def fast_generation_report(model: PreTrainedModel) -> dict[str, Any]:
    """How fast generation works on this machine, and what the latest `generate` did.

    Returns:
        enabled; branch ("torch", "cuda-python" or "host": how routed layers are skipped) and branch_note (why
        not in a better way); compiled, and uncompiled: the parts of a step that torch.compile failed on, with
        the reason; batch_sizes captured; last: fast, why (not), rows, prompt_tokens a row, new_tokens,
        tokens_chosen ("in the step" or "on the host"), seconds, kv_bytes allocated, kept_tokens [L][B].
    """
    if not is_fast(model):
        return {"enabled": False}
    engine: Engine = model.__dict__["mod_engine"]
    return {
        "enabled": True,
        "branch": engine.branch.name,
        "branch_note": engine.branch_note,
        "compiled": engine.compile,
        "uncompiled": dict(engine.uncompiled),
        "batch_sizes": sorted(engine.steps),
        "last": dict(engine.last),
    }


def _model_refusal(model: PreTrainedModel) -> str | None:
    """Why the engine cannot serve this model at all, or None."""
    if not isinstance(model, PreTrainedModel):
        return "it wraps the model: pass the one inside (of PEFT: peft_model.get_base_model())"
    if len({p.device for p in model.parameters()}) > 1 or getattr(model, "hf_device_map", None):
        return "its weights are spread over several devices"
    if getattr(model.config, "is_encoder_decoder", False):
        return "it is an encoder-decoder"
    if is_converted(model) and model.mod.config.skip != "layer":  # type: ignore[union-attr]
        return f"it skips {model.mod.config.skip} only, the engine skips whole layers"  # type: ignore[union-attr]
    windows = attention_windows(model, len(decoder_layers(model)))
    for index, window in windows.items():
        if window is not None:
            return f"layer {index}: " + (window if isinstance(window, str) else "it has a sliding window")
    decoder_config = decoder_of(model).config.get_text_config(decoder=True)
    if any(indexed(layer) for layer in DynamicCache(config=decoder_config).layers):
        return "its sparse attention picks keys by an index of its own"
    return None


def _refusal(
    model: Any,
    engine: Engine,
    generation_config: Any,
    synced_gpus: bool,
    ids_BT: Tensor,
    model_kwargs: dict[str, Any],
) -> str | None:
    """Why this call goes the ordinary way, or None."""
    if next(model.parameters()).device != engine.device:
        return "the model has moved to another device: enable fast generation again"
    if _is_watched(model, engine):
        return "a forward hook is registered, which would see all rows in one line, or nothing"
    if model.training:
        return "the model is in training mode"
    if synced_gpus:
        return "several processes generate in step"
    if generation_config.return_dict_in_generate:
        return "return_dict_in_generate asks for scores or a cache"
    if generation_config.use_cache is False:
        return "use_cache=False"
    if model.__dict__.get("mod_own_cache"):
        return "a cache was passed in"
    if generation_config.cache_implementation not in (None, "dynamic", "dynamic_full", "hybrid"):
        return f"cache_implementation={generation_config.cache_implementation!r}"
    if getattr(generation_config, "is_assistant", False):
        return "the model drafts for another one"
    allowed = ("attention_mask", "position_ids", *CACHE_ARGUMENTS, "use_cache", "logits_to_keep")
    extra = sorted(name for name, value in model_kwargs.items() if value is not None and name not in allowed)
    if extra:
        return f"it was given {extra[0]}"
    mask = model_kwargs.get("attention_mask")
    if mask is not None and mask.dim() != 2:
        return "attention_mask is not two-dimensional"
    if mask is not None and not bool(mask[:, -1].all()):
        return "a row ends in padding (or is empty)"
    position_BT = model_kwargs.get("position_ids")
    if position_BT is not None:
        real_BT = torch.ones_like(ids_BT) if mask is None else mask
        wrong = (position_BT != real_BT.long().cumsum(1) - 1) & real_BT.bool()
        if bool(wrong.any()):
            return "position_ids are not those of the attention_mask"
    context = getattr(decoder_of(model).config, "max_position_embeddings", None)
    if engine.routing is not None and context and ids_BT.shape[1] > context:
        return "the prompt is longer than the model's context"
    routing = engine.routing
    if routing is not None:
        if routing.recordings:
            return "routing is being recorded"
        if routing.masked:
            return "the masked reference was asked for"
        if routing.override is not None and not isinstance(routing.override, RoutingTable):
            return "routing_override's function is not a RoutingTable"
    return None


def _is_watched(model: torch.nn.Module, engine: Engine) -> bool:
    """Whether somebody else has a forward hook on any part of the model: a recorder, `KVTracker`, a probe."""
    own = set() if engine.routing is None else {handle.id for handle in engine.routing.hooks}
    return any(
        not own.issuperset(hooks)
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
    )


def on_device(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """Makes a GPU the current one: kernels and events go to that, not to where their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@torch.no_grad()
def _probe(model: Any, engine: Engine) -> None:
    """Compares the engine (run from the host, nothing captured) with the model's own forward on random ids.

    Raises:
        CannotCapture: they differ by more than rounding.
    """
    device, B = engine.device, len(PROBE_LENGTHS)
    T = max(PROBE_LENGTHS)
    generator = torch.Generator().manual_seed(0)
    total = T + PROBE_STEPS
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    ids = torch.randint(0, vocabulary, (B, total), generator=generator).to(device)
    mask = torch.ones(B, total, dtype=torch.long, device=device)
    for row, length in enumerate(PROBE_LENGTHS):
        mask[row, : T - length] = 0
    routing, training = engine.routing, model.training
    before = routing.override if routing is not None else None
    branch, engine.branch = engine.branch, HostBranch()
    model.eval()
    try:
        if routing is not None:
            routing.override = RoutingTable(
                {layer: torch.rand(B, total, generator=generator) < 0.5 for layer in routing.layers}
            )
        position = (mask.cumsum(1) - 1).clamp_min(0)
        want = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, T - 1 :]
        logits, caches, counts = prefill(engine, ids[:, :T], mask[:, :T])
        step = Step(engine, B)
        step.tables.attach(caches, T, counts)
        if routing is not None:
            assert isinstance(routing.override, RoutingTable)
            step.tables.force({i: routing.override.for_rows(i, B, device) for i in routing.layers})
        got = [logits]
        for at in range(PROBE_STEPS):
            step.tables.choice.token.copy_(ids[:, T + at, None])
            step.run()
            got.append(step.logits)
    finally:
        engine.branch = branch
        model.train(training)
        if routing is not None:
            routing.override = before
    difference = (torch.stack(got, 1).float() - want.float()).square().mean().sqrt() / want.float().std()
    tolerance = 0.05 if want.dtype in (torch.bfloat16, torch.float16) else 1e-3
    if not bool(difference <= tolerance):
        raise CannotCapture(
            f"its logits differ from the ordinary forward's by {float(difference):.2g} of their spread"
        )
