"""Greedy search and sampling over the engine, in step with transformers' own loop.

The host reads a step's tokens only after the next step has been handed to the GPU: a stop is noticed one step
late, that step's result is dropped, and the GPU never waits for the host.

Shape letters: B rows, T tokens so far, V vocabulary.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from modlab.cache.bytes import allocated_bytes
from modlab.engine.choice import MAX_ENDS, choose
from modlab.engine.prefill import prefill
from modlab.engine.ring import RingBuffer
from modlab.engine.tables import Tables
from modlab.routing.table import RoutingTable

if TYPE_CHECKING:
    from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList
    from transformers.generation.streamers import BaseStreamer

    from modlab.engine.engine import Engine


@torch.no_grad()
def generate_tokens(
    engine: Engine,
    ids_BT: Any,
    mask_BT: Tensor | None,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: BaseStreamer | None,
) -> Tensor:
    """What `GenerationMixin._sample` returns: the prompts with the new tokens behind them, long [B, T].

    Raises:
        KernelRefused: the GPU has no room for a kernel; before a token is streamed.
        ModlabError: the bound of the cache is less than these rows take, or a routing table is not theirs.
    """
    B, prompt = ids_BT.shape
    rules = step_rules(logits_processor, stopping_criteria, generation_config)
    override = engine.routing.override if engine.routing is not None else None

    step = engine.step(B)
    tables = step.tables
    started = time.perf_counter()
    most_older = None
    if engine.budget is not None:
        most_older = engine.budget.older(B, generation_config.max_length or prompt)
    logits_BV, buffers, counts = prefill(engine, ids_BT, mask_BT, most_older)
    tables.attach(buffers, prompt, counts, *((rules.ends, rules.pad) if rules is not None else ()))
    tables.force(
        {i: override.for_rows(i, B, engine.device) for i in tables.routers}
        if isinstance(override, RoutingTable)
        else {}
    )
    chooser: _Chooser = (
        _InTheStep(tables, rules)
        if rules is not None
        else _OnTheHost(tables, ids_BT, logits_processor, stopping_criteria, generation_config)
    )
    new: list[Tensor] = []
    late = _Late(B, engine.device)
    while True:
        late.send(chooser.choose(logits_BV))
        full = chooser.full(prompt + len(new) + 1)
        if not full:
            step.run()
            logits_BV = step.logits
        stopped, tokens_B = late.read()
        new.append(tokens_B)
        if streamer is not None:
            streamer.put(tokens_B)
        if full or stopped:
            break
    if streamer is not None:
        streamer.end()
    tables.read_lengths()
    engine.last |= {
        "rows": B,
        "prompt_tokens": counts,
        "new_tokens": len(new),
        "seconds": time.perf_counter() - started,
        "kv_bytes": allocated_bytes([vars(buffer) for buffer in buffers]),
        "kept_tokens": [
            buffer.row_lengths if isinstance(buffer, RingBuffer) else list(buffer.lengths)
            for buffer in buffers
        ],
        "tokens_chosen": chooser.where,
    }
    return torch.cat([ids_BT, torch.stack(new, 1).to(ids_BT.device)], dim=1)


@dataclass
class StepRules:
    """What a step has to know to choose tokens by itself.

    Attributes:
        ends, pad: tokens that end a row, and what it goes on with.
        lengths: transformers' own criteria of length, asked on the host.
    """

    ends: list[int]
    pad: int
    lengths: list[MaxLengthCriteria]


def step_rules(
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
) -> StepRules | None:
    """The rules of a greedy search that ends by length and end tokens; None where the host has to choose:
    sampling, logits processors, any other stopping criterion.
    """
    settings: Any = generation_config
    if settings.do_sample or logits_processor:
        return None
    ends: set[int] = set()
    lengths: list[MaxLengthCriteria] = []
    for criterion in stopping_criteria:
        if type(criterion) is EosTokenCriteria:  # a subclass may stop for other reasons
            ends |= set(criterion.eos_token_id.tolist())
        elif type(criterion) is MaxLengthCriteria:
            lengths.append(criterion)
        else:
            return None
    if len(ends) > MAX_ENDS or (ends and settings._pad_token_tensor is None):
        return None
    return StepRules(sorted(ends), int(settings._pad_token_tensor) if ends else 0, lengths)


class _Chooser(Protocol):
    """Chooses each row's next token and enters it in the tables."""

    where: str

    def choose(self, logits_BV: Tensor) -> Tensor:
        """News for the host, long [1 + B]: whether all rows are finished, then their tokens."""
        ...

    def full(self, length: int) -> bool:
        """Whether rows of `length` tokens end here."""
        ...


class _InTheStep:
    """The step has chosen already; only the token of the prefill is chosen here."""

    where = "in the step"

    def __init__(self, tables: Tables, rules: StepRules) -> None:
        self.choice, self.lengths, self.first = tables.choice, rules.lengths, True

    def choose(self, logits_BV: Tensor) -> Tensor:
        if self.first:
            choose(logits_BV, self.choice)
            self.first = False
        return self.choice.news

    def full(self, length: int) -> bool:
        line = torch.empty(1, 1).expand(1, length)  # they look at the shape, and may warn of it
        return any(bool(criterion(line, None)) for criterion in self.lengths)  # type: ignore[arg-type]


class _OnTheHost:
    """Logits processors, sampling and stopping criteria of any kind, by launches between the steps."""

    where = "on the host"

    def __init__(
        self,
        tables: Tables,
        ids_BT: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
    ) -> None:
        settings: Any = generation_config
        self.token_B1, self.ids_BT = tables.choice.token, ids_BT
        self.processor, self.criteria = logits_processor, stopping_criteria
        self.sampling, self.pad = bool(settings.do_sample), settings._pad_token_tensor
        self.has_eos = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
        self.finished_B = torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)
        self.first = True

    def choose(self, logits_BV: Tensor) -> Tensor:
        if self.sampling or self.processor or self.first:
            scores_BV = self.processor(self.ids_BT, logits_BV.to(torch.float32, copy=True))  # type: ignore[arg-type]
            if self.sampling:
                next_B = torch.multinomial(scores_BV.softmax(-1), num_samples=1)[:, 0]
            else:
                next_B = scores_BV.argmax(-1)
            self.first = False
        else:
            next_B = self.token_B1[:, 0].clone()  # the step, which knows no end tokens now, chose the best
        if self.has_eos:
            next_B = torch.where(self.finished_B, self.pad.to(next_B.device), next_B)
        self.ids_BT = torch.cat([self.ids_BT, next_B[:, None]], dim=1)
        self.finished_B = self.finished_B | self.criteria(self.ids_BT, None)  # type: ignore[arg-type]
        self.token_B1.copy_(next_B[:, None])
        return torch.cat([self.finished_B.all()[None].long(), next_B])

    def full(self, length: int) -> bool:
        limit = self.criteria.max_length
        return limit is not None and length >= limit


class _Late:
    """Whether all rows are finished, and their tokens, copied to the host while the GPU goes on."""

    def __init__(self, rows: int, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self.host = torch.empty(1 + rows, dtype=torch.long, pin_memory=cuda)
        self.event: Any = torch.cuda.Event() if cuda else None

    def send(self, news: Tensor) -> None:
        """Copies `news` long [1 + B] as it stands in the stream; read it before sending more."""
        self.host.copy_(news, non_blocking=self.event is not None)
        if self.event is not None:
            self.event.record()

    def read(self) -> tuple[bool, Tensor]:
        """(all rows finished, tokens [B]); waits for the copy only."""
        if self.event is not None:
            self.event.synchronize()
        return bool(self.host[0]), self.host[1:].clone()
