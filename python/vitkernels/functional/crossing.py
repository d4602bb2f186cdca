"""Attention along two directions at once: stripes, and rows with columns."""

from __future__ import annotations

from typing import Literal, overload

import torch
from torch import Tensor

from vitkernels.axes import Axis, Block, Full
from vitkernels.functional.arguments import check_flag, check_maps, check_stored, held_in_trace, integers
from vitkernels.functional.merge_attentions import merge_attentions
from vitkernels.functional.score import Score, of_each_head
from vitkernels.functional.spatial_attention import attend_on_map
from vitkernels.functional.words import Words

__all__ = ["criss_cross_attention", "cross_shaped_window_attention"]

_STRIPES = Words("cross_shaped_window_attention", rules={"size": "stripe_width", "key_size": "stripe_width"})
_CRISS_CROSS = Words("criss_cross_attention")


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
        scale: factor on the logits, a number or a differentiable tensor, ``(heads,)``, ``(1,)`` or ``()``. Default
            ``d ** -0.5``.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first.

    Returns:
        ``(B, height, width, heads, dv)`` in the dtype of ``query``.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Dong et al., "CSWin Transformer" (2022), section 3.2. (Its positional encoding, a convolution of the values
    within each stripe, is :class:`vitkernels.nn.CrossShapedWindowAttention`'s.)
    """
    op = _STRIPES.function
    check_maps(op, query, key, value, 2)
    heads = query.size(-2)
    if heads % 2 != 0 or key.size(-2) != heads:
        raise RuntimeError(
            f"vitkernels::{op}: query has shape {tuple(query.shape)}, takes (B, height, width, heads, d) with an even "
            f"number of heads, as many as key ({key.size(-2)})"
        )
    if isinstance(scale, Tensor):
        scale = of_each_head(op, query, scale)
        if scale.dim() != 1 or scale.size(0) != heads:
            raise RuntimeError(f"vitkernels::{op}: scale has shape {tuple(scale.shape)}, takes ({heads},)")
    query = held_in_trace(op, query, stripe_width=stripe_width)
    (width,) = integers(op, "stripe_width", stripe_width, 1)
    check_stored(op, query=query, key=key, value=value)
    stripes: list[Axis] = [Full(), Block(width)]
    halves = []
    for i, axes in enumerate((stripes, stripes[::-1])):
        of_half = slice(i * heads // 2, (i + 1) * heads // 2)
        q, k, v = (t[..., of_half, :] for t in (query, key, value))
        own_scale = scale[of_half] if isinstance(scale, Tensor) else scale
        halves.append(attend_on_map(_STRIPES, q, k, v, axes, Score(own_scale, qk_norm))[0])
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
        scale: factor on the logits, a number or a differentiable tensor, ``(heads,)``, ``(1,)`` or ``()``. Default
            ``d ** -0.5``; CCNet has 1.
        qk_norm: ``"l2"`` divides every query and key by its Euclidean norm first.
        key_bias: added to the logits of one key for all queries, broadcastable to ``(B, heads, height, width)``.
        return_lse: also return the natural log of each row's sum of exponentials.

    Returns:
        ``(B, height, width, heads, dv)`` in the dtype of ``query``; with ``return_lse`` also
        ``lse (B, height, width, heads)``.

    A NaN or infinity in a key, a value or a table may reach queries that do not see it: they share a tile.

    Raises:
        RuntimeError: on a wrong rank, dtype, device or size, naming the argument and what it takes.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2.
    """
    check_maps(_CRISS_CROSS.function, query, key, value, 2)
    check_flag(_CRISS_CROSS.function, "return_lse", return_lse)
    largest = max(query.size(1) - 1, 0)  # offset
    offsets = torch.arange(-largest, largest + 1, device=query.device)
    without_itself = torch.where(offsets == 0, -torch.inf, 0.0)[None, :, None]  # the row has it
    score = Score(scale, qk_norm, key_bias=key_bias)
    patterns: list[tuple[list[Axis], Tensor | None]] = [
        ([Block(1), Full()], None), ([Full(), Block(1)], without_itself),
    ]  # fmt: skip
    parts = [
        attend_on_map(_CRISS_CROSS, query, key, value, axes, score._replace(bias_table=table))
        for axes, table in patterns
    ]
    out, lse = merge_attentions([part[0] for part in parts], [part[1] for part in parts])
    return (out, lse) if return_lse else out
