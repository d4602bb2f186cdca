"""Calls under ``torch.func.vmap``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["one_by_one"]


def one_by_one(op: str, call: Callable[..., Any]) -> Callable[..., Any]:
    """A rule for ``vmap``: ``call`` for each element of the batch, the results of all in one tensor."""

    def element(argument: Any, dim: Any, i: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [element(a, d, i) for a, d in zip(argument, dim, strict=True)]
        return argument if dim is None else argument.select(dim, i)

    def batched(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise RuntimeError(f"vitkernels::{op}: vmap has no elements, takes one or more")
        calls = [call(*(element(a, dim, i) for a, dim in zip(args, dims, strict=True))) for i in range(info.batch_size)]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = [torch.stack(each) for each in zip(*calls, strict=True)]
        as_returned = type(calls[0])
        return as_returned(results), as_returned([0] * len(results))

    return batched
