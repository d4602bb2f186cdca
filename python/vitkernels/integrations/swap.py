"""Modules whose class is swapped for one that computes softmax attention with the kernels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cached_property
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor, nn

from vitkernels.integrations.classes import class_at, exchange, exchanged, path_of
from vitkernels.integrations.devices import KERNEL_DTYPES, conditions
from vitkernels.integrations.exporters import check_exporter, refuse_script
from vitkernels.integrations.report import Entry, kind_of
from vitkernels.nn.hooks import has_hooks

__all__ = ["DROPOUT", "SOFTMAX", "Fused", "Swaps"]

#: Classes that `absorbed` names.
DROPOUT = ("torch.nn.modules.dropout.Dropout", "torch.nn.modules.linear.Identity")
SOFTMAX = ("torch.nn.modules.activation.Softmax",)


class Fused(nn.Module):
    """First base of an accelerated module's class; the other one is the library's.

    A subclass writes ``attend``: the library's forward, its arguments included, with the kernel inside.
    """

    #: The library's class.
    stock_class: ClassVar[type[nn.Module]]
    #: The name of its forward's first argument, the input.
    input_name: ClassVar[str]
    #: What ``attend`` reads of the module. The library may rename it, and then the module is left alone.
    attributes: ClassVar[tuple[str, ...]] = ()
    #: Modules inside whose work ``attend`` does, so that they are not called: their path, where there may be none, ->
    #: the classes that it can stand for. With another class, hooks or a forward of their own the stock path is taken.
    absorbed: ClassVar[Mapping[str, tuple[str, ...]]] = {"attn_drop": DROPOUT}
    #: ``absorbed`` with the names of which a path consists, and with the classes themselves.
    parts: ClassVar[tuple[tuple[tuple[str, ...], tuple[type, ...]], ...]]
    #: The operator that ``attend`` calls.
    operator: ClassVar[str] = "attention"
    #: The path of the dropout of the attention weights, which the kernel does not have: a module or a rate.
    dropout_attribute: ClassVar[str] = "attn_drop"
    #: When ``attend`` takes the stock path.
    condition: ClassVar[str] = ""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

        def attend(self, *args: Any, **kwargs: Any) -> Any: ...

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        check_exporter(self)
        x: Tensor = args[0] if args else kwargs[self.input_name]
        if (
            x.dtype not in KERNEL_DTYPES[self.operator].get(x.device.type, ())
            or (self.training and self.dropout_of(self) > 0.0)
            or not all(_may_be_passed_over(_part(self, names), classes) for names, classes in self.parts)
        ):
            return super().forward(*args, **kwargs)
        return self.attend(*args, **kwargs)

    __prepare_scriptable__ = refuse_script

    def stock(self, *args: Any, **kwargs: Any) -> Any:
        """The library's forward."""
        return super().forward(*args, **kwargs)

    @classmethod
    def dropout_of(cls, module: nn.Module) -> float:
        """The rate of ``dropout_attribute``, 0 if there is none."""
        dropout = _at(module, cls.dropout_attribute)
        rate = getattr(dropout, "p", dropout)
        return float(rate) if isinstance(rate, (int, float)) else 0.0

    @staticmethod
    def obstacle(module: nn.Module) -> str:
        """Why ``attend`` cannot stand for ``module``, or nothing."""
        return ""


class Swaps:
    """The accelerated classes of one library.

    The state is the stock class's, so a change of ``__class__`` in either direction is all there is to do.

    Args:
        module: where pickles look for the accelerated classes by name.
        fused: name of the accelerated class -> path of the library's class, and the forward that goes before it.
        left: path of a class of the library -> why it is left alone.
    """

    def __init__(
        self, module: str, fused: Mapping[str, tuple[str, type[Fused]]], left: Mapping[str, str] | None = None
    ) -> None:
        self.module, self.fused, self.left = module, fused, left or {}
        self._classes: dict[str, type[Fused]] = {}

    def replace(self, model: nn.Module) -> list[Entry]:
        """Swap the class of every attention module of ``model`` that has an accelerated one."""
        entries, made = [], dict[type, type]()
        for name, module in model.named_modules():
            accelerated = self._accelerated(module)
            fused = accelerated or self.family_of(type(module))
            reason = _obstacle(module, fused) if fused else self._reason(type(module))
            if reason:
                if accelerated:  # by an earlier call, before something was changed
                    module.__class__ = exchanged(type(module), accelerated, accelerated.stock_class, made)
                entries.append(Entry(name, kind_of(module), "stock", reason))
            elif fused:
                if not accelerated:
                    module.__class__ = fused
                found = conditions(module, fused.dropout_of(module), fused.operator)
                reasons = filter(None, [*found, fused.condition, _condition_of_parts(module, fused)])
                stock_class = fused.stock_class
                kind = f"{stock_class.__module__.partition('.')[0]} {stock_class.__name__}"
                entries.append(Entry(name, kind, "replaced", "; ".join(reasons), fused.operator))
        return entries

    def restore(self, model: nn.Module) -> None:
        """Give every accelerated module its stock class again."""
        self.suspend(model)

    def suspend(self, model: nn.Module) -> Callable[[], None]:
        """Restore ``model``. Returns what undoes that."""
        found = [(module, accelerated) for module in model.modules() if (accelerated := self._accelerated(module))]
        return exchange([(module, accelerated, accelerated.stock_class) for module, accelerated in found])

    def _accelerated(self, module: nn.Module) -> type[Fused] | None:
        """The accelerated class among those of ``module``."""
        return next((cls for cls in type(module).__mro__ if cls is self._classes.get(cls.__name__)), None)

    def family_of(self, stock_class: type) -> type[Fused] | None:
        """The accelerated class of one of the library's."""
        name = self._names.get(path_of(stock_class))
        return None if name is None else self.fused_class(name)

    def fused_class(self, name: str) -> type[Fused]:
        """The accelerated class called ``name``; made when it is needed, since the library may not have its base."""
        if name not in self._classes:
            path, forward = self.fused[name]
            module, _, stock = path.rpartition(".")
            stock_class = getattr(import_module(module), stock)
            input_name = list(inspect.signature(forward.attend).parameters)[1]
            parts = tuple(
                (tuple(path.split(".")), tuple(filter(None, map(class_at, classes))))
                for path, classes in forward.absorbed.items()
            )
            body = {"__module__": self.module, "stock_class": stock_class, "input_name": input_name, "parts": parts}
            self._classes.setdefault(name, type(name, (forward, stock_class), body))  # another thread may be faster
        return self._classes[name]

    def getattr(self, name: str) -> Any:
        """The ``__getattr__`` of ``module``, for pickles that name a class before it was needed."""
        if name in self.fused:
            return self.fused_class(name)
        raise AttributeError(f"module {self.module!r} has no attribute {name!r}")

    @cached_property
    def _names(self) -> dict[str, str]:
        return {path: name for name, (path, _) in self.fused.items()}

    def _reason(self, cls: type[nn.Module]) -> str:
        if path_of(cls) in self.left:
            return self.left[path_of(cls)]
        for base in cls.__mro__[1:]:
            if self.family_of(base) is not None:
                return f"a subclass of {_owner(base)} may compute something else"
        return ""


def _at(module: nn.Module, path: str) -> Any:
    """What lies at ``path`` in ``module``, ``None`` if there is nothing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _part(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    """The module at a path in ``module``, if there is one. Every forward asks, so this is faster than ``getattr``."""
    for name in names:
        inner = module._modules.get(name)
        if inner is None:
            return None
        module = inner
    return module


def _has(module: nn.Module, path: str) -> bool:
    parent, _, name = path.rpartition(".")
    return hasattr(_at(module, parent) if parent else module, name)


def _may_be_passed_over(module: nn.Module | None, classes: tuple[type, ...]) -> bool:
    """Whether nobody would notice that an absorbed ``module`` is not called."""
    return module is None or (type(module) in classes and "forward" not in module.__dict__ and not has_hooks(module))


def _condition_of_parts(module: nn.Module, fused: type[Fused]) -> str:
    """When hooks lead to the stock path, as far as the absorbed modules of ``module`` exist."""
    found = {".".join(names): part for names, _ in fused.parts if (part := _part(module, names)) is not None}
    if hooked := [path for path, part in found.items() if has_hooks(part)]:
        return f"stock path now: hooks on {_joined(hooked)}"
    return f"stock path with hooks on {_joined([*found])}" if found else ""


def _joined(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _owner(cls: type) -> str:
    library = cls.__module__.partition(".")[0]
    return f"{library}'{'' if library.endswith('s') else 's'} {cls.__name__}"


def _obstacle(module: nn.Module, fused: type[Fused]) -> str:
    """Why ``module``, whose class or stock class has ``fused`` for it, must keep the library's forward."""
    if "forward" in module.__dict__:
        return "its forward is overridden on the instance"
    stock_class = fused.stock_class
    for names, classes in fused.parts:
        path, found = ".".join(names), _part(module, names)
        if found is None:
            continue
        if type(found) not in classes:
            return f"its {path} is a {type(found).__name__}, which may compute something else"
        if "forward" in found.__dict__:
            return f"the forward of its {path} is overridden on the instance"
    missing = [path for path in fused.attributes if not _has(module, path)]
    if missing:
        return f"this version of {_owner(stock_class)} has no {', '.join(missing)}"
    theirs, ours = (list(inspect.signature(f).parameters) for f in (stock_class.forward, fused.attend))
    if theirs != ours:
        return f"this version of {_owner(stock_class)} takes {', '.join(theirs[1:])}"
    return fused.obstacle(module)
