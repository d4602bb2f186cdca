"""Checks of arguments that no operator sees, in the words of the function that was called."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vitkernels._torch_private import has_dispatch_modes, is_transformed, sizes_are_tensors
from vitkernels.ops.attention import SCORE_DTYPES, statistics_dtype

__all__ = [
    "check_flag",
    "check_floating",
    "check_maps",
    "check_rank",
    "check_stored",
    "check_tensors",
    "converted",
    "held_in_trace",
    "in_statistics_dtype",
    "integers",
    "is_readable",
    "map_of",
    "number",
    "whole_number",
    "why_not_stored",
]

_ADDED = ("bias", "key_bias", "bias_table", "rpb")
_MULTIPLIED = ("multiplier", "multiplier_table", "query_weight")
_LAYOUTS = {
    1: "4 dimensions (B, length, heads, d)",
    2: "5 dimensions (B, height, width, heads, d)",
    3: "6 dimensions (B, depth, height, width, heads, d)",
}


def check_tensors(op: str, **arguments: object) -> None:
    """Raise unless all ``arguments`` are strided tensors."""
    for name, t in arguments.items():
        if not isinstance(t, Tensor):
            what = "None" if t is None else f"a {type(t).__name__}"
            raise RuntimeError(f"vitkernels::{op}: {name} is {what}, takes a tensor")
        if t.is_nested or t.is_quantized or t.layout != torch.strided:
            what = "nested" if t.is_nested else "quantized" if t.is_quantized else str(t.layout)
            raise RuntimeError(f"vitkernels::{op}: {name} is a {what} tensor, takes a strided one")


def check_rank(op: str, **data: Tensor) -> None:
    """Raise unless all are ``(B, tokens, heads, d)``, what compilers and tensors without data do not ask."""
    for name, t in data.items():
        if t.dim() != 4:
            n = "Nq" if name == "query" else "Nk"
            layout = f"(B, {n}, {'heads' if name == 'query' else 'kv_heads'}, {'dv' if name == 'value' else 'd'})"
            raise RuntimeError(f"vitkernels::{op}: {name} has shape {tuple(t.shape)}, takes 4 dimensions {layout}")


def is_readable(t: Tensor) -> bool:
    """Whether a check may read ``t`` or its storage: nothing is traced or transformed, and no GPU is waited for."""
    is_plain = type(t) in (Tensor, torch.nn.Parameter) and t.device.type == "cpu"
    return is_plain and not (
        torch.compiler.is_compiling() or sizes_are_tensors() or is_transformed() or has_dispatch_modes()
    )


def why_not_stored(name: str, t: Tensor) -> str | None:
    """What to say of a tensor whose storage was made too small for it."""
    if not is_readable(t) or t.numel() == 0:
        return None
    count = t.numel()
    if not t.is_contiguous():
        count = 1 + sum((size - 1) * stride for size, stride in zip(t.shape, t.stride(), strict=True))
    stored, needed = t.untyped_storage().nbytes(), (t.storage_offset() + count) * t.element_size()
    if stored >= needed:
        return None
    return f"{name} of shape {tuple(t.shape)} has a storage of {stored} bytes, takes {needed}: it was resized"


def check_stored(op: str, **arguments: Tensor) -> None:
    """Raise unless tensors that PyTorch rearranges before the operator sees them have their memory."""
    for name, t in arguments.items():
        if why := why_not_stored(name, t):
            raise RuntimeError(f"vitkernels::{op}: {why}")


def check_floating(op: str, name: str, term: Tensor) -> None:
    """Raise unless ``term`` has a dtype of ours: a boolean mask would be taken for zeros and ones."""
    if term.dtype in SCORE_DTYPES:
        return
    remedy = ""
    if term.dtype == torch.bool and name in _ADDED:
        remedy = f" ({name}=torch.where({name}, 0.0, -torch.inf))"
    elif term.dtype == torch.bool and name in _MULTIPLIED:
        remedy = f" ({name}={name}.float())"
    raise RuntimeError(f"vitkernels::{op}: {name} is {term.dtype}, takes a floating dtype{remedy}")


def converted(op: str, name: str, term: Tensor, dtype: torch.dtype) -> Tensor:
    """``term`` in ``dtype``. Raises on numbers that it does not hold, where they can be looked at.

    A large negative number that is added to logits removes a key: it may become minus infinity.
    """
    check_floating(op, name, term)
    if term.dtype == dtype or dtype not in SCORE_DTYPES:  # the operator refuses that of its query
        return term
    check_stored(op, **{name: term})
    result, largest = term.to(dtype), torch.finfo(dtype).max
    if torch.finfo(term.dtype).max > largest and is_readable(term):
        term, is_lost = term.detach(), result.detach().isinf() & ~term.detach().isinf()
        lost = term[is_lost & (term > 0) if name in _ADDED else is_lost]
        if lost.numel() > 0:
            takes = f"numbers that {dtype} holds (to {largest:.4g})"
            raise RuntimeError(f"vitkernels::{op}: {name} has {float(lost[0]):.4g}, takes {takes}")
    return result


def in_statistics_dtype(op: str, query: Tensor, name: str, term: Tensor) -> Tensor:
    """A term of the score in the dtype that goes with ``query``."""
    return converted(op, name, term, statistics_dtype(query.dtype))


def check_flag(op: str, name: str, option: object) -> None:
    if not isinstance(option, (bool, torch.SymBool)):
        raise RuntimeError(f"vitkernels::{op}: {name} is {option!r}, takes True or False")


def number(op: str, name: str, value: Any, dtype: torch.dtype) -> float:
    """``value`` as what a kernel reads in ``dtype``."""
    try:
        as_float = None if isinstance(value, str) else float(value)
    except (OverflowError, TypeError, ValueError):
        as_float = None
    if as_float is None:
        raise RuntimeError(f"vitkernels::{op}: {name} is {value!r}, takes a number")
    if not abs(as_float) <= torch.finfo(dtype).max:
        raise RuntimeError(f"vitkernels::{op}: {name} is {as_float}, takes a finite number in {dtype}")
    return as_float


def whole_number(op: str, name: str, value: Any) -> Any:
    """``value`` as the operator takes a size, which checks its range: an ``int`` or ``SymInt``."""
    if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
        return value  # the compiler would take a number that is looked at for a constant
    try:
        is_flag = isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype == torch.bool)
        index = None if is_flag else operator.index(value)
    except TypeError:
        index = None
    if index is None:
        raise RuntimeError(f"vitkernels::{op}: {name} is {value!r}, takes an integer")
    return index


def integers(op: str, name: str, option: Any, num_axes: int, at_least: int = 1) -> list[int]:
    """``option`` for each axis of the map: one value stands for all."""
    if type(option) is int and option >= at_least:
        return [option] * num_axes
    values = list(option) if isinstance(option, (list, tuple)) else [option] * num_axes
    if len(values) != num_axes:
        raise RuntimeError(
            f"vitkernels::{op}: {name} is {option!r}, takes one value or one for each of {num_axes} axes"
        )
    if sizes_are_tensors():
        values = [int(n) if isinstance(n, Tensor) else n for n in values]
    for n in values:
        if not isinstance(n, (int, torch.SymInt)) or isinstance(n, bool) or n < at_least:
            raise RuntimeError(f"vitkernels::{op}: {name} is {n!r}, takes an integer from {at_least} on")
    return values


def held_in_trace(op: str, t: Tensor, **options: Any) -> Tensor:
    """``t``, which in a trace raises where an option is not what it was when the trace was made.

    A trace has tensors for what is computed from sizes, but the options of a pattern are constants in it.
    """
    if not sizes_are_tensors():
        return t
    for name, option in options.items():
        for n in option if isinstance(option, (list, tuple)) else (option,):
            if isinstance(n, Tensor) and n.numel() == 1:
                text = f"vitkernels::{op}: {name} is not {int(n)}, as it was where this was traced"
                start = torch.zeros((), dtype=torch.long)
                start = torch.ops.aten._functional_assert_async.msg(n == int(n), text, start)
                t = t.narrow(0, start, t.size(0))  # a trace keeps what its result depends on
    return t


def map_of(t: Tensor) -> Sequence[int]:
    """The sizes of the map of ``(B, *map, heads, d)``, as numbers also where a trace has tensors for them."""
    sizes = t.shape[1:-2]
    return torch.Size(int(n) for n in sizes) if sizes_are_tensors() else sizes


def check_maps(
    op: str, query: Tensor, key: Tensor, value: Tensor, num_axes: int | None = None, is_same: bool = True
) -> tuple[Sequence[int], Sequence[int]]:
    """The maps of ``query`` and ``key``. Raises unless all have ``num_axes``, and ``is_same``: the same sizes."""
    check_tensors(op, query=query, key=key, value=value)
    if num_axes is None:
        num_axes = query.dim() - 3
    if num_axes not in _LAYOUTS or not query.dim() == key.dim() == value.dim() == num_axes + 3:
        _refuse_ranks(op, num_axes, query=query, key=key, value=value)
    query_map, key_map = map_of(query), map_of(key)
    wrong = "query" if is_same and query_map != key_map else "value" if map_of(value) != key_map else ""
    if wrong:
        shape = tuple((query if wrong == "query" else value).shape)
        raise RuntimeError(f"vitkernels::{op}: {wrong} has shape {shape}, takes key's map {tuple(key_map)}")
    return query_map, key_map


def _refuse_ranks(op: str, num_axes: int, **data: Tensor) -> None:
    for name, t in data.items():
        if num_axes not in _LAYOUTS:
            layout = "4 to 6 dimensions (B, one to three axes, heads, d)"
        elif t.dim() != num_axes + 3:
            layout = _LAYOUTS[num_axes] + ("" if name == "query" else ", as query")
        else:
            continue
        raise RuntimeError(f"vitkernels::{op}: {name} has shape {tuple(t.shape)}, takes {layout}")
