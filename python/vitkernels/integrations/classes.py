"""The class of an accelerated module, also where torch has derived one of its own from it.

``torch.nn.utils.parametrize`` and FSDP's ``fully_shard`` give a module a new class, derived from the one that it has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib import import_module

from torch import nn

__all__ = ["class_at", "exchange", "exchanged", "path_of"]


def path_of(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_at(path: str) -> type | None:
    """The class that :func:`path_of` calls ``path``, ``None`` if its module does not have it."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name, None)


def exchange(found: Sequence[tuple[nn.Module, type, type]]) -> Callable[[], None]:
    """Put ``new`` in the place of ``old`` in the class of ``module``, for each ``(module, old, new)``.

    Returns:
        What undoes that, except where a module has been given a class with another forward in the meantime.
    """
    made: dict[type, type] = {}
    for module, old, new in found:
        module.__class__ = exchanged(type(module), old, new, made)

    def back() -> None:
        before = {derived: cls for cls, derived in made.items()}
        for module, old, new in found:
            if issubclass(type(module), new) and type(module).forward is new.forward:  # type: ignore[attr-defined]
                module.__class__ = exchanged(type(module), new, old, before)

    return back


def exchanged(cls: type, old: type, new: type, made: dict[type, type]) -> type:
    """The class ``cls``, which is ``old`` or derived from it, with ``new`` in the place of ``old``.

    Args:
        made: the derived classes so far, so that modules of one class have one class afterwards.
    """
    if cls is old:
        return new
    if cls not in made:
        bases = tuple(exchanged(base, old, new, made) if issubclass(base, old) else base for base in cls.__bases__)
        body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        made[cls] = type(cls)(cls.__name__.replace(old.__name__, new.__name__), bases, body)
    return made[cls]
