"""The definition of linear attention, in plain PyTorch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkernels.feature_map import FeatureMap
from vitkernels.reference.attention import head_map_of, normalized

__all__ = ["features", "linear_attention", "linear_attention_varlen"]


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
    head_map: Tensor | None = None,
    own_value: Tensor | None = None,
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.linear_attention`.

    ``own_value``: the rows that ``residual_v`` adds, where they are not those of ``value``.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    if qk_norm == "l2":
        query, key = normalized(query), normalized(key)
    q, k = (features(t.to(wide), feature_map).transpose(1, 2) for t in (query, key))  # [B, H, N, D]
    v = value.to(wide).transpose(1, 2)  # [B, H, Nk, Dv]
    read = head_map_of(query, key, head_map)
    k, v = k[:, read], v[:, read]
    q = q * scale
    out = q @ (k.transpose(-1, -2) @ v)  # [B, H, Nq, Dv]
    if normalize:
        sums = q @ k.sum(-2).unsqueeze(-1) + eps  # [B, H, Nq, 1]
        out = torch.where(sums == 0, 0.0, out / torch.where(sums == 0, 1.0, sums))
    if residual_v:
        own = v if own_value is None else own_value.to(wide).transpose(1, 2)[:, read]  # [B, H, Nq, Dv]
        out = out + residual_v * own
    return out.transpose(1, 2).to(query.dtype)


def linear_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    **options: Any,
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.linear_attention_varlen`: a call for each sequence."""
    count, parts = len(cu_seqlens_q) - 1, []
    for i in range(max(count, 1)):  # no sequences: the attention of none
        rows, columns = (slice(int(c[i]), int(c[min(i + 1, count)])) for c in (cu_seqlens_q, cu_seqlens_k))
        q, k, v, own = query[None, rows], key[None, columns], value[None, columns], value[None, rows]
        parts.append(linear_attention(q, k, v, own_value=own, **options)[0])
    return torch.cat(parts)


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
