"""Names of attention functions that modules attend by for a while.

What a module attends by is a name in its config, which all modules of a model share.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any


@dataclass
class _Lent:
    """A config whose attention has another name for a while: its own, the other, and in how many blocks."""

    own: str | None
    name: str
    blocks: int = 0


_lent: dict[int, _Lent] = {}
_changed = threading.Condition()


@contextlib.contextmanager
def attention_named(configs: Sequence[Any], name: str) -> Iterator[None]:
    """Inside this block modules with one of these configs attend by the function registered under `name`.

    A config is its modules' in all threads. So several threads may be in such blocks, the last one to leave
    gives the configs their own name back, and one that wants another name waits. A thread that runs a forward
    meanwhile finds `name` too: what is registered under it has to know such calls by their masks.

    Args:
        configs: each gets back the name that it had. Their sub-configs are left alone: transformers' public
            setter writes to those too, and would give them all the same name back.
        name: as given to `AttentionInterface.register`.
    """
    with _changed:
        _changed.wait_for(
            lambda: all(id(config) not in _lent or _lent[id(config)].name == name for config in configs)
        )
        for config in configs:
            lent = _lent.setdefault(id(config), _Lent(config._attn_implementation_internal, name))
            lent.blocks += 1
            config._attn_implementation_internal = name
    try:
        yield
    finally:
        with _changed:
            for config in configs:
                _give_back(config)
            _changed.notify_all()


def _give_back(config: Any) -> None:
    lent = _lent[id(config)]
    lent.blocks -= 1
    if not lent.blocks:
        config._attn_implementation_internal = _lent.pop(id(config)).own


def attention_name(config: Any) -> str:
    """The name of a config's attention function, whatever `attention_named` calls it just now."""
    lent = _lent.get(id(config))
    return (lent.own if lent else config._attn_implementation) or "eager"
