"""One routed module: what conversion fixed about it (`Plan`), and what one forward adds (`Site`).

Shape letters: B rows, T tokens in.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from modlab.cache.range import KVRange
from modlab.hf.anatomy import slides_by_itself
from modlab.routing.record import Decision, ForwardCall
from modlab.routing.state import Routing
from modlab.skips.base import GateForm, Part


@dataclass
class Plan:
    """What `convert` leaves with a routed module, in its one attribute `mod_plan`.

    Attributes:
        routing: the model's routing state.
        layer_idx: index of the decoder layer.
        part: what the module is in its layer.
        branch_ends: submodules whose output the paper's gate multiplies.
        needs_mask: whether its attention needs a mask where a kernel's own causal flag would do.
        in_tuple: whether it returns its output in a tuple.
        extra_outputs: how many further outputs that tuple has.
        query_heads: N of this process, where its KV heads have gates of their own; else 1.
        heads_here: the KV heads of this process where ranks share them (tensor parallelism); None: all.
        plain: whether it is an attention that may attend to keys where they lie (`skips/plain.py`).
        added: names of the modules that conversion added to this one.
    """

    routing: Routing
    layer_idx: int
    part: Part
    branch_ends: list[str] = field(default_factory=list)
    needs_mask: bool = False
    in_tuple: bool = False
    extra_outputs: int = 0
    query_heads: int = 1
    heads_here: slice | None = None
    plain: bool = False
    added: list[str] = field(default_factory=list)

    @property
    def gate_form(self) -> GateForm:
        """How gates enter the module's output, see `execution/gate.py`."""
        return self.routing.skip.gate_form(self.routing.config, self.part)

    def site(self, decision: Decision, last_alone: bool = False) -> Site:
        """This module in the forward in progress."""
        routing, call = self.routing, self.routing.require_call()
        window = routing.windows[self.layer_idx]
        decision = routing.skip.decision_for(self.part, decision)
        if self.heads_here is not None:
            decision = decision.of_gates(self.heads_here)
        return Site(
            routing=routing,
            layer_idx=self.layer_idx,
            decision=decision,
            call=call,
            attention=routing.attention,
            window=window if window is not None and window < call.num_columns else None,
            own_window=slides_by_itself(routing.model_config),
            needs_mask=self.needs_mask,
            form=self.gate_form,
            residual=self.part == "layer",
            recent=call.recent,
            query_heads=self.query_heads,
            plain=self.plain,
            branch_ends=self.branch_ends,
            empty_rest=(None,) * self.extra_outputs,
            last_alone=last_alone,
            range=call.ranges.get(self.layer_idx),
        )


@dataclass
class Site:
    """One routed module in one forward: the decision, and what executing it needs to know.

    Attributes:
        layer_idx: index of the decoder layer.
        decision: gate and keep of its tokens; under tensor parallelism of this process's KV heads.
        call: the model's forward.
        attention: name of the attention implementation.
        window: sliding window that matters at this length, or None.
        own_window: whether the attention slides by itself, whatever its mask says.
        needs_mask: whether a kernel's own causal flag will not do.
        form: how the gate enters the output; ``"scaled"`` by hooks on the branch ends.
        residual: True if a skipped token passes through (a layer), False if it adds nothing (a branch).
        recent: None where a skipped token does not run; else it runs, and the number of latest tokens that
            every token may attend to, kept or not.
        query_heads: N, where masks differ from one KV head to the next; else 1.
        plain: as of the `Plan`.
        branch_ends: submodules whose output the paper's gate multiplies.
        empty_rest: what stands in for the rest of the output tuple when no token ran.
        last_alone: whether of each row the last token alone attends, so that a mask is about that one.
        range: how keys and values are coded in fewer bits; None where they are as they are.
    """

    routing: Routing
    layer_idx: int
    decision: Decision
    call: ForwardCall
    attention: str
    window: int | None
    own_window: bool
    needs_mask: bool
    form: GateForm
    residual: bool
    recent: int | None
    query_heads: int
    plain: bool
    branch_ends: list[str]
    empty_rest: tuple[None, ...]
    last_alone: bool = False
    range: KVRange | None = None

    @property
    def runs(self) -> Tensor:
        """The tokens that the module runs for, bool [B, T]."""
        return self.decision.keep if self.recent is None else self.call.real
