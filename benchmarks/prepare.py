"""The timed call of a function of tensors: forward, or forward and backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from benchmarks.registry import Call, Inputs

__all__ = ["prepared"]


def prepared(
    function: Callable[..., Tensor], *, grad: bool, learns: Sequence[int] | None = None
) -> Callable[[Inputs], Call]:
    """Of the inputs ``data``; with ``grad``, also the gradients of those that learn (all of them), for ``grad_out``."""

    def prepare(inputs: Inputs) -> Call:
        data = inputs["data"]
        if not grad:
            return lambda: (function(*data),)
        places = range(len(data)) if learns is None else learns
        arguments = [t.detach().requires_grad_(i in places) for i, t in enumerate(data)]
        leaves = [arguments[i] for i in places]

        def call() -> tuple[Tensor, ...]:
            out = function(*arguments)
            return (out.detach(), *torch.autograd.grad(out, leaves, inputs["grad_out"]))

        return call

    return prepare
