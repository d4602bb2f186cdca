"""timm: modules whose class is swapped for one that computes softmax attention with the kernels."""

from __future__ import annotations

import inspect

from torch import nn

from vitkernels.integrations.devices import conditions
from vitkernels.integrations.report import Entry, kind_of
from vitkernels.integrations.timm.families import LEFT, family_of, path_of
from vitkernels.integrations.timm.forward import Fused, dropout_of

__all__ = ["replace", "restore"]


def replace(model: nn.Module) -> list[Entry]:
    """Swap the class of every attention module of ``model`` that has an accelerated one.

    The state is the stock class's, so a change of ``__class__`` in either direction is all there is to do.
    """
    entries = []
    for name, module in model.named_modules():
        stock_class = _stock_class(module)
        fused = family_of(stock_class)
        reason = _obstacle(module, fused) if fused else LEFT.get(path_of(stock_class)) or _relation(stock_class)
        if reason:
            entries.append(Entry(name, kind_of(module), "stock", reason))
        elif fused:
            module.__class__ = fused
            reason = "; ".join(conditions(module, dropout_of(module)))
            entries.append(Entry(name, f"timm {stock_class.__name__}", "replaced", reason))
    return entries


def restore(model: nn.Module) -> None:
    """Give every accelerated module its stock class again."""
    for module in model.modules():
        if "stock_class" in vars(type(module)):
            module.__class__ = _stock_class(module)


def _stock_class(module: nn.Module) -> type[nn.Module]:
    """The class of ``module``, or the one that it had before the swap."""
    stock_class: type[nn.Module] = vars(type(module)).get("stock_class", type(module))
    return stock_class


def _relation(cls: type[nn.Module]) -> str:
    for base in cls.__mro__[1:]:
        if family_of(base) is not None:
            return f"a subclass of timm's {base.__name__} may compute something else"
    return ""


def _obstacle(module: nn.Module, fused: type[Fused]) -> str:
    """Why ``module``, whose class or stock class has ``fused`` for it, must keep timm's forward."""
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    stock_class = fused.stock_class
    missing = [name for name in fused.attributes if not hasattr(module, name)]
    if missing:
        return f"this version of timm's {stock_class.__name__} has no {', '.join(missing)}"
    theirs, ours = (list(inspect.signature(f).parameters) for f in (stock_class.forward, fused.attend))
    if theirs != ours:
        return f"this version of timm's {stock_class.__name__} takes {', '.join(theirs[1:])}"
    return fused.obstacle(module)
