"""`modlab.enable_fast_generation`: the documented switch, its report, and the proof on a small batch.

Shape letters: B rows, T tokens in, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.generation.configuration_utils import GenerationMode

from modlab.conversion.extend import extend, restore
from modlab.engine.attention import CannotCapture
from modlab.engine.branch import HostBranch
from modlab.engine.engine import Engine
from modlab.engine.loop import generate_tokens
from modlab.engine.prefill import prefill
from modlab.engine.refusals import call_refusal, idle_aside, model_refusal, rounding_refusal
from modlab.engine.turns import TURNS, TakesTurns
from modlab.errors import ModlabError
from modlab.hf.anatomy import decoder_of
from modlab.hf.model import eval_mode
from modlab.hf.names import given_cache
from modlab.kernels.device import on_device
from modlab.kernels.launch import KernelRefused, warn_slower
from modlab.warn import warn

PROBE_LENGTHS = (7, 4)
PROBE_STEPS = 3


SERVED = (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE)


def unbounded(why: str) -> ModlabError:
    """What a call gets that runs without the engine, though the cache is to be bounded."""
    return ModlabError(
        f"kv_tokens or kv_mib bounds the cache of fast generation, which does not serve this call: {why}. "
        "modlab.enable_fast_generation(model) takes the bound away. What a bounded generation has stored is "
        "in modlab.fast_generation_report(model)['last']."
    )


class FastModel(TakesTurns):
    """Mixed into the class of a model with fast generation (of that object only): `generate` comes here for
    greedy search and sampling, and goes to transformers' own loop for all that the engine does not do.
    """

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Notes whether the user brought a cache of their own, which must be used and filled."""
        mode = next((argument for argument in args if isinstance(argument, GenerationMode)), None)
        if self.__dict__["mod_engine"].bound is not None and mode not in (*SERVED, None):
            raise unbounded(f"it is {mode.value.replace('_', ' ')}" if mode is not None else "")
        self.__dict__["mod_engine"].caller.own_cache = given_cache(model_kwargs) is not None
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
        with engine.turns.generation() as why_not, on_device(engine.device):
            # Asked when the model is ours: a generation that is under way has hooks of its own in the layers.
            reason = why_not or call_refusal(
                self, engine, generation_config, synced_gpus, input_ids, model_kwargs
            )
            if not reason:
                engine.last = {"fast": True, "why": ""}
                try:
                    with idle_aside(self):
                        return generate_tokens(
                            engine, input_ids, model_kwargs.get("attention_mask"), logits_processor,
                            stopping_criteria, generation_config, streamer,
                        )  # fmt: skip
                except KernelRefused as refused:  # no later than in the first step: nothing is streamed yet
                    reason = str(refused)
                    if engine.bound is None:
                        warn_slower(reason, "generate runs without the engine")
                finally:
                    engine.release()  # also after an interrupt: a cache may be most of the memory
            engine.last = {"fast": False, "why": reason}
            if engine.bound is not None:
                raise unbounded(reason)
        dense: Any = super()
        return dense._sample(
            input_ids, logits_processor, stopping_criteria, generation_config,
            synced_gpus=synced_gpus, streamer=streamer, **model_kwargs,
        )  # fmt: skip


def enable_fast_generation(
    model: PreTrainedModel,
    compile: bool | str = True,
    check: bool = True,
    kv_tokens: int | None = None,
    kv_mib: float | None = None,
    guess: bool = False,
) -> PreTrainedModel:
    """Lets `model.generate` use modlab's engine for greedy search and sampling.

    Prompts are run without padding, every routed layer (or its attention or MLP, as `MoDConfig.skip` says) on
    its kept tokens; with ``skip="prompt"`` and ``"kv+prompt"`` the layers above the point of leaving run each
    row's last prompt token alone. On CUDA each further token is one CUDA graph, in which what no row needs is
    skipped by an IF node on the GPU. Beam search, assisted decoding, a cache of your own, recorded routing
    and returned scores run as without it, and so, with a warning, does a call for whose kernels the GPU has
    no room; `fast_generation_report` says which way the latest call went and why.

    Works for dense models too, so that the two can be compared on equal terms. Generations in several threads
    wait for each other, and other forwards of the model for a generation (see `turns`); while this function
    itself runs there must be none.

    Args:
        model: dense or converted, on one device, in eval mode.
        compile: compile the decoding step, and the layers of prompts of 512 tokens and more, with
            torch.compile (on CUDA; the first `generate` of each batch size, and the first such prompt, then
            take longer). "layers" compiles the layers of a step alone, to see what the rest costs
            (`modlab bench overhead`).
        check: compare the engine with the ordinary forward on a small random batch first.
        kv_tokens: with ``skip="kv"`` and ``"kv+prompt"``: tokens that a routed layer stores of a row at most
            (each KV head, where those have gates), the latest `keep_recent` included. A row that is full
            gives up the token of the lowest gate; the first `keep_first` go last. Calls that the engine does
            not cover are refused.
        kv_mib: the same for all rows and layers of a call together, in MiB.
        guess: with ``skip="layer"``, ``"attention"`` and ``"mlp"``: run prompts of one row and 512 to 8,192
            tokens on as many tokens of each layer as the prompts before have kept and a quarter more, so that
            the host does not wait for each layer; a prompt that keeps more runs twice. Only after eight
            prompts in a row that they would have been right for. Results are equal up to rounding, which
            then depends on the prompts before.

    Returns:
        the same model.

    Raises:
        ModlabError: the engine does not cover this model (or the GPU has no room for its kernels), or not
            these settings; the message says why. The model is unchanged: fast generation that was on before
            stays on, with its bound.
    """
    reason = model_refusal(model)
    if reason is not None:
        raise ModlabError(
            f"fast generation does not cover this {type(model).__name__}: {reason}. model.generate works "
            "without it."
        )
    before: Engine | None = model.__dict__.get("mod_engine")
    disable_fast_generation(model)
    try:
        engine = _engine_for(model, compile, check, kv_tokens=kv_tokens, kv_mib=kv_mib, guess=guess)
    except BaseException:  # an interrupt too
        if before is not None:
            _attach(model, before)
        raise
    _attach(model, engine)
    return model


def _engine_for(model: PreTrainedModel, compile: bool | str, check: bool, **settings: Any) -> Engine:
    """An engine that has passed its check; arguments and errors as of `enable_fast_generation`."""
    try:
        engine = Engine(model, compile, **settings)
        without = rounding_refusal(engine.routing)
        if check and engine.form is not None and not without:
            # without a caller's autocast, under which the engine does not run either
            with on_device(engine.device), torch.autocast(engine.device.type, enabled=False):
                _probe(model, engine)
    except (CannotCapture, KernelRefused, TypeError, AttributeError, RuntimeError) as error:
        raise ModlabError(
            f"fast generation does not cover this {type(model).__name__}: {error}. "
            "The ordinary generate works."
        ) from error
    if engine.routing is not None and engine.form is None:
        without = engine.routing.skip.why_no_engine(engine.routing.config)
    if without:
        warn(f"model.generate will run without the engine: {without}")
    return engine


def _attach(model: PreTrainedModel, engine: Engine) -> None:
    """Makes the engine the one that `model.generate` uses."""
    decoder = decoder_of(model)
    if decoder is not model:
        extend(decoder, TakesTurns)
        decoder.__dict__[TURNS] = engine.turns
    extend(model, FastModel)
    model.__dict__[TURNS] = engine.turns
    model.__dict__["mod_engine"] = engine


def disable_fast_generation(model: PreTrainedModel) -> PreTrainedModel:
    """Undoes `enable_fast_generation` and frees its graphs; returns the same model."""
    if is_fast(model):
        restore(model)
        model.__dict__.pop("mod_engine", None)
        for module in {model, decoder_of(model)}:
            if isinstance(module, TakesTurns):
                restore(module)
            module.__dict__.pop(TURNS, None)
    return model


def is_fast(model: Any) -> bool:
    """True between `enable_fast_generation` and `disable_fast_generation`."""
    return isinstance(model, FastModel)


def fast_generation_report(model: PreTrainedModel) -> dict[str, Any]:
    """How fast generation works on this machine, and what the latest `generate` did.

    Returns:
        enabled; branch ("torch", "cuda-python" or "host": how routed layers are skipped) and branch_note (why
        not in a better way); compiled (True, False or "layers"), and uncompiled: the parts that torch.compile
        failed on, with the reason; batch_sizes captured; guessed: prompts that ran on guesses, "right", and
        that had to run again, "wrong" (None where nothing is guessed); last: fast, why (not), rows,
        prompt_tokens a row, new_tokens, tokens_chosen ("in the step" or "on the host"), seconds, kv_bytes
        allocated, kept_tokens [L][B]: those whose keys and values are stored (of KV heads with gates of their
        own the mean, rounded up).
    """
    if not is_fast(model):
        return {"enabled": False}
    engine: Engine = model.__dict__["mod_engine"]
    return {
        "enabled": True,
        "branch": engine.branch.name,
        "branch_note": engine.branch_note,
        "compiled": engine.compile,
        "uncompiled": engine.uncompiled | engine.line_compiler.eager,
        "batch_sizes": sorted(engine.steps),
        "guessed": engine.guesses and {"right": engine.guesses.right, "wrong": engine.guesses.wrong},
        "last": dict(engine.last),
    }


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
    keep = {layer: torch.rand(B, total, generator=generator) < 0.5 for layer in engine.forced}
    position = (mask.cumsum(1) - 1).clamp_min(0)
    branch, engine.branch = engine.branch, HostBranch()
    try:
        with eval_mode(model), engine.deciding(keep):
            want = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits[:, T - 1 :]
            whole = None if engine.budget is None else total  # nothing is given up here
            logits, buffers, counts = prefill(engine, ids[:, :T], mask[:, :T], whole)
            step = engine.make_step(engine, B)
            step.tables.attach(buffers, T, counts)
            step.tables.force({layer: table.to(device) for layer, table in keep.items()})
            got = [logits]
            for at in range(PROBE_STEPS):
                step.tables.choice.token.copy_(ids[:, T + at, None])
                step.run()
                got.append(step.logits)
    finally:
        engine.branch = branch
    difference = (torch.stack(got, 1).float() - want.float()).square().mean().sqrt() / want.float().std()
    # A number between two codes falls either way, by which the last bits grow. In bfloat16 SmolLM2 differs so
    # by .071 on an H200, and its ordinary forward from itself by .05 with another kernel of attention.
    half = want.dtype in (torch.bfloat16, torch.float16)
    tolerance = (0.1 if half else 0.05) if engine.ranges else 0.05 if half else 1e-3
    if not bool(difference <= tolerance):
        raise CannotCapture(
            f"its logits differ from the ordinary forward's by {float(difference):.2g} of their spread"
        )
