"""Softmax attention between channels instead of tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitkernels._torch_private import sizes_are_tensors
from vitkernels.functional.arguments import check_stored, check_tensors, number, whole_number
from vitkernels.functional.score import of_each_head
from vitkernels.ops.attention import allow_tf32, statistics_dtype
from vitkernels.ops.linear_attention import channel_attention as _channel_attention

__all__ = ["channel_attention"]

_OP = "channel_attention"


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    groups: int | None = None,
) -> Tensor:
    r"""Attention of every channel of a head to all channels of that head, over all tokens.

    .. math::
        o_{nc} = \sum_{c'} \operatorname{softmax}_{c'}\Big(s_h \sum_m q_{mc} \, k_{mc'}\Big) \, v_{nc'}

    Args:
        query: ``(B, N, heads, d)``.
        key: ``(B, N, heads, dv)``.
        value: ``(B, M, heads, dv)``.
        scale: factor on the logits, a number or a differentiable tensor, ``(heads,)``, ``(1,)`` or ``()`` (XCiT's
            temperature). Default ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every channel of query and key by its Euclidean norm over the tokens first.
        groups: divide the channels of all heads into so many groups instead, of equally many channels.

    All tensors may have any strides as long as the last one is 1. The dtypes are those of :func:`vitkernels.attention`;
    the logits are float32 (float64 for float64). On CUDA ``d`` and ``dv`` are at most 128, and 64 in float32, which
    float16 becomes; float32 is rounded to TF32 if PyTorch's matrix products are. DaViT calls its keys, values and
    queries what are the query, the key and the value here.

    Returns:
        ``(B, M, heads, d)`` in the dtype of ``query``, with the same bits in every run, gradients included.

    A NaN or infinity in a token reaches all tokens.

    Raises:
        RuntimeError: on a wrong rank, dtype, device, size or option, naming the argument and what it takes.

    Source: Ding et al., "DaViT: Dual Attention Vision Transformers" (2022), eq. 4; ``qk_norm``: El-Nouby et al., "XCiT:
    Cross-Covariance Image Transformers" (2021), eq. 3.
    """
    check_tensors(_OP, query=query, key=key, value=value)
    for name, t, layout in (
        ("query", query, "N, heads, d"),
        ("key", key, "N, heads, dv"),
        ("value", value, "M, heads, dv"),
    ):
        if t.dim() != 4:
            raise RuntimeError(
                f"vitkernels::{_OP}: {name} has shape {tuple(t.shape)}, takes 4 dimensions (B, {layout})"
            )
    if groups is not None:
        check_stored(_OP, query=query, key=key, value=value)
        query, key, value = (_grouped(*each, groups) for each in (("query", query), ("key", key), ("value", value)))
    if qk_norm not in (None, "l2"):
        raise RuntimeError(f"vitkernels::{_OP}: qk_norm is {qk_norm!r}, takes None or 'l2'")
    factor, of_heads = 1.0, None
    if isinstance(scale, Tensor):
        of_heads = of_each_head(_OP, query, scale)
        if of_heads.dim() != 1 or of_heads.shape[0] != query.shape[2]:
            shape = tuple(of_heads.shape)
            raise RuntimeError(f"vitkernels::{_OP}: scale has shape {shape}, takes ({query.shape[2]},)")
    elif scale is not None:
        factor = number(_OP, "scale", scale, statistics_dtype(query.dtype))
    elif query.shape[3]:
        factor = (int(query.shape[3]) if sizes_are_tensors() else query.shape[3]) ** -0.5
    options = factor, of_heads, qk_norm is not None, allow_tf32(query)
    out: Tensor = _channel_attention(query, key, value, *options)[0]
    return out


def _grouped(name: str, t: Tensor, groups: int) -> Tensor:
    count = whole_number(_OP, "groups", groups)
    channels = t.shape[2] * t.shape[3]
    if count < 1 or channels == 0 or channels % count != 0:
        raise RuntimeError(f"vitkernels::{_OP}: groups is {groups}, takes a divisor of {name}'s {channels} channels")
    return torch.unflatten(t.flatten(2), 2, (count, -1))
