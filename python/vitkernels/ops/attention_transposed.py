"""Registration of ``vitkernels::attention_transposed``."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vitkernels.ops.registration import (
    check_same_device,
    direct,
    register,
    register_autocast,
    register_no_double_backward,
)

__all__ = ["attention_transposed"]

attention_transposed = direct("attention_transposed")
_attention_transposed_backward = direct("attention_transposed_backward")

# The tensors among the arguments (csrc/schema.cpp); a scale follows the fifth, two flags the last.
_ROWS = ("query", "key", "value_q", "lse", "query_weight")
_SCORE = ("head_scale", "bias", "key_bias", "multiplier", "head_map")


def _check_devices(op: str, tensors: tuple[Any, ...], **others: Tensor) -> None:
    named = dict(zip(_ROWS, tensors[:5], strict=True)) | dict(zip(_SCORE, tensors[6:11], strict=True))
    check_same_device(op, **named, **others)


def _fake(*args: Any) -> Tensor:
    _check_devices("attention_transposed", args)
    query, key, value_q = args[:3]
    out: Tensor = query.new_empty((*key.shape[:2], *value_q.shape[2:]))
    return out


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, scale = inputs[:6]
    ctx.save_for_backward(*tensors, *inputs[6:11])
    ctx.scale, ctx.flags = scale, inputs[11:13]
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_out: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_out is None:
        return (None,) * 13
    saved, needs = ctx.saved_tensors, ctx.needs_input_grad
    needed = [needs[4], *needs[6:10]]
    grads = _attention_transposed_backward(grad_out, *saved[:5], ctx.scale, *saved[5:], *ctx.flags, *needed)
    terms = [grad if need else None for grad, need in zip(grads[4:], needed, strict=True)]
    return (*grads[:4], terms[0], None, *terms[1:], None, None, None)


def _backward_fake(grad_out: Tensor, *args: Any) -> tuple[Tensor, ...]:
    _check_devices("attention_transposed_backward", args, grad_out=grad_out)
    lse = args[3]
    terms = zip((args[4], *args[6:10]), args[13:], strict=True)
    grads = [t.new_empty(t.shape) if need and t is not None else lse.new_empty(0) for t, need in terms]
    return (*(t.new_empty(t.shape) for t in args[:4]), *grads)


register("attention_transposed", fake=_fake, backward=_backward, setup_context=_setup_context)
register("attention_transposed_backward", fake=_backward_fake)
register_no_double_backward("attention_transposed_backward")
register_autocast("attention_transposed", data=("query", "key", "value_q"))
