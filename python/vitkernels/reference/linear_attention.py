"""The definition of linear attention, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkernels.feature_map import FeatureMap
from vitkernels.reference.attention import normalized

__all__ = ["features", "linear_attention"]


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    feature_map: str | FeatureMap = "relu",
    normalize: bool = True,
    eps: float = 1e-6,
    scale: float = 1.0,
    qk_norm: str | None = None,
    residual_v: float = 0.0,
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.linear_attention`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    if qk_norm == "l2":
        query, key = normalized(query), normalized(key)
    q, k = (features(t.to(wide), feature_map).transpose(1, 2) for t in (query, key))  # [B, H, N, D]
    v = value.to(wide).transpose(1, 2)  # [B, H, Nk, Dv]
    k, v = (t.repeat_interleave(q.size(1) // t.size(1), 1) for t in (k, v))
    q = q * scale
    out = q @ (k.transpose(-1, -2) @ v)  # [B, H, Nq, Dv]
    if normalize:
        sums = q @ k.sum(-2).unsqueeze(-1) + eps  # [B, H, Nq, 1]
        out = torch.where(sums == 0, 0.0, out / torch.where(sums == 0, 1.0, sums))
    if residual_v:
        out = out + residual_v * v
    return out.transpose(1, 2).to(query.dtype)


def features(x: Tensor, feature_map: str | FeatureMap) -> Tensor:
    """The feature map of every row."""
    chosen = FeatureMap(feature_map) if isinstance(feature_map, str) else feature_map
    if chosen.name == "relu":
        return x.relu()
    if chosen.name == "elu":
        return F.elu(x) + 1
    if chosen.name == "exp":
        return x.exp()
    if chosen.name == "focused":
        u = x.relu() + 1e-6
        powered = (u / u.amax(-1, keepdim=True)) ** chosen.power  # any factor cancels
        focused: Tensor = powered * (u.norm(dim=-1, keepdim=True) / powered.norm(dim=-1, keepdim=True))
        return focused
    if chosen.projection is not None:
        products = x @ chosen.projection.to(x).t()
        positive: Tensor = (products - x.square().sum(-1, keepdim=True) / 2).exp() * chosen.projection.size(0) ** -0.5
        return positive
    return x
