"""Modules that call torch's ``scaled_dot_product_attention`` on their own."""

from __future__ import annotations

import dis
import inspect
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from torch import nn

__all__ = ["CALLS_SDPA", "calls_sdpa"]

CALLS_SDPA = (
    "calls scaled_dot_product_attention, whose place vitkernels.compat.scaled_dot_product_attention takes in one line"
)

_SDPA = nn.functional.scaled_dot_product_attention
# Nobody would change a line in these.
_LIBRARIES = ("builtins", "timm", "torch", "torchvision", "transformers")


def calls_sdpa(cls: type[nn.Module]) -> bool:
    """Whether a method of ``cls``, or a function that a method names, reads torch's function.

    It is found by identity, so that an alias counts, and a function of the same name that is not torch's does not.
    Methods inherited from a library do not count.
    """
    bases = [base for base in cls.__mro__ if base.__module__.partition(".")[0] not in _LIBRARIES]
    attributes = {name: value for base in reversed(bases) for name, value in vars(base).items()}
    methods = [inspect.unwrap(value) for value in attributes.values() if inspect.isfunction(value)]
    read = [value for method in methods for value in _globals_read(method)]
    helpers = {value for value in read if inspect.isfunction(value)}
    return any(value is _SDPA for value in read) or any(
        value is _SDPA for helper in helpers for value in _globals_read(helper)
    )


def _globals_read(function: Callable[..., Any]) -> Iterator[Any]:
    """The objects that ``function`` finds by a global name, or by attributes of a module with one."""
    found: Any = None
    for instruction in dis.get_instructions(function):
        if instruction.opname == "LOAD_GLOBAL":
            found = function.__globals__.get(instruction.argval)
        elif instruction.opname in ("LOAD_ATTR", "LOAD_METHOD") and isinstance(found, ModuleType):
            found = getattr(found, instruction.argval, None)
        else:
            found = None
        if found is not None:
            yield found
