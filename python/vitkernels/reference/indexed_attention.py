"""The definition of attention to listed keys, in plain PyTorch: keys and values are gathered."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from vitkernels.reference.attention import attention, head_map_of

__all__ = ["indexed_attention"]


def indexed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_index: Tensor,
    key_count: Tensor | None = None,
    query_index: Tensor | None = None,
    *,
    duplicates: Literal["mean", "sum"] = "mean",
    scale: float | Tensor | None = None,
    qk_norm: Literal["l2"] | None = None,
    head_map: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.indexed_attention`."""
    batch, num_queries, heads = query.shape[:3]
    groups, width = key_index.shape[2:]
    if query_index is None:
        members = torch.arange(num_queries, device=query.device).view(1, 1, groups, num_queries // max(groups, 1))
    else:
        members = query_index.long()
    read = head_map_of(query, key, head_map)
    q = _gathered(query, members.expand(batch, heads, -1, -1))  # [B groups, members, H, D]
    k, v = (_gathered(t[:, :, read], key_index.long().expand(-1, heads, -1, -1)) for t in (key, value))
    bias = None
    if key_count is not None:
        absent = torch.arange(width, device=query.device) >= key_count.unsqueeze(-1)  # [B, H or 1, groups, keys]
        absent = absent.expand(-1, heads, -1, -1).transpose(1, 2).flatten(0, 1)
        zeros = torch.zeros(absent.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        bias = zeros.masked_fill(absent, -torch.inf).unsqueeze(2)
    found = attention(q, k, v, scale=scale, qk_norm=qk_norm, bias=bias, return_lse=True)
    out, lse = (t.unflatten(0, (batch, groups)).flatten(1, 2) for t in found)  # [B, groups members, H, ...]
    if query_index is None:
        return (out, lse) if return_lse else out
    places = members.expand(batch, heads, -1, -1).flatten(2).transpose(1, 2)  # [B, groups members, H]
    chosen = (places.unsqueeze(-1) == torch.arange(num_queries, device=out.device)).to(out.dtype)  # [B, M, H, Nq]
    sums = torch.einsum("bmhn,bmhd->bnhd", chosen, out)
    counts = chosen.sum(1).clamp(min=1).transpose(1, 2)  # [B, Nq, H]
    return sums if duplicates == "sum" else sums / counts.unsqueeze(-1)


def _gathered(t: Tensor, index: Tensor) -> Tensor:
    """``(B groups, listed, heads, d)`` of the tokens ``(B, heads, groups, listed)``."""
    b = torch.arange(t.size(0), device=t.device)[:, None, None, None]
    h = torch.arange(t.size(2), device=t.device)[None, :, None, None]
    return t[b, index, h].movedim(1, 3).flatten(0, 1)
