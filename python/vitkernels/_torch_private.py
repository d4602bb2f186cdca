"""What this package uses of PyTorch's private interfaces.

Each is looked up once, here. A PyTorch that lacks one gives the same results by the ordinary path, which is slower.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

__all__ = [
    "apply_at_one_level",
    "batch_level",
    "below_autograd",
    "entry_of",
    "has_batch_levels",
    "has_below_autograd",
    "has_dispatch_mode",
    "has_dispatch_modes",
    "has_kernel",
    "is_batching",
    "is_tracing",
    "is_transformed",
    "mark_constant",
    "schema_of",
    "sizes_are_tensors",
    "surely",
    "with_batch",
    "without_autocast",
    "without_batch",
]

#: A call inside skips the autograd part of an operator. Without it, that part runs and finds nothing to record.
below_autograd: Callable[[], AbstractContextManager[Any]] = getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)
has_below_autograd = below_autograd is not nullcontext

#: Whether ``torch.jit.trace`` is at work; the public function asks the same in more steps.
is_tracing: Callable[[], bool] = getattr(torch._C, "_is_tracing", torch.jit.is_tracing)  # type: ignore[attr-defined]


def has_dispatch_mode() -> bool:
    """Whether something sees each operator that is called, such as a mode whose tensors have no data."""
    return torch._C._len_torch_dispatch_stack() > 0


def sizes_are_tensors() -> bool:
    """Whether sizes of tensors are tensors themselves, as ``torch.jit.trace`` has them."""
    return not torch.compiler.is_compiling() and is_tracing()


def surely(condition: Any) -> bool:
    """Whether a comparison of sizes holds for all that they may be; no guard where sizes are symbols."""
    if sizes_are_tensors():
        return False
    if isinstance(condition, bool) and not torch.compiler.is_compiling():
        return condition
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # not at once: it loads sympy

    return bool(statically_known_true(condition))


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


#: Whether PyTorch's operators are watched or replaced: by a tracer, by tensors without data.
_count_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def has_dispatch_modes() -> bool:
    return _count_modes() > 0


def apply_at_one_level(function: Any) -> Callable[..., Any]:
    """``function.apply`` for a kernel of an operator, which the dispatcher calls once for each transform at work.

    Without the private part, ``torch.func`` takes functions of this package, but not the operators themselves.
    """
    functorch = getattr(torch._C, "_functorch", None)
    allowed = getattr(functorch, "get_single_level_autograd_function_allowed", None)
    allow = getattr(functorch, "set_single_level_autograd_function_allowed", None)
    if allowed is None or allow is None:
        apply: Callable[..., Any] = function.apply
        return apply
    apply_once = super(torch.autograd.Function, function).apply

    def call(*args: Any) -> Any:
        before = allowed()
        allow(True)
        try:
            return apply_once(*args)
        finally:
            allow(before)

    return call


#: Whether calls under ``is_grads_batched`` can be taken apart. Its vmap is an older one, which does not know the rules
#: of ``torch.library``: without them it loops, and it cannot over operators that take lists.
has_batch_levels: bool = all(hasattr(torch, name) for name in ("_add_batch_dim", "_remove_batch_dim")) and all(
    hasattr(torch._C, name)
    for name in ("_dispatch_keys", "_dispatch_tls_is_dispatch_key_included", "_parse_dispatch_key")
)
if has_batch_levels:
    _BATCHED: Any = torch._C._parse_dispatch_key("Batched")
    _BATCHING: Any = torch._C._parse_dispatch_key("VmapMode")


def is_batching() -> bool:
    """Whether that vmap is at work."""
    return has_batch_levels and torch._C._dispatch_tls_is_dispatch_key_included(_BATCHING)


def batch_level(tensor: Tensor) -> int:
    """The innermost level at which ``tensor`` has a batch, 0 if at none."""
    level = 0
    while torch._C._dispatch_keys(tensor).has(_BATCHED):
        level += 1
        tensor = without_batch(tensor, level)
    return level


def without_batch(tensor: Tensor, level: int) -> Tensor:
    """``tensor`` with its batch at ``level`` as its first axis, an axis of one if it has none there."""
    return torch._remove_batch_dim(tensor, level, 1, 0)


def with_batch(tensor: Tensor, dim: int, level: int) -> Tensor:
    """``tensor`` whose axis ``dim`` becomes its batch at ``level``."""
    return torch._add_batch_dim(tensor, dim, level)


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
