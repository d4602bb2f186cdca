"""Linear attention to what lies near: weights that shrink with the distance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

import torch
from torch import Tensor

from vitkernels.functional.arguments import check_flag, check_floating, check_stored, check_tensors, number
from vitkernels.ops.attention import allow_tf32, statistics_dtype
from vitkernels.ops.linear_attention import decayed_linear_attention as _decayed_linear_attention

__all__ = ["decayed_linear_attention"]

_OP = "decayed_linear_attention"


@overload
def decayed_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: float | Tensor, *, axes: Sequence[int] | None = ...,
    is_causal: bool = ..., initial_state: Tensor | None = ..., return_state: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def decayed_linear_attention(
    query: Tensor, key: Tensor, value: Tensor, decay: float | Tensor, *, axes: Sequence[int] | None = ...,
    is_causal: bool = ..., initial_state: Tensor | None = ..., return_state: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def decayed_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: float | Tensor,
    *,
    axes: Sequence[int] | None = None,
    is_causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""Linear attention whose weights shrink by a factor with every token of distance: retention, Lightning Attention.

    .. math::
        o_i = \sum_{j \le i} \lambda_h^{i - j} \, (q_i \cdot k_j) \, v_j
        \qquad \text{or, two-sided,} \qquad o_i = \sum_j \lambda_h^{|i - j|} \, (q_i \cdot k_j) \, v_j

    It is computed in blocks of tokens with a running state between them: the number of operations for each token does
    not depend on how many there are.

    Args:
        query: ``(B, N, heads, d)``, scaled as wanted; with ``axes`` ``(B, *map, heads, d)``.
        key: as ``query``.
        value: as ``query`` but for its last dimension, ``dv``.
        decay: :math:`\lambda`, from 0 to 1: a number, or ``(heads,)``. No gradient goes to it.
        axes: axes of a map, from 0 on, along which the attention runs one after another: the output along the first is
            the value along the next. ``None``: the input has one.
        is_causal: a token sees itself and those before it; else the two-sided form.
        initial_state: ``(B, heads, d, dv)``, what tokens before the first have left: the state that another call
            returned. In float32 (float64 for float64), differentiable.
        return_state: also return the state after the last token.

    ``initial_state`` and ``return_state`` are for the causal form without ``axes``. All tensors may have any strides as
    long as the last one is 1. The dtypes are those of :func:`vitkernels.attention`; the state is float32 (float64 for
    float64). On CUDA ``d`` and ``dv`` are at most 128, and 64 in float32, which float16 becomes; float32 is rounded to
    TF32 if PyTorch's matrix products are; and a decay that is not from 0 to 1 makes NaN instead of an error.

    Returns:
        ``(B, N, heads, dv)`` in the dtype of ``query``; with ``return_state`` also ``state (B, heads, d, dv)``. They
        have the same bits in every run, gradients included.

    A NaN or infinity in a token reaches all tokens after it, and may reach those before it in its block.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or option, naming the argument and what it takes.

    Source: Sun et al., "Retentive Network" (2023), eq. 5 to 7; Qin et al., "Various Lengths, Constant Speed: Efficient
    Language Modeling with Lightning Attention" (2024), algorithm 1; ``axes`` and the two-sided form: Fan et al., "RMT:
    Retentive Networks Meet Vision Transformers" (2024), section 3.2, without its softmax.
    """
    check_tensors(_OP, query=query, key=key, value=value)
    check_flag(_OP, "is_causal", is_causal)
    check_flag(_OP, "return_state", return_state)
    if (initial_state is not None or return_state) and (axes is not None or not is_causal):
        name = "return_state" if initial_state is None else "initial_state"
        raise RuntimeError(f"vitkernels::{_OP}: {name} is given, takes the causal form without axes")
    if initial_state is not None:
        check_tensors(_OP, initial_state=initial_state)
    of_heads = _of_heads(query, decay)
    if axes is None:
        for name, t in (("query", query), ("key", key), ("value", value)):
            if t.dim() != 4:
                takes = "takes 4 dimensions (B, N, heads, d), or axes"
                raise RuntimeError(f"vitkernels::{_OP}: {name} has shape {tuple(t.shape)}, {takes}")
        out, state = _along(query, key, value, of_heads, initial_state, is_causal)
        return (out, state) if return_state else out
    check_stored(_OP, query=query, key=key, value=value)
    for axis in _checked(axes, query, key, value):
        value = _along_axis(axis, query, key, value, of_heads, is_causal)
    return value


def _of_heads(query: Tensor, decay: float | Tensor) -> Tensor:
    dtype = statistics_dtype(query.dtype)
    heads = query.shape[-2] if query.dim() > 1 else 1
    if not isinstance(decay, Tensor):
        return torch.full((heads,), number(_OP, "decay", decay, dtype), dtype=dtype, device=query.device)
    check_tensors(_OP, decay=decay)
    check_floating(_OP, "decay", decay)
    if decay.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(f"vitkernels::{_OP}: decay requires a gradient, takes one that does not")
    check_stored(_OP, decay=decay)
    decay = decay.detach().to(dtype)
    return decay.expand(heads) if decay.dim() <= 1 and decay.numel() == 1 else decay


def _along(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, initial_state: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor]:
    tf32 = allow_tf32(query)
    found: tuple[Tensor, Tensor] = _decayed_linear_attention(query, key, value, decay, initial_state, False, True, tf32)
    if is_causal:
        return found
    later: Tensor = _decayed_linear_attention(query, key, value, decay, None, True, False, tf32)[0]
    return found[0] + later, found[1]


def _checked(axes: Sequence[int], query: Tensor, key: Tensor, value: Tensor) -> list[int]:
    num_axes = query.dim() - 3
    if num_axes < 1:
        raise RuntimeError(
            f"vitkernels::{_OP}: query has shape {tuple(query.shape)}, takes (B, *map, heads, d) with axes"
        )
    is_list = isinstance(axes, (list, tuple)) and len(axes) > 0
    if not is_list or any(type(axis) is not int or not 0 <= axis < num_axes for axis in axes):
        raise RuntimeError(f"vitkernels::{_OP}: axes is {axes!r}, takes some of 0 to {num_axes - 1}")
    for name, t in (("key", key), ("value", value)):
        if t.dim() != query.dim() or t.shape[:-1] != query.shape[:-1]:
            raise RuntimeError(
                f"vitkernels::{_OP}: {name} has shape {tuple(t.shape)}, takes query's {tuple(query.shape[:-1])} before "
                "its last dimension"
            )
    return list(axes)


def _along_axis(axis: int, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, is_causal: bool) -> Tensor:
    moved = [t.movedim(1 + axis, -3) for t in (query, key, value)]  # [B, *others, n, heads, d]
    q, k, v = (t.flatten(0, -4) for t in moved)
    out = _along(q, k, v, decay, None, is_causal)[0]
    return out.reshape(*moved[2].shape[:-1], out.size(-1)).movedim(-3, 1 + axis)
