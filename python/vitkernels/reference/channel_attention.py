"""The definition of attention between channels, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["channel_attention"]


def channel_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    qk_norm: str | None = None,
    groups: int | None = None,
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.channel_attention`."""
    if groups is not None:
        query, key, value = (torch.unflatten(t.flatten(2), 2, (groups, -1)) for t in (query, key, value))
    q, k, v = (t.permute(0, 2, 3, 1) for t in (query, key, value))  # [B, H, D, N]
    if qk_norm == "l2":
        q, k = (torch.nn.functional.normalize(t, dim=-1) for t in (q, k))
    if scale is None:
        scale = query.size(-1) ** -0.5
    if isinstance(scale, Tensor):
        scale = scale.to(query.dtype).reshape(-1, 1, 1)
    weights = torch.softmax(q @ k.transpose(-1, -2) * scale, -1)  # [B, H, D, Dv]
    return (weights @ v).permute(0, 3, 1, 2)
