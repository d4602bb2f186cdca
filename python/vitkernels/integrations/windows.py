"""Shifted windows on the map: what the blocks of Swin have in common in all libraries."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkernels.functional import window_attention

__all__ = ["attend_in_windows", "cosine_terms", "pad_to_windows"]

Projections = tuple[Tensor, Tensor, Tensor]


def attend_in_windows(
    x: Tensor,
    window_size: Sequence[int],
    shift: Sequence[int],
    project: Callable[[Tensor], Projections],
    **terms: Any,
) -> Tensor:
    """Attention within shifted windows of a map, which is padded as the libraries do where windows do not fit.

    Args:
        x: ``(B, height, width, C)``. The padding is zeros of it, which ``project`` gives biases, and takes part.
        window_size: height and width.
        shift: rows and columns before the first whole window.
        project: queries, keys and values ``(B, height, width, heads, d)`` of a map.
        terms: options of :func:`vitkernels.window_attention`.

    Returns:
        ``(B, height, width, heads * d)``.
    """
    height, width = x.shape[1:3]
    q, k, v = project(pad_to_windows(x, window_size))
    out = window_attention(q, k, v, tuple(window_size), tuple(shift), **terms)
    cropped: Tensor = out[:, :height, :width].flatten(3)
    return cropped


def pad_to_windows(x: Tensor, window_size: Sequence[int]) -> Tensor:
    """``x (B, height, width, C)`` with zeros after its last row and column until it is made of whole windows."""
    rows, columns = (-n % window for n, window in zip(x.shape[1:3], window_size, strict=True))
    return F.pad(x, (0, 0, 0, columns, 0, rows)) if rows or columns else x


def cosine_terms(logit_scale: Tensor, table: Tensor) -> dict[str, Any]:
    """The options for Swin V2's logits, from ``(heads, 1, 1)`` and what the MLP makes of ``(..., heads)`` offsets.

    Source: Liu et al., "Swin Transformer V2" (2022), section 3.3; the bounds are those of the libraries.
    """
    bias_table = 16 * torch.sigmoid(table.flatten(0, -2))  # [offsets, H]
    scale = logit_scale.clamp(max=math.log(100.0)).exp().flatten()  # [H]
    return {"scale": scale, "qk_norm": "l2", "bias_table": bias_table}
