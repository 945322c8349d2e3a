"""Hooks on a converted model and its decoder: what routed layers need to know about each forward.

Shape letters: B rows, T tokens in, K keys seen, cached ones included.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from modlab.cache.ragged import RaggedCache
from modlab.errors import ModlabError
from modlab.hf.arguments import forward_signature
from modlab.hf.model import beyond_context, context_length
from modlab.hf.names import CACHE_ARGUMENTS, cache_argument, drops_caches, given_cache
from modlab.routing.learning import Learning
from modlab.routing.record import ForwardCall, RoutingStep
from modlab.routing.state import Routing, eager

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle


ROUTER_LOGITS = "output_router_logits"
"""Asks a mixture of experts for what its own routers said."""


class ForwardHooks:
    """The hooks of one converted model.

    Args:
        routing: its state.
    """

    def __init__(self, routing: Routing) -> None:
        self.routing, self.learning = routing, Learning()

    def register(self, model: nn.Module, decoder: nn.Module) -> list[RemovableHandle]:
        """Puts the hooks in place; the handles take them away again."""
        return [
            decoder.register_forward_pre_hook(self.enter, with_kwargs=True),
            decoder.register_forward_hook(self.leave, always_call=True),
            # A model of several parts makes its decoder's masks itself.
            model.register_forward_pre_hook(self.enter_model, with_kwargs=True),
            model.register_forward_hook(self.leave_model, always_call=True),
        ]

    def enter_model(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Forward pre-hook of the model: notes the caller's attention_mask, and whose logits it wants. Router
        logits of experts that the config alone asks for, and no loss needs, are left out where not all tokens
        pass the experts."""
        if self.routing.is_off:
            return args, kwargs
        given = _arguments(module, args, kwargs)
        self.routing.of_thread.caller_mask = (given.get("attention_mask"),)
        self.routing.of_thread.logits_to_keep = _logits_to_keep(module, given)
        asked = given.get(ROUTER_LOGITS) is None and given.get("labels") is None
        if asked and getattr(module.config, ROUTER_LOGITS, False) and not self._runs_all_experts(module):
            kwargs = {**kwargs, ROUTER_LOGITS: False}
        return args, kwargs

    def leave_model(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook of the model: what it noted is no other forward's."""
        self._forget_caller()

    def _forget_caller(self) -> None:
        self.routing.of_thread.caller_mask = None
        self.routing.of_thread.logits_to_keep = 0

    @eager
    def enter(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict]:
        """Forward pre-hook of the decoder: works out padding and positions, and puts a ragged cache where a
        cache is asked for."""
        routing = self.routing
        if routing.of_thread.bypass:
            return args, kwargs
        given = _arguments(module, args, kwargs)
        if routing.is_off:
            if isinstance(given_cache(given), RaggedCache):
                raise ModlabError(
                    "the cache is a RaggedCache, and routing is off (routing_off): what it has dropped is "
                    "gone. Begin without a cache inside the block, and do not take its cache out of it."
                )
            return args, kwargs
        tokens = given["input_ids"] if given.get("input_ids") is not None else given.get("inputs_embeds")
        if tokens is None:
            return args, kwargs  # the model's own error says it best
        if tokens.shape[1] == 0:
            raise ModlabError("the input holds no token: give the model at least one.")
        if routing.attention == "flex_attention":
            raise ModlabError(
                "flex_attention compiles a kernel for every number of keys, and a routed layer has another "
                "one at each step: use model.set_attn_implementation('sdpa')."
            )
        self._refuse_outputs(module, given)
        cache, kwargs = self._cache(module, given, kwargs)
        if cache is not None:
            cache.check_conversion(routing)
            cache.check_batch(tokens.shape[0])
        seen = cache.get_seq_length() if cache is not None else 0
        if not seen or torch.is_grad_enabled():  # tokens after a prompt meet the prompt's weights
            self.learning.see(routing, module)
        routing.of_thread.call = self._new_call(module, tokens, given, seen, cache)
        self._forget_caller()  # hooks at the model's end are not called where Ctrl-C ends its forward
        return args, kwargs

    def _refuse_outputs(self, module: Any, given: dict[str, Any]) -> None:
        """What the model returns next to its logits has the dense form or is refused before anything runs."""
        routing = self.routing

        def asked(name: str) -> bool:
            value = given.get(name)
            return bool(getattr(module.config, name, False) if value is None else value)

        if asked("output_attentions") and not (routing.masked or routing.skip.parts == ("mlp",)):
            raise ModlabError(
                "output_attentions: a routed layer's attention weights are those of the tokens that it runs "
                "and stores, not [rows, heads, queries, keys] of all. Leave output_attentions out, or "
                "modlab.revert(model) for the dense model's."
            )
        if given.get(ROUTER_LOGITS) and not self._runs_all_experts(module):
            raise ModlabError(
                "output_router_logits: the experts of a routed layer see the kept tokens alone, so their "
                "router logits do not line up with the tokens of the batch (nor does a balancing loss over "
                "them). Give output_router_logits=False, or train with model.mod.what_if = True."
            )

    def _runs_all_experts(self, module: Any) -> bool:
        """Whether all tokens pass all MLPs in this forward."""
        routing = self.routing
        return routing.skip.runs(0.5)[1] == 1 or routing.masked or (module.training and self._what_if)

    @property
    def _what_if(self) -> bool:
        return self.routing.what_if and not self.routing.of_thread.generates

    def _cache(
        self, module: Any, given: dict[str, Any], kwargs: dict[str, Any]
    ) -> tuple[RaggedCache | None, dict[str, Any]]:
        """The cache of this forward, made where one is asked for, and the arguments that say so."""
        cache, use_cache = given_cache(given), given.get("use_cache")
        if use_cache is None:
            use_cache = getattr(module.config, "use_cache", False)
        if cache is None and use_cache and not module.training:
            cache = RaggedCache(module.config, routing=self.routing)
            kwargs = {name: value for name, value in kwargs.items() if name not in CACHE_ARGUMENTS}
            return cache, {**kwargs, cache_argument(module): cache}
        if cache is None and use_cache:
            return None, {**kwargs, "use_cache": False}  # a training forward has no use for a cache
        if cache is not None and not isinstance(cache, RaggedCache):
            raise ModlabError(
                f"the cache is a {type(cache).__name__}, but a routed layer stores only the tokens it "
                "keeps: pass modlab.RaggedCache(model), or nothing and let the model make one."
            )
        if cache is not None and module.training and drops_caches(module, torch.is_grad_enabled()):
            raise ModlabError(
                "transformers drops the cache of a model in train mode with gradient checkpointing: new "
                "tokens would not see earlier ones. Call model.eval(), or leave the cache out."
            )
        return cache, kwargs

    def _new_call(
        self, module: Any, tokens: Tensor, given: dict[str, Any], seen: int, cache: RaggedCache | None
    ) -> ForwardCall:
        routing, of_thread = self.routing, self.routing.of_thread
        B, T = tokens.shape[:2]
        columns = torch.arange(seen, seen + T, device=tokens.device)
        mask = self._padding_mask(given.get("attention_mask"), tokens, seen)
        documents = None
        if mask is not None:
            real, position_ids = mask[:, seen:], mask.long().cumsum(1)[:, seen:] - 1
        else:
            real = torch.ones(B, T, dtype=torch.bool, device=tokens.device)
            position_ids = columns.expand(B, T)
            if cache is None:
                documents = packed_documents(given.get("position_ids"), B, T)
        if documents is not None:
            position_ids = position_in_document(documents)
        longest = T if documents is None else int(position_ids.max()) + 1
        context = context_length(module)
        if seen == 0 and context and longest > context:
            raise ModlabError(
                f"the input has {longest} tokens, the model's context is {context}: {beyond_context(module)}."
            )
        # a step's own settings are for its rows, not for what is generated between two steps
        of_rows = module.training and not of_thread.generates
        steps = [(recording, RoutingStep(real, position_ids)) for recording in of_thread.recordings]
        for recording, step in steps:
            recording.steps.append(step)
        return ForwardCall(
            *(real, position_ids, columns, seen + T, cache, steps),
            thresholds=dict(routing.thresholds),
            what_if=self._what_if,
            generates=of_thread.generates,
            noise=routing.noise,
            row_shift=routing.row_shift if of_rows else None,
            masked=of_thread.masked,
            override=of_thread.override,
            ranges=routing.ranges,
            recent=(routing.row_recent if of_rows else None) or routing.recent,
            padding_mask=mask,
            documents=documents,
            asked=_asked(of_thread.logits_to_keep, T, tokens.device),
        )

    def _padding_mask(self, mask: Any, tokens: Tensor, seen: int) -> Tensor | None:
        """Which columns are tokens, bool [B, K], or None where the caller gave no mask."""
        B, T = tokens.shape[:2]
        if mask is not None and not _is_padding_mask(mask) and self.routing.of_thread.caller_mask is not None:
            (mask,) = self.routing.of_thread.caller_mask
        if mask is None:
            return None
        if not _is_padding_mask(mask):
            mask = real_columns(mask, T, seen + T)
        if mask is None:
            raise ModlabError(
                f"attention_mask: a converted model takes [B, {seen + T}] (1 = token, 0 = padding), or "
                f"[B, heads, {T}, {seen + T}], boolean or additive: routers must know which columns are "
                "padding."
            )
        if mask.shape[1] != seen + T:
            raise ModlabError(
                f"attention_mask covers {mask.shape[1]} tokens, but {seen} are cached and {T} are new: "
                f"it must have shape [{B}, {seen + T}]."
            )
        real: Tensor = mask.to(tokens.device).bool().expand(B, -1)
        return real

    @eager
    def leave(self, module: Any, args: Any, output: Any) -> None:
        """Forward hook at the decoder's end. Padding and positions stay, for gradient checkpointing.

        Raises:
            ModlabError: a routed part did not run where the forward ended well: it is routed in name only.
        """
        call = self.routing.of_thread.call
        if call is None or self.routing.of_thread.bypass or self.routing.is_off:
            return
        decided, ran = call.decisions, call.ran
        for one in (call, *call.elsewhere.values()):
            one.cache, one.steps, one.decisions, one.ran, one.masks = None, [], {}, set(), {}
            if not module.training:  # gradient checkpointing enters layers once more
                one.entered, one.sources = {}, {}
        if output is not None:  # None: an exception is on its way
            self._check_ran(module, decided, ran)

    def _check_ran(self, decoder: Any, decided: dict[int, Any], ran: set[tuple[int, str]]) -> None:
        if decoder.training and getattr(decoder.config, "layerdrop", 0.0):
            return  # the model itself leaves out layers
        depth = getattr(decoder.config.get_text_config(decoder=True), "num_hidden_layers", None)
        for index in self.routing.layers:
            if depth is not None and index >= depth:
                continue  # early-exit drafts lower the number of layers for a while
            for part in self.routing.skip.parts:
                if index not in decided or (index, part) not in ran:
                    raise ModlabError(
                        f"the {part} of layer {index} ran past its router: something calls its dense forward "
                        "(a hook, a wrapper or a `forward` put on the module after conversion). Convert the "
                        "model after it has been wrapped and placed, or take the wrapper away."
                    )


def _arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `module` by name, those in its **kwargs too."""
    module_class: Any = type(module)
    bound = dict(forward_signature(module_class).bind_partial(*args, **kwargs).arguments)
    return {**bound.pop("kwargs", {}), **bound}


def asks_for_logits(model: Any) -> bool:
    """Whether the model's forward can be asked for the logits of some tokens alone. One that takes any
    argument, this one too, and looks at it nowhere returns all."""
    model_class: Any = type(model)
    return "logits_to_keep" in forward_signature(model_class).parameters


def _logits_to_keep(module: Any, given: dict[str, Any]) -> Any:
    """How many of the latest tokens (or which ones) the caller wants logits of; 0 for all. A loss wants all,
    training too; hidden states are all tokens'."""
    hidden = given.get("output_hidden_states")
    if hidden is None:
        hidden = getattr(module.config, "output_hidden_states", False)
    if module.training or hidden or given.get("labels") is not None or not asks_for_logits(module):
        return 0
    wanted = given.get("logits_to_keep")
    return 0 if wanted is None else wanted


def _asked(logits_to_keep: Any, T: int, device: torch.device) -> Tensor | None:
    """The tokens of a forward whose logits are wanted, bool [T]; None where that is all of them. All but a
    plain number is an index, as transformers has it: a tensor, a list, a slice, a number of numpy's."""
    if isinstance(logits_to_keep, int):
        if not 0 < logits_to_keep < T:
            return None
        return torch.arange(T, device=device) >= T - logits_to_keep
    asked = torch.zeros(T, dtype=torch.bool, device=device)
    asked[logits_to_keep.to(device) if isinstance(logits_to_keep, Tensor) else logits_to_keep] = True
    return asked


def _is_padding_mask(mask: Any) -> bool:
    return isinstance(mask, Tensor) and mask.dim() == 2


def packed_documents(position_ids: Any, B: int, T: int) -> Tensor | None:
    """The document of each token where `position_ids` restart inside a row, long [B, T]; else None.

    transformers tells packed documents apart in the same way, in forwards without a mask and a cache (one
    host sync).
    """
    if not isinstance(position_ids, Tensor) or position_ids.dim() != 2 or T < 2:
        return None
    steps = position_ids.expand(B, -1).diff(dim=1, prepend=position_ids.expand(B, -1)[:, :1] - 1)
    documents = (steps != 1).cumsum(1)
    return documents if bool(documents[:, -1].any()) else None


def position_in_document(documents_BT: Tensor) -> Tensor:
    """Index of each token in its document, long [B, T]."""
    T = documents_BT.shape[1]
    columns = torch.arange(T, device=documents_BT.device).expand_as(documents_BT)
    begins = torch.ones_like(documents_BT, dtype=torch.bool)
    begins[:, 1:] = documents_BT[:, 1:] != documents_BT[:, :-1]
    first = columns.masked_fill(~begins, 0).cummax(1).values
    return columns - first


def real_columns(mask: Any, T: int, K: int) -> Tensor | None:
    """Which columns are tokens, by a mask that says who sees whom: a column that not even its own token may
    attend to is padding; of a cached one, which no new token may.

    Args:
        mask: [B or 1, N or 1, T, K], boolean or additive; or several by name, for layers of several kinds.

    Returns:
        bool [B or 1, K]; None where the mask has another form.
    """
    masks = mask.values() if isinstance(mask, dict) else (mask,)
    for one in masks:
        if isinstance(one, Tensor) and one.dim() == 4 and one.shape[2:] == (T, K):
            floating = one.is_floating_point()
            visible_BTK = (one > torch.finfo(one.dtype).min / 2 if floating else one.bool())[:, 0]
            own_BT = visible_BTK[:, :, K - T :].diagonal(dim1=1, dim2=2)
            return torch.cat([visible_BTK[:, :, : K - T].any(1), own_BT], 1)
    return None
