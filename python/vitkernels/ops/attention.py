"""Registration of ``vitkernels::attention``, ``attention_varlen`` and ``spatial_attention``.

Everything here goes by the names of the arguments in csrc/schema.cpp. A backward operator takes what the forward
takes, what it returned, and a ``need_*`` for every gradient of a score term.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vitkernels.ops.registration import (
    check_same_device,
    direct,
    register,
    register_autocast,
    register_no_double_backward,
    statistics_dtype,
)

__all__ = [
    "allow_tf32",
    "attention",
    "attention_varlen",
    "check_floating",
    "in_statistics_dtype",
    "score_arguments",
    "spatial_attention",
]

attention = direct("attention")
attention_varlen = direct("attention_varlen")
spatial_attention = direct("spatial_attention")

_SCORE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_DATA = ("query", "key", "value")
_NEED = "need_"


def in_statistics_dtype(op: str, query: Tensor, terms: Mapping[str, Tensor | None]) -> list[Tensor | None]:
    """Terms of the score in the dtype that goes with ``query``."""
    dtype = statistics_dtype(query.dtype)
    for name, term in terms.items():
        if term is not None:
            check_floating(op, name, term)
    return [None if term is None else term.to(dtype) for term in terms.values()]


def check_floating(op: str, name: str, term: Tensor) -> None:
    """Raise unless ``term`` has a dtype of ours: a boolean mask would be taken for zeros and ones."""
    if term.dtype not in _SCORE_DTYPES:
        raise RuntimeError(f"vitkernels::{op}: {name} is {term.dtype}, takes a floating dtype")


def allow_tf32(query: Tensor) -> bool:
    """Whether matrix products of ``query`` may round their operands to TF32."""
    return query.dtype == torch.float32 and _matmul_takes_tf32()


# Dynamo cannot trace the call, but compiles anew when its answer changes: a guard of its own covers the setting.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _matmul_takes_tf32() -> bool:
    try:
        return torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # where the precision was set by backend, torch refuses to give it without one
        return bool(torch.backends.cuda.matmul.fp32_precision == "tf32")


def score_arguments(
    op: str,
    query: Tensor,
    scale: float | Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    multiplier: Tensor | None,
) -> tuple[float, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The score part of the operator's arguments, in the kernel's statistics dtype."""
    number, head_scale = 1.0, None
    if isinstance(scale, Tensor):
        head_scale = scale
    elif scale is None:
        number = query.size(-1) ** -0.5 if query.dim() and query.size(-1) else 1.0
    else:
        number = float(scale)
    if head_scale is None and bias is None and key_bias is None and multiplier is None:
        return number, None, None, None, None
    terms = {"scale": head_scale, "bias": bias, "key_bias": key_bias, "multiplier": multiplier}
    converted = in_statistics_dtype(op, query, terms)
    return number, converted[0], converted[1], converted[2], converted[3]


def _names(op: str) -> tuple[str, ...]:
    return tuple(a.name for a in getattr(torch.ops.vitkernels, op).default._schema.arguments)


def _check_devices(op: str, named: dict[str, Any]) -> None:
    check_same_device(op, **{name: a for name, a in named.items() if isinstance(a, Tensor)})


def _register(op: str) -> None:
    backward_op = direct(f"{op}_backward")
    names, backward_names = _names(op), _names(f"{op}_backward")
    terms = tuple(name.removeprefix(_NEED) for name in backward_names if name.startswith(_NEED))
    places = [names.index(term) for term in terms]

    def fake(*args: Any) -> tuple[Tensor, Tensor]:
        named = dict(zip(names, args, strict=True))
        _check_devices(op, named)
        query, value = named["query"], named["value"]
        # A query that all windows share has a result in each: on the map of the keys.
        rows = (*named["key" if named.get("is_shared_query") else "query"].shape[:-2], query.shape[-2])
        lse = query.new_empty(rows, dtype=statistics_dtype(query.dtype))
        return query.new_empty((*rows, value.shape[-1])), lse

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.save_for_backward(*output, *(a for a in inputs if isinstance(a, Tensor)))
        ctx.rest = [None if isinstance(a, Tensor) else a for a in inputs]
        ctx.is_tensor = [isinstance(a, Tensor) for a in inputs]
        ctx.set_materialize_grads(False)  # an unused lse costs nothing

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        if grad_out is None and grad_lse is None:
            return (None,) * len(names)
        out, lse, *tensors = ctx.saved_tensors
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        given = {"grad_out": grad_out, "grad_lse": grad_lse, "out": out, "lse": lse}
        for name, is_tensor, a in zip(names, ctx.is_tensor, ctx.rest, strict=True):
            given[name] = tensors.pop(0) if is_tensor else a
        for term, place in zip(terms, places, strict=True):
            given[_NEED + term] = ctx.needs_input_grad[place]
        found = backward_op(*(given[name] for name in backward_names))
        grads = dict(zip(_DATA, found, strict=False))
        grads |= {t: g for t, g in zip(terms, found[len(_DATA) :], strict=True) if given[_NEED + t]}
        return tuple(grads.get(name) for name in names)

    def backward_fake(*args: Any) -> tuple[Tensor, ...]:
        named = dict(zip(backward_names, args, strict=True))
        _check_devices(f"{op}_backward", {name: named[name] for name in (*names, "grad_out", "grad_lse", "out", "lse")})
        lse = named["lse"]
        data = [named[name].new_empty(named[name].shape) for name in _DATA]
        score = [
            named[t].new_empty(named[t].shape) if named[_NEED + t] and named[t] is not None else lse.new_empty(0)
            for t in terms
        ]
        return (*data, *score)

    register(op, fake=fake, backward=backward, setup_context=setup_context)
    register(f"{op}_backward", fake=backward_fake)
    register_no_double_backward(f"{op}_backward")
    register_autocast(op, data=(*_DATA, "key_fill", "value_fill"))


_register("attention")
_register("attention_varlen")
_register("spatial_attention")
