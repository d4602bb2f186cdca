"""Registration of ``vitkernels::merge_attentions``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vitkernels.ops.registration import check_same_device, register, register_no_double_backward

__all__ = ["merge_attentions"]

merge_attentions = torch.ops.vitkernels.merge_attentions.default
_merge_attentions_backward = torch.ops.vitkernels.merge_attentions_backward.default


def _merge_fake(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    parts = {f"outs[{i}]": t for i, t in enumerate(outs)} | {f"lses[{i}]": t for i, t in enumerate(lses)}
    check_same_device("merge_attentions", **parts)
    return outs[0].new_empty(outs[0].shape), lses[0].new_empty(lses[0].shape)


def _merge_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    outs, lses = inputs
    ctx.save_for_backward(*outs, *lses)
    ctx.num_parts = len(outs)
    ctx.set_materialize_grads(False)


def _merge_backward_formula(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, Any]:
    num = ctx.num_parts
    outs, lses = list(ctx.saved_tensors[:num]), list(ctx.saved_tensors[num:])
    if grad_out is None and grad_lse is None:
        return [None] * num, [None] * num
    if grad_out is None:
        grad_out = torch.zeros_like(outs[0])
    grads = _merge_attentions_backward(grad_out, grad_lse, outs, lses)
    return list(grads[:num]), list(grads[num:])


def _merge_backward_fake(
    grad_out: Tensor, grad_lse: Tensor | None, outs: list[Tensor], lses: list[Tensor]
) -> list[Tensor]:
    parts = {f"outs[{i}]": t for i, t in enumerate(outs)} | {f"lses[{i}]": t for i, t in enumerate(lses)}
    check_same_device("merge_attentions_backward", **parts, grad_out=grad_out, grad_lse=grad_lse)
    return [t.new_empty(t.shape) for t in (*outs, *lses)]


register(
    "merge_attentions",
    fake=_merge_fake,
    backward=_merge_backward_formula,
    setup_context=_merge_setup_context,
)
register("merge_attentions_backward", fake=_merge_backward_fake)
register_no_double_backward("merge_attentions_backward")
