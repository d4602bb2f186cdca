"""The parts of a registration that all operators share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from vitkernels._library import why_no_kernel

_library = torch.library.Library("vitkernels", "IMPL")  # type: ignore[no-untyped-call]
#: By operator: what raises in place of kernels for CUDA.
refusals: dict[str, torch.library.Library] = {}

_AUTOCAST_KEYS = {"cpu": "AutocastCPU", "cuda": "AutocastCUDA"}


def register_autocast(op: str, data: Sequence[str]) -> None:
    """Under autocast, cast the arguments of ``op`` that ``data`` names to the autocast dtype, and nothing else.

    ``torch.library.register_autocast`` casts every floating tensor: lse, biases and scales would lose bits.
    """
    overload = getattr(torch.ops.vitkernels, op).default
    is_data = [a.name in data for a in overload._schema.arguments]
    for device, key in _AUTOCAST_KEYS.items():

        def call(*args: Any, device: str = device, key: str = key) -> Any:
            dtype = torch.get_autocast_dtype(device)
            cast = [a.to(dtype) if mine and _castable(a) else a for a, mine in zip(args, is_data, strict=True)]
            with torch._C._ExcludeDispatchKeyGuard(torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, key))):
                return overload(*cast)

        _library.impl(op, call, key)  # type: ignore[no-untyped-call]


def _castable(argument: object) -> bool:
    # As torch's own autocast does: float64 stays as it is.
    return isinstance(argument, Tensor) and argument.is_floating_point() and argument.dtype != torch.float64


def direct(op: str) -> Callable[..., Any]:
    """``torch.ops.vitkernels.<op>``, with less work in Python than what ``torch.library`` does around a small call.

    Where no gradient is recorded, its autograd part is left out; where one is, a function of our own records the same,
    which the transforms of ``torch.func`` take as well.
    """
    overload = getattr(torch.ops.vitkernels, op).default

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling() or torch._C._is_tracing():
            return overload(*args)
        if not (torch.is_grad_enabled() and any(isinstance(a, Tensor) and a.requires_grad for a in args)):
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*args)
        if op not in _recorded or torch._C._is_any_autocast_enabled():  # autocast comes before autograd
            return overload(*args)
        plain, transformed = _recorded[op]
        function = transformed if torch._C._are_functorch_transforms_active() else plain
        return function.apply(*args)  # type: ignore[no-untyped-call]

    return call


#: By operator: its gradient as a function, and as one for the transforms of ``torch.func``, which takes longer.
_recorded: dict[str, tuple[type[torch.autograd.Function], type[torch.autograd.Function]]] = {}


def _record(op: str, backward: Callable[..., Any], setup_context: Callable[..., Any]) -> None:
    overload = getattr(torch.ops.vitkernels, op).default

    def transformed(*args: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return overload(*args)

    def plain(ctx: Any, *args: Any) -> Any:
        output = transformed(*args)
        setup_context(ctx, args, output)
        return output

    def function(**methods: Callable[..., Any]) -> type[torch.autograd.Function]:
        members = {name: staticmethod(method) for name, method in methods.items()}
        return type(op, (torch.autograd.Function,), members | {"generate_vmap_rule": True})

    _recorded[op] = (
        function(forward=plain, backward=backward),
        function(forward=transformed, setup_context=setup_context, backward=backward),
    )


def register_no_double_backward(op: str) -> None:
    """Make the gradient of the backward operator ``op`` an error instead of a silent zero."""

    def raise_on_double_backward(ctx: Any, *grads: Any) -> None:
        raise RuntimeError(f"vitkernels::{op}: second derivatives are not implemented")

    torch.library.register_autograd(f"vitkernels::{op}", raise_on_double_backward)
    _record(op, raise_on_double_backward, lambda ctx, inputs, output: None)


def _tangent(t: Tensor) -> Tensor | None:
    tangent: Tensor | None = forward_ad.unpack_dual(t).tangent  # type: ignore[no-untyped-call]
    return tangent


def refuse_forward_mode(op: str, *tensors: Tensor | None) -> None:
    """Raise where a tensor carries a forward-mode tangent: it would be dropped, which looks like a zero derivative."""
    if torch.compiler.is_compiling() or forward_ad._current_level < 0:
        return
    if any(t is not None and _tangent(t) is not None for t in tensors):
        raise RuntimeError(f"vitkernels::{op}: forward-mode derivatives are not implemented")


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps, biases and scales that go with tensors of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all tensors are on the first one's device: a fake implementation sees a mix before a kernel does."""
    first: tuple[str, torch.device] | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if first is None:
            first = name, tensor.device
        elif tensor.device != first[1]:
            raise RuntimeError(
                f"vitkernels::{op}: {name} is on {tensor.device}, takes {first[0]}'s device ({first[1]})"
            )


def _refuse(op: str, reason: str) -> None:
    # PyTorch's own message does not know the reason.
    def raise_without_kernel(*args: Any) -> None:
        raise RuntimeError(f"vitkernels::{op}: got CUDA tensors, takes tensors on the CPU: {reason}")

    refusals[op] = torch.library.Library("vitkernels", "IMPL")  # type: ignore[no-untyped-call]
    refusals[op].impl(op, raise_without_kernel, "CUDA")  # type: ignore[no-untyped-call]


def register(
    op: str,
    *,
    fake: Callable[..., Any],
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Register for ``op`` the fake implementation, the gradient if it has one, and an error where it has no kernel."""
    reason = why_no_kernel(op, "cuda")
    if reason is not None:
        _refuse(op, reason)
    torch.library.register_fake(f"vitkernels::{op}", fake)
    if backward is not None:
        torch.library.register_autograd(f"vitkernels::{op}", backward, setup_context=setup_context)
        if setup_context is not None:
            _record(op, backward, setup_context)
