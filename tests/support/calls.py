"""Calls as data: the keyword arguments of a function, some of them tensors or lists of tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

NAMESPACE = "vitkernels"
#: Operators that no sample calls, but tests of their own do.
WITHOUT_SAMPLES = {f"{NAMESPACE}::{name}" for name in ("bilevel_route", "blockdiag_butterfly_pack")}
Call = dict[str, Any]


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def tensors(call: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(call) if isinstance(t, Tensor)]


def learning(call: Any) -> list[Tensor]:
    return [t for t in tensors(call) if t.requires_grad]


def replace(call: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """The call with each tensor changed; differentiable tensors become new leaves."""
    return pytree.tree_map_only(Tensor, lambda t: change(t.detach()).detach().requires_grad_(t.requires_grad), call)


def in_float64(call: Any) -> Any:
    return replace(call, lambda t: t.double() if t.is_floating_point() else t)


def outputs_of(result: Any) -> list[Tensor]:
    return list(result) if isinstance(result, tuple | list) else [result]


def cotangent(output: Tensor) -> Tensor:
    """Numbers that are exact in every dtype."""
    generator = torch.Generator().manual_seed(output.numel())
    numbers = torch.randint(-128, 129, output.shape, generator=generator).to(output.dtype) / 64
    return numbers.to(output.device)


def differentiate(
    function: Callable[..., Any], call: Call, change: Callable[[Tensor], Tensor] = lambda t: t,
    cotangent: Callable[[Tensor], Tensor] = cotangent,
) -> tuple[list[Tensor], list[Tensor]]:  # fmt: skip
    """Outputs, and the gradient of every differentiable tensor; ``change`` is applied to the incoming gradients."""
    outputs, leaves = outputs_of(function(**call)), learning(call)
    connected = [o for o in outputs if o.requires_grad]  # without keys the reference's lse is a constant
    incoming = [change(cotangent(o)) for o in connected]
    grads = torch.autograd.grad(connected, leaves, incoming, materialize_grads=True) if leaves else []
    return [o.detach() for o in outputs], list(grads)


class Recorder(TorchDispatchMode):
    """Records the calls of our operators, with the arguments that reached them."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[torch._ops.OpOverload, tuple[Any, ...]]] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if op.namespace == NAMESPACE:
            self.calls.append((op, args))
        return op(*args, **(kwargs or {}))


#: Arguments of operators that refuse to learn.
WITHOUT_GRADIENT = {"decay"}


def is_backward(op: torch._ops.OpOverload) -> bool:
    return op._schema.name.endswith("_backward")


def operator_calls(function: Callable[..., Any], call: Call) -> list[tuple[torch._ops.OpOverload, tuple[Any, ...]]]:
    """The operators that forward and backward call, with differentiable arguments where the operator has a gradient."""

    def leaves(op: torch._ops.OpOverload, args: tuple[Any, ...]) -> tuple[Any, ...]:
        def leaf(name: str) -> Callable[[Tensor], Tensor]:
            learns = not is_backward(op) and name not in WITHOUT_GRADIENT
            return lambda t: t.detach().requires_grad_(t.is_floating_point() and learns)

        names = [a.name for a in op._schema.arguments]
        return tuple(pytree.tree_map_only(Tensor, leaf(n), a) for n, a in zip(names, args, strict=True))

    with Recorder() as recorder:
        differentiate(function, call)
    return [(op, leaves(op, args)) for op, args in recorder.calls]


def defined_operators() -> list[torch._C.FunctionSchema]:
    return [s for s in torch._C._jit_get_all_schemas() if s.name.startswith(f"{NAMESPACE}::")]
