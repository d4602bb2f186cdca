"""Registration of ``vitkernels::attention`` and ``vitkernels::merge_attentions``."""

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
)

__all__ = ["attention", "merge_attentions", "score_arguments"]

attention = torch.ops.vitkernels.attention.default
merge_attentions = torch.ops.vitkernels.merge_attentions.default
_attention_backward = torch.ops.vitkernels.attention_backward.default
_merge_attentions_backward = torch.ops.vitkernels.merge_attentions_backward.default

# Positions in the schema of `attention` (csrc/schema.cpp).
_HEAD_SCALE, _BIAS, _KEY_BIAS, _MULTIPLIER = 4, 5, 6, 7
_NUM_INPUTS = 10
_SCORE_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def score_arguments(
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
    terms = {"scale": head_scale, "bias": bias, "key_bias": key_bias, "multiplier": multiplier}
    for name, term in terms.items():
        # A boolean mask would otherwise be added as zeros and ones.
        if term is not None and term.dtype not in _SCORE_DTYPES:
            raise RuntimeError(f"vitkernels::attention: {name} is {term.dtype}, takes a floating dtype")
    converted = [None if term is None else term.to(dtype) for term in terms.values()]
    return number, converted[0], converted[1], converted[2], converted[3]


def _attention_fake(
    query: Tensor, key: Tensor, value: Tensor, scale: float, head_scale: Tensor | None, bias: Tensor | None,
    key_bias: Tensor | None, multiplier: Tensor | None, head_map: Tensor | None, is_causal: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_same_device(
        "attention", query=query, key=key, value=value, scale=head_scale, bias=bias, key_bias=key_bias,
        multiplier=multiplier, head_map=head_map,
    )  # fmt: skip
    shape = (*query.shape[:-1], value.shape[-1])
    return query.new_empty(shape), query.new_empty(query.shape[:-1], dtype=statistics_dtype(query.dtype))


def _attention_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    query, key, value, scale, head_scale, bias, key_bias, multiplier, head_map, is_causal = inputs
    ctx.save_for_backward(query, key, value, head_scale, bias, key_bias, multiplier, head_map, *output)
    ctx.scale, ctx.is_causal = scale, is_causal
    ctx.set_materialize_grads(False)  # an unused lse costs nothing


def _attention_backward_formula(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    query, key, value, head_scale, bias, key_bias, multiplier, head_map, out, lse = ctx.saved_tensors
    if grad_out is None and grad_lse is None:
        return (None,) * _NUM_INPUTS
    if grad_out is None:
        grad_out = torch.zeros_like(out)
    if grad_out.stride(-1) != 1:
        grad_out = grad_out.contiguous()
    needed = [ctx.needs_input_grad[i] for i in (_HEAD_SCALE, _BIAS, _KEY_BIAS, _MULTIPLIER)]
    grads = _attention_backward(
        grad_out, grad_lse, query, key, value, out, lse,
        ctx.scale, head_scale, bias, key_bias, multiplier, head_map, ctx.is_causal, *needed,
    )  # fmt: skip
    score = [grad if need else None for grad, need in zip(grads[3:], needed, strict=True)]
    return (*grads[:3], None, *score, None, None)


def _attention_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, query: Tensor, key: Tensor, value: Tensor,
    out: Tensor, lse: Tensor, scale: float, head_scale: Tensor | None, bias: Tensor | None,
    key_bias: Tensor | None, multiplier: Tensor | None, head_map: Tensor | None, is_causal: bool,
    *needed: bool,
) -> tuple[Tensor, ...]:  # fmt: skip
    check_same_device(
        "attention_backward", query=query, key=key, value=value, grad_out=grad_out, grad_lse=grad_lse, out=out,
        lse=lse, scale=head_scale, bias=bias, key_bias=key_bias, multiplier=multiplier, head_map=head_map,
    )  # fmt: skip

    def like(t: Tensor) -> Tensor:
        return t.new_empty(t.shape)

    terms = zip((head_scale, bias, key_bias, multiplier), needed, strict=True)
    score = [like(t) if need and t is not None else lse.new_empty(0) for t, need in terms]
    return (like(query), like(key), like(value), *score)


register(
    "attention",
    fake=_attention_fake,
    backward=_attention_backward_formula,
    setup_context=_attention_setup_context,
)
register("attention_backward", fake=_attention_backward_fake)
register_no_double_backward("attention_backward")
register_autocast("attention", num_cast=3)


def _merge_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    parts = {f"outs[{i}]": t for i, t in enumerate(outs)} | {f"lses[{i}]": t for i, t in enumerate(lses)}
    check_same_device("merge_attentions", **parts)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _merge_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.save_for_backward(*outs, *lses, output[1])
    ctx.num_parts = len(outs)
    ctx.set_materialize_grads(False)


def _merge_backward_formula(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, Any]:
    num = ctx.num_parts
    outs, lses = list(ctx.saved_tensors[:num]), list(ctx.saved_tensors[num : 2 * num])
    lse = ctx.saved_tensors[2 * num]
    if grad_out is None and grad_lse is None:
        return [None] * num, [None] * num
    if grad_out is None:
        grad_out = torch.zeros_like(outs[0])
    grads = _merge_attentions_backward(grad_out, grad_lse, outs, lses, lse)
    return list(grads[:num]), list(grads[num:])


def _merge_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, outs: list[Tensor], lses: list[Tensor], lse: Tensor
) -> list[Tensor]:
    parts = {f"outs[{i}]": t for i, t in enumerate(outs)} | {f"lses[{i}]": t for i, t in enumerate(lses)}
    check_same_device("merge_attentions_backward", **parts, grad_out=grad_out, grad_lse=grad_lse, lse=lse)
    return [t.new_empty(t.shape) for t in (*outs, *lses)]


register(
    "merge_attentions",
    fake=_merge_fake,
    backward=_merge_backward_formula,
    setup_context=_merge_setup_context,
)
register("merge_attentions_backward", fake=_merge_backward_fake)
register_no_double_backward("merge_attentions_backward")
