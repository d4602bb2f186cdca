"""Registration of ``vitkernels::attention`` and ``vitkernels::attention_varlen``.

The two differ in four arguments behind query, key and value, the packing: ``cu_seqlens_q, cu_seqlens_k,
max_seqlen_q, max_seqlen_k``. Everything here is written for any number of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.ops.registration import (
    check_same_device,
    register,
    register_autocast,
    register_no_double_backward,
    statistics_dtype,
    without_autograd,
)

__all__ = ["attention", "attention_varlen", "check_floating", "score_arguments"]

attention = without_autograd(torch.ops.vitkernels.attention.default)
attention_varlen = without_autograd(torch.ops.vitkernels.attention_varlen.default)

_SCORE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
# The arguments behind the packing (csrc/schema.cpp); those of a backward operator end with what is needed.
_TAIL = ("scale", "head_scale", "bias", "key_bias", "multiplier", "head_map", "is_causal")
_NUM_NEEDED = 4  # of head_scale, bias, key_bias, multiplier


def score_arguments(
    op: str,
    query: Tensor,
    scale: float | Tensor | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    multiplier: Tensor | None,
) -> tuple[float, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """The score part of the operator's arguments, in the kernel's statistics dtype."""
    dtype = statistics_dtype(query.dtype)
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
    for name, term in terms.items():
        if term is not None:
            check_floating(op, name, term)
    converted = [None if term is None else term.to(dtype) for term in terms.values()]
    return number, converted[0], converted[1], converted[2], converted[3]


def check_floating(op: str, name: str, term: Tensor) -> None:
    """Raise unless ``term`` has a dtype of ours: a boolean mask would be taken for zeros and ones."""
    if term.dtype not in _SCORE_DTYPES:
        raise RuntimeError(f"vitkernels::{op}: {name} is {term.dtype}, takes a floating dtype")


def _check_devices(
    op: str, tensors: tuple[Tensor | None, ...], packing: tuple[Any, ...], tail: tuple[Any, ...]
) -> None:
    names = ("query", "key", "value", "grad_out", "grad_lse", "out", "lse")
    named = dict(zip(names, tensors, strict=False)) | dict(zip(("cu_seqlens_q", "cu_seqlens_k"), packing, strict=False))
    named |= {name: value for name, value in zip(_TAIL, tail, strict=True) if name not in ("scale", "is_causal")}
    check_same_device(op, **named)


def _register(op: str, num_packing: int) -> None:
    backward_op = getattr(torch.ops.vitkernels, f"{op}_backward").default

    def fake(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        _check_devices(op, (query, key, value), rest[:num_packing], rest[num_packing:])
        shape = (*query.shape[:-1], value.shape[-1])
        return query.new_empty(shape), query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        rest = inputs[3:]
        ctx.save_for_backward(*inputs[:3], *output, *(a for a in rest if isinstance(a, Tensor)))
        ctx.rest = [None if isinstance(a, Tensor) else a for a in rest]
        ctx.is_tensor = [isinstance(a, Tensor) for a in rest]
        ctx.set_materialize_grads(False)  # an unused lse costs nothing

    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
        nothing = (None,) * (3 + len(ctx.rest))
        if grad_out is None and grad_lse is None:
            return nothing
        query, key, value, out, lse, *tensors = ctx.saved_tensors
        rest = [tensors.pop(0) if is_tensor else a for is_tensor, a in zip(ctx.is_tensor, ctx.rest, strict=True)]
        if grad_out is None:
            grad_out = torch.zeros_like(out)
        first = num_packing + 1  # of the score terms, behind the scale
        needed = list(ctx.needs_input_grad[3 + first : 3 + first + _NUM_NEEDED])
        grads = backward_op(grad_out, grad_lse, query, key, value, out, lse, *rest, *needed)
        score = [grad if need else None for grad, need in zip(grads[3:], needed, strict=True)]
        return (*grads[:3], *nothing[:first], *score, None, None)

    def backward_fake(
        grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor,
        *rest: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        tail, needed = rest[num_packing:-_NUM_NEEDED], rest[-_NUM_NEEDED:]
        tensors = (query, key, value, grad_out, grad_lse, out, lse)
        _check_devices(f"{op}_backward", tensors, rest[:num_packing], tail)
        terms = zip(tail[1 : 1 + _NUM_NEEDED], needed, strict=True)
        score = [t.new_empty(t.shape) if need and t is not None else lse.new_empty(0) for t, need in terms]
        return (*(t.new_empty(t.shape) for t in (query, key, value)), *score)

    register(op, fake=fake, backward=backward, setup_context=setup_context)
    register(f"{op}_backward", fake=backward_fake)
    register_no_double_backward(f"{op}_backward")
    register_autocast(op, num_cast=3)


_register("attention", num_packing=0)
_register("attention_varlen", num_packing=4)
