"""Case `overhead`: what the fixed cost of a decoding step is made of, each cure off and on.

Shape letters: B rows, T tokens so far.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from modlab.bench.fast import Variant, Workload, fast_models
from modlab.bench.registry import Row, Settings, case
from modlab.engine import fast_generation_report


def never(ids_BT: Tensor, scores: Any, **kwargs: Any) -> Tensor:
    """A stopping criterion of the user's own that stops nothing: with one, tokens are chosen on the host (and
    its two launches a token are the price of asking)."""
    return torch.zeros(len(ids_BT), dtype=torch.bool, device=ids_BT.device)


@case
def overhead(settings: Settings) -> Iterator[Row]:
    """generate: parts outside the layers compiled or not, tokens chosen in the step or on the host."""
    variants = [Variant(settings.routed, ratio) for ratio in settings.ratios]
    longest = max(settings.contexts) + settings.decode_tokens
    ways: tuple[bool | str, ...] = ("layers", True) if settings.device.type == "cuda" else (False,)
    for compile in ways:
        with fast_models(settings, longest, [settings.routed], compile) as (dense, twins):
            for context in settings.contexts:
                lengths = [context] * settings.batch
                workload = Workload(settings, dense, twins, lengths, settings.decode_tokens)
                for criteria in ({"stopping_criteria": [never]}, {}):
                    workload.generate_settings = criteria
                    for row in workload.rows(variants, settings.repeats):
                        compiled = fast_generation_report(dense)["compiled"]
                        chosen = workload.last[None]["tokens_chosen"]
                        yield row | {"compiled": str(compiled), "tokens_chosen": chosen}
