"""What a token may skip: one object for each value of `MoDConfig.skip`, which every other part asks.

    skips.named("kv")            the object of a name
    skips.names()                the names that there are
    skips.register(Mine())       one more; from then on MoDConfig(skip="mine") is valid

`base.Skip` is the whole protocol.
"""

from __future__ import annotations

from modlab.errors import ModlabError
from modlab.skips.base import Skip
from modlab.skips.branch import AttentionSkip, MLPSkip
from modlab.skips.kv import KeyValueSkip
from modlab.skips.kv_leave import KeyValueLeaveSkip
from modlab.skips.layer import LayerSkip
from modlab.skips.leave import LeaveSkip
from modlab.skips.written import SublayerSkip, WrittenSkip

__all__ = ["Skip", "named", "names", "register"]

_REGISTERED: dict[str, Skip] = {}


def register(skip: Skip) -> Skip:
    """Makes `skip.name` a value of `MoDConfig.skip`; a second one of the same name replaces the first."""
    _REGISTERED[skip.name] = skip
    return skip


def names() -> list[str]:
    """The values of `MoDConfig.skip` that there are, the default first."""
    return list(_REGISTERED)


def named(name: str) -> Skip:
    """The skip of this name.

    Raises:
        ModlabError: there is none; says which there are.
    """
    skip = _REGISTERED.get(name) if isinstance(name, str) else None
    if skip is None:
        raise ModlabError(f"skip={name!r}: choose one of {', '.join(_REGISTERED)}.")
    return skip


for _skip in (
    KeyValueSkip(),
    LayerSkip(),
    AttentionSkip(),
    MLPSkip(),
    LeaveSkip(),
    KeyValueLeaveSkip(),
    WrittenSkip(),
    SublayerSkip(),
):
    register(_skip)
