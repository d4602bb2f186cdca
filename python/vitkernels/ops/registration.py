"""What PyTorch must know of an operator besides its kernels, by the names in its schema."""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from vitkernels._library import why_no_kernel
from vitkernels.ops.autocast import register_autocast
from vitkernels.ops.autograd import Call, Gradient, NoGradient, register_autograd
from vitkernels.ops.schema import GRAD, NEED, Arguments, Operator
from vitkernels.ops.vmap import register_vmap

__all__ = ["refusals", "register", "register_constant"]

#: By operator: what raises in place of kernels for CUDA.
refusals: dict[str, torch.library.Library] = {}

Results = Callable[[Arguments], Any]


def register(name: str, results: Results) -> Call:
    """Register an operator and its backward: fake, vmap, autograd and autocast. Returns what calls it.

    Args:
        name: of the forward operator.
        results: its results without their contents, from its arguments by name.
    """
    op, backward = Operator(name), Operator(f"{name}_backward")
    _register_fake(op, results)
    _register_fake(backward, _gradients_of(backward))
    cast = None if op.has_lists else register_autocast(op)
    call_backward = register_autograd(backward, NoGradient(backward))
    return register_autograd(op, Gradient(op, backward, call_backward), cast)


def register_constant(name: str, results: Results) -> Call:
    """Register an operator without a backward, whose results are integers: fake and vmap. Returns what calls it."""
    op = Operator(name)
    _register_fake(op, results)
    overload: Call = op.overload
    return overload


def _register_fake(op: Operator, results: Results) -> None:
    """The fake implementation, one for ``vmap``, and where a library lacks the kernel an error."""
    if reason := why_no_kernel(op.name, "cuda"):
        _refuse(op.name, reason)

    def fake(*args: Any) -> Any:
        leaves = zip(op.flat(op.leaves(args)), op.flat(args), strict=True)
        tensors = [(name, leaf) for name, leaf in leaves if isinstance(leaf, Tensor)]
        first, device = tensors[0][0], tensors[0][1].device
        for name, tensor in tensors:  # a fake implementation sees a mix of devices before a kernel does
            if tensor.device != device:
                raise RuntimeError(
                    f"vitkernels::{op.name}: {name} is on {tensor.device}, takes {first}'s device ({device})"
                )
        return results(op.named(args))

    torch.library.register_fake(f"vitkernels::{op.name}", fake)
    register_vmap(op)


def _gradients_of(backward: Operator) -> Results:
    def gradients(given: Arguments) -> Any:
        if backward.has_lists:
            lists = (given[name] for name, is_one in zip(backward.arguments, backward.is_list, strict=True) if is_one)
            return [t.new_empty(t.shape) for t in chain(*lists)]
        names = [name.removeprefix(GRAD) for name in backward.results]
        wanted = [given[name] if given.get(NEED + name, True) else None for name in names]
        like: Tensor = next(given[name] for name in ("lse", "query", "x") if name in given)  # of what was not requested
        return tuple(like.new_empty(0) if t is None else t.new_empty(t.shape) for t in wanted)

    return gradients


def _refuse(op: str, reason: str) -> None:
    # PyTorch's own message does not know the reason.
    def raise_without_kernel(*args: Any) -> None:
        raise RuntimeError(f"vitkernels::{op}: got CUDA tensors, takes tensors on the CPU: {reason}")

    refusals[op] = torch.library.Library("vitkernels", "IMPL")  # type: ignore[no-untyped-call]
    refusals[op].impl(op, raise_without_kernel, "CUDA")  # type: ignore[no-untyped-call]
