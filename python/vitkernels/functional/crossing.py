"""Attention along two directions at once: stripes, and rows with columns."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vitkernels.axes import Block, Full
from vitkernels.functional.merge_attentions import merge_attentions
from vitkernels.functional.spatial_attention import spatial_attention

__all__ = ["criss_cross_attention", "cross_shaped_window_attention"]


def cross_shaped_window_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    stripe_width: int,
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
) -> Tensor:
    """Attention within stripes of the map: vertical ones for the first half of the heads, horizontal for the second.

    Args:
        query: ``(B, height, width, heads, d)``, an even number of heads.
        key: ``(B, height, width, heads, d)``.
        value: ``(B, height, width, heads, dv)``.
        stripe_width: columns of a vertical stripe, and rows of a horizontal one. The last stripe may be narrower.
        scale: factor on the logits, a number or a differentiable ``(heads,)`` tensor. Default ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first.

    Returns:
        ``(B, height, width, heads, dv)`` in the dtype of ``query``.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Dong et al., "CSWin Transformer" (2022), section 3.2. (Its positional encoding, a convolution of the values
    within each stripe, is :class:`vitkernels.nn.CrossShapedWindowAttention`'s.)
    """
    op, heads = "vitkernels::cross_shaped_window_attention", query.size(-2)
    if query.dim() != 5 or heads % 2 != 0 or key.size(-2) != heads:
        raise RuntimeError(
            f"{op}: query has shape {tuple(query.shape)}, takes (B, height, width, heads, d) with an even number of "
            f"heads, as many as key ({key.size(-2)})"
        )
    stripes = [Full(), Block(stripe_width)]
    halves = []
    for i, axes in enumerate((stripes, stripes[::-1])):
        of_half = slice(i * heads // 2, (i + 1) * heads // 2)
        q, k, v = (t[..., of_half, :] for t in (query, key, value))
        own_scale = scale[of_half] if isinstance(scale, Tensor) else scale
        halves.append(spatial_attention(q, k, v, axes, scale=own_scale, qk_norm=qk_norm))
    return torch.cat(halves, -2)


@overload
def criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | Tensor | None = ...,
    qk_norm: Literal["l2"] | None = ..., key_bias: Tensor | None = ..., return_lse: Literal[False] = ...,
) -> Tensor: ...  # fmt: skip


@overload
def criss_cross_attention(
    query: Tensor, key: Tensor, value: Tensor, *, scale: float | Tensor | None = ...,
    qk_norm: Literal["l2"] | None = ..., key_bias: Tensor | None = ..., return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...  # fmt: skip


def criss_cross_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    key_bias: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of every pixel to its row and its column in one softmax; the pixel itself counts once.

    Args:
        query: ``(B, height, width, heads, d)``.
        key: ``(B, height, width, kv_heads, d)``; ``heads`` must be a multiple of ``kv_heads``.
        value: ``(B, height, width, kv_heads, dv)``.
        scale: factor on the logits, a number or a differentiable ``(heads,)`` tensor. Default ``d ** -0.5``; CCNet
            has 1.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first.
        key_bias: added to the logits of one key for all queries, broadcastable to ``(B, heads, height, width)``.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, height, width, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also
        ``lse (B, height, width, heads)``.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2.
    """
    if query.dim() != 5:
        shape = tuple(query.shape)
        raise RuntimeError(
            f"vitkernels::criss_cross_attention: query has shape {shape}, takes (B, height, width, heads, d)"
        )
    height = query.size(1)
    offsets = torch.arange(1 - height, height, device=query.device)
    without_itself = torch.where(offsets == 0, -torch.inf, 0.0)[None, :, None]  # the row has it
    parts = [
        spatial_attention(
            query, key, value, axes, scale=scale, qk_norm=qk_norm, key_bias=key_bias, bias_table=table, return_lse=True
        )
        for axes, table in (([Block(1), Full()], None), ([Full(), Block(1)], without_itself))
    ]
    out, lse = merge_attentions([part[0] for part in parts], [part[1] for part in parts])
    return (out, lse) if return_lse else out
