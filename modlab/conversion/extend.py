"""An object's class, extended for this one object and restored.

`convert` changes the class of a routed module (of that object only) to ``(Mixin, OriginalClass)``, of the
same name. The original forward stays where it is, reached by `super()`; nothing is copied and nothing global
is patched.
"""

from __future__ import annotations

import functools
import types
from typing import Any

from torch import nn


class Extended(nn.Module):
    """Base of all mixins: an object whose class was extended.

    (transformers evaluates the annotations of a model's bases, so their names must exist at run time.)
    """

    dense_class: type[nn.Module]

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Pickles and copies as (dense class, mixin, state): the extended class cannot be imported."""
        return _rebuild, (self.dense_class, type(self).__bases__[0]), self.__dict__


@functools.cache
def extended_class(dense_class: Any, mixin: Any) -> type[nn.Module]:
    """`dense_class` with `mixin` before it; keeps the name, by which accelerate and FSDP know layers."""
    namespace = {
        "__module__": dense_class.__module__,
        "__qualname__": dense_class.__qualname__,
        "__doc__": dense_class.__doc__,
        "dense_class": dense_class,
    }
    return type(dense_class.__name__, (mixin, dense_class), namespace)


def extend(module: Any, mixin: Any) -> None:
    """Gives this one object the class ``(mixin, its own class)``."""
    dense_class: Any = type(module)
    module.__class__ = extended_class(dense_class, mixin)
    _rebind_hooked(module)


def restore(module: Any) -> None:
    """Gives an extended object its own class back."""
    module.__class__ = type(module).dense_class
    _rebind_hooked(module)


def foreign_forward(module: nn.Module) -> bool:
    """Whether somebody put a forward on the object that `extend` cannot lead to the extended class."""
    return "forward" in module.__dict__ and not _is_hooked(module)


def _is_hooked(module: Any) -> bool:
    before = module.__dict__.get("_old_forward")
    return isinstance(before, types.MethodType) and before.__self__ is module


def _rebind_hooked(module: Any) -> None:
    """accelerate's hooks (`device_map`, offloading) put a forward on the object, which calls the one that was
    there before (`_old_forward`): it becomes the present class's."""
    if _is_hooked(module):
        module._old_forward = types.MethodType(type(module).forward, module)


def _rebuild(dense_class: Any, mixin: Any) -> nn.Module:
    module: nn.Module = dense_class.__new__(dense_class)
    module.__class__ = extended_class(dense_class, mixin)
    return module
