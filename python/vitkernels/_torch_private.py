"""What this package uses of PyTorch's private interfaces.

Each is looked up once, here. A PyTorch that lacks one gives the same results by the ordinary path, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = [
    "below_autograd",
    "entry_of",
    "has_kernel",
    "is_tracing",
    "is_transformed",
    "mark_constant",
    "schema_of",
    "sizes_are_tensors",
    "without_autocast",
]

#: A call inside skips the autograd part of an operator. Without it, that part runs and finds nothing to record.
below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)

#: Whether ``torch.jit.trace`` is at work; the public function asks the same in more steps.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]


def sizes_are_tensors() -> bool:
    """Whether sizes of tensors are tensors themselves, as ``torch.jit.trace`` has them."""
    return not torch.compiler.is_compiling() and is_tracing()


def schema_of(overload: Any) -> Any:
    """The names and types of an operator's arguments and results."""
    return overload._schema if hasattr(overload, "_schema") else torch._C._get_schema(overload.name(), "")


def entry_of(overload: Any) -> Callable[..., Any]:
    """``overload`` without the step in Python that passes its arguments on."""
    entry: Callable[..., Any] = getattr(overload, "_op", overload)
    return entry


def _is_transformed() -> bool:
    return forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()


#: Whether a transform of ``torch.func``, or forward-mode differentiation, may be at work. If that cannot be asked, it
#: always may: every call is then made the way that suits them as well.
is_transformed: Callable[[], bool] = (
    _is_transformed
    if hasattr(forward_ad, "_current_level") and hasattr(torch._C, "_are_functorch_transforms_active")
    else lambda: True
)

if all(hasattr(torch._C, name) for name in ("_ExcludeDispatchKeyGuard", "DispatchKeySet", "DispatchKey")):
    _AUTOCAST_KEYS = {
        device: torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, f"Autocast{device.upper()}"))
        for device in ("cpu", "cuda")
    }
    _exclude = torch._C._ExcludeDispatchKeyGuard

    def without_autocast(device: str) -> AbstractContextManager[Any]:
        """A call inside skips the autocast part of an operator on ``device``."""
        guard: AbstractContextManager[Any] = _exclude(_AUTOCAST_KEYS[device])
        return guard

else:

    def without_autocast(device: str) -> AbstractContextManager[Any]:
        """A call inside sees autocast switched off on ``device``."""
        return torch.autocast(device, enabled=False)


if hasattr(torch._C, "_dispatch_has_kernel_for_dispatch_key"):
    has_kernel: Callable[[str, str], bool] = torch._C._dispatch_has_kernel_for_dispatch_key
else:

    def has_kernel(op: str, key: str) -> bool:
        """Without an answer, take it that there is one: PyTorch then words the error of a kernel that is missing."""
        return True


def mark_constant(function: Callable[[], bool]) -> Callable[[], bool]:
    """``torch.compiler.assume_constant_result``, which imports the compiler only to set this attribute.

    Where it has lost its meaning, the compiler breaks its graph at a call.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
