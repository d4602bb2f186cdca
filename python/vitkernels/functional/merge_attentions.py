"""Joining attention results over disjoint sets of keys."""

from __future__ import annotations

from torch import Tensor

from vitkernels.functional.arguments import check_tensors
from vitkernels.ops import attention as _ops

__all__ = ["merge_attentions"]


def merge_attentions(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    r"""Join attention results over disjoint sets of keys, as if computed over their union.

    .. math::
        \mathrm{lse} = \log \sum_p e^{\mathrm{lse}_p}, \qquad o = \sum_p e^{\mathrm{lse}_p - \mathrm{lse}} \, o_p

    Args:
        outs: partial outputs, each ``(B, *spatial, heads, dv)``, all of one dtype.
        lses: their log-sum-exps ``(B, *spatial, heads)``, float32 (float64 for float64), natural log.

    Returns:
        ``out`` and ``lse`` with the shapes and dtypes of the parts. Differentiable in all arguments. Where every
        part is empty (``-inf``), ``out = 0`` and ``lse = -inf``.

    Raises:
        RuntimeError: if the lists are empty, differ in length, or their members differ in shape or dtype.

    Source: Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory" (2021), section 3.
    """
    op = "vitkernels::merge_attentions"
    for name, parts in (("outs", outs), ("lses", lses)):
        if not isinstance(parts, (list, tuple)):
            raise RuntimeError(f"{op}: {name} is a {type(parts).__name__}, takes a list of tensors")
        check_tensors("merge_attentions", **{f"{name}[{i}]": part for i, part in enumerate(parts)})
    if len(outs) == 0:
        # Without a tensor there is no device, and the operator's own check is never reached.
        raise RuntimeError(f"{op}: outs is empty, takes at least one tensor")
    out, lse = _ops.merge_attentions(list(outs), list(lses))
    return out, lse
