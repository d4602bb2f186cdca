"""The class of an accelerated module, also where torch has derived one of its own from it.

``torch.nn.utils.parametrize`` and FSDP's ``fully_shard`` give a module a new class, derived from the one that it has.
"""

from __future__ import annotations

from importlib import import_module

__all__ = ["class_at", "path_of", "without"]


def path_of(cls: type) -> str:
    """Module and name of a class."""
    return f"{cls.__module__}.{cls.__qualname__}"


def class_at(path: str) -> type | None:
    """The class that :func:`path_of` calls ``path``, ``None`` if its module does not have it."""
    module, _, name = path.rpartition(".")
    return getattr(import_module(module), name, None)


def without(cls: type, fused: type, stock: type, made: dict[type, type]) -> type:
    """The class ``cls``, which is ``fused`` or derived from it, with ``stock`` in the place of ``fused``.

    Args:
        made: the derived classes so far, so that modules of one class have one class afterwards.
    """
    if cls is fused:
        return stock
    if cls not in made:
        bases = tuple(without(base, fused, stock, made) if issubclass(base, fused) else base for base in cls.__bases__)
        body = {name: value for name, value in vars(cls).items() if name not in ("__dict__", "__weakref__")}
        made[cls] = type(cls)(cls.__name__.replace(fused.__name__, stock.__name__), bases, body)
    return made[cls]
