"""Running a model on a few tokens up to some layer, to see what it calls its modules with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch

from modlab.hf.model import device_of, eval_mode

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle
    from transformers import PreTrainedModel

TOKENS = 3


class Reached(Exception):
    """Raised by a hook: the forward has come as far as it needs to."""


@torch.no_grad()
def run_up_to(
    model: PreTrainedModel, hooks: Iterable[RemovableHandle], run: Callable[..., Any] | None = None
) -> None:
    """One forward of `TOKENS` tokens in eval mode, until a hook raises `Reached`; the hooks are removed then.

    Args:
        model: dense; every module's mode and the model's weights stay as they are.
        hooks: in place already.
        run: what is called instead of the model.
    """
    token = 1 if getattr(model.config, "pad_token_id", None) == 0 else 0  # padding makes some models warn
    ids = torch.full((1, TOKENS), token, device=device_of(model))
    try:
        with eval_mode(model):
            (run or model)(input_ids=ids, use_cache=False)
    except Reached:
        pass
    finally:
        for hook in hooks:
            hook.remove()
