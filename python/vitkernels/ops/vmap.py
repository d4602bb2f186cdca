"""Calls under ``torch.func.vmap``, and under the older vmap of ``is_grads_batched``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from vitkernels._torch_private import batch_level, has_batch_levels, with_batch, without_batch
from vitkernels.ops.schema import GRAD, NEED, Operator

__all__ = ["batching_rule", "register_vmap"]

Rule = Callable[..., tuple[Any, Any]]

_library = torch.library.Library("vitkernels", "IMPL")  # type: ignore[no-untyped-call]

#: Arguments whose first axis is the batch; terms that broadcast to one, and their rank with it.
_BATCHES = (
    "x",
    "query",
    "key",
    "value",
    "value_q",
    "region_graph",
    "key_index",
    "key_count",
    "out",
    "lse",
    "state",
    "inner",
    "outs",
    "lses",
    "grad_out",
    "grad_lse",
    "grad_state",
    "initial_state",
)
_RANKS = {"bias": 4, "multiplier": 4, "key_bias": 3, "query_weight": 3}


def register_vmap(op: Operator) -> None:
    """Register the batching rule of ``op`` for both."""
    torch.library.register_vmap(f"vitkernels::{op.name}", batching_rule(op, op.overload))
    if has_batch_levels:
        _library.impl(op.name, _of_batched_tensors(op), "Batched")  # type: ignore[no-untyped-call]


def _of_batched_tensors(op: Operator) -> Callable[..., Any]:
    """``op`` for tensors of the older vmap, by the same rule."""
    rule = batching_rule(op, lambda *flat: op.overload(*op.grouped(flat)))

    def call(*args: Any) -> Any:
        flat = op.flat(args)
        levels = [batch_level(a) if isinstance(a, Tensor) else 0 for a in flat]
        level = max(levels)
        dims = tuple(0 if each == level else None for each in levels)
        flat = [a if dim is None else without_batch(a, level) for a, dim in zip(flat, dims, strict=True)]
        info = SimpleNamespace(batch_size=flat[dims.index(0)].size(0))
        found, found_dims = rule(info, dims, *flat)
        if isinstance(found, Tensor):
            return with_batch(found, found_dims, level)
        each = zip(found, found_dims, strict=True)
        return type(found)(t if dim is None else with_batch(t, dim, level) for t, dim in each)

    return call


def batching_rule(op: Operator, call: Callable[..., Any]) -> Rule:
    """A rule for ``vmap``: one call whose batch is that of all elements, or where terms differ a call for each.

    ``call`` may take lists of tensors flat (:meth:`Operator.flat`).
    """

    def batched(info: Any, dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
        if info.batch_size == 0:
            raise RuntimeError(f"vitkernels::{op.name}: vmap has no elements, takes one or more")
        names = op.arguments if len(args) == len(op.arguments) else ["outs"] * len(args)
        if _has_one_batch(names, dims, args):
            found = call(*(_folded(*each, info.batch_size) for each in zip(names, args, dims, strict=True)))
            return _apart(op, found, info.batch_size)
        calls = [
            call(*(_element(a, dim, i) for a, dim in zip(args, dims, strict=True))) for i in range(info.batch_size)
        ]
        if isinstance(calls[0], Tensor):
            return torch.stack(calls), 0
        results = [torch.stack(each) for each in zip(*calls, strict=True)]
        as_returned = type(calls[0])
        return as_returned(results), as_returned([0] * len(results))

    return batched


def _has_one_batch(names: Sequence[str], dims: Sequence[Any], args: Sequence[Any]) -> bool:
    """Whether the elements differ in arguments with a batch alone, and so do the gradients that are requested."""
    for name, arg, dim in zip(names, args, dims, strict=True):
        if name == "cu_seqlens_q" or (name.startswith(NEED) and arg):
            return False
        if not isinstance(arg, Tensor) or name in _BATCHES:
            continue
        if dim is not None or (arg.dim() >= _RANKS.get(name, arg.dim() + 1) and arg.size(0) != 1):
            return False
    return True


def _folded(name: str, arg: Any, dim: Any, count: int) -> Any:
    if name not in _BATCHES or not isinstance(arg, (Tensor, list, tuple)):
        return arg
    if not isinstance(arg, Tensor):
        each = zip(arg, dim if isinstance(dim, (list, tuple)) else [dim] * len(arg), strict=True)
        return [_folded(name, a, d, count) for a, d in each]
    arg = arg.expand(count, *arg.shape) if dim is None else arg.movedim(dim, 0)
    return arg.reshape(count * arg.size(1), *arg.shape[2:])  # the older vmap has no rule for flatten


def _apart(op: Operator, found: Any, count: int) -> tuple[Any, Any]:
    """The results of all elements in one, as those of each along a new first axis."""
    if isinstance(found, Tensor):
        return found.reshape(count, found.size(0) // count, *found.shape[1:]), 0
    absent = [NEED + name.removeprefix(GRAD) in op.arguments for name in op.results]
    if len(absent) != len(found):  # a list
        absent = [False] * len(found)
    results = [(t, None) if no else _apart(op, t, count) for t, no in zip(found, absent, strict=True)]
    as_returned = type(found)
    return as_returned(t for t, _ in results), as_returned(dim for _, dim in results)


def _element(argument: Any, dim: Any, i: int) -> Any:
    if isinstance(dim, (list, tuple)):
        return [_element(a, d, i) for a, d in zip(argument, dim, strict=True)]
    return argument if dim is None else argument.select(dim, i)
