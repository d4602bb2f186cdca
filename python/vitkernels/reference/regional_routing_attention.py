"""The definition of attention between routed regions, in plain PyTorch: keys and values are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from vitkernels.reference.attention import attention, head_map_of

__all__ = ["regional_routing_attention"]


def regional_routing_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float | Tensor | None,
    region_graph: Tensor,
    region_size: int | Sequence[int],
    kv_region_size: int | Sequence[int] | None = None,
    *,
    qk_norm: Literal["l2"] | None = None,
    head_map: Tensor | None = None,
    outside: Literal["zero"] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.regional_routing_attention`."""
    of_queries = _tokens_of_regions(query.shape[1:-2], region_size).to(query.device)  # [regions, tokens]
    of_keys = _tokens_of_regions(key.shape[1:-2], region_size if kv_region_size is None else kv_region_size)
    batch, heads, regions = query.size(0), query.size(-2), of_queries.size(0)
    read = head_map_of(query.flatten(1, -3), key.flatten(1, -3), head_map)
    k, v = (_with_zeros(t)[:, :, read] for t in (key, value))  # [B, Nk + 1, H, D]

    tokens = of_keys.to(query.device)[region_graph].flatten(3)  # [B, H or 1, regions, keys]
    tokens = tokens.expand(batch, heads, regions, -1)
    k, v = (_gathered(t, tokens).movedim(1, 3).flatten(0, 1) for t in (k, v))  # [B regions, keys, H, D]
    bias = None
    if outside is None:
        absent = (tokens == key.shape[1:-2].numel()).transpose(1, 2).flatten(0, 1)  # [B regions, H, keys]
        zeros = torch.zeros(absent.shape, dtype=torch.promote_types(query.dtype, torch.float32), device=query.device)
        bias = zeros.masked_fill(absent, -torch.inf).unsqueeze(2)
    q = _with_zeros(query)[:, of_queries].flatten(0, 1)  # [B regions, queries, H, D]
    found = attention(q, k, v, scale=scale, qk_norm=qk_norm, bias=bias, return_lse=True)
    out, lse = (_on_map(t.unflatten(0, (batch, regions)), of_queries, query.shape[1:-2]) for t in found)
    return (out, lse) if return_lse else out


def _tokens_of_regions(sizes: Sequence[int], region_size: int | Sequence[int]) -> Tensor:
    """The numbers of the tokens of each region; beyond the map that behind the last token."""
    region = [region_size] * len(sizes) if isinstance(region_size, int) else list(region_size)
    counts = [-(-n // size) for n, size in zip(sizes, region, strict=True)]
    padded = torch.full([count * size for count, size in zip(counts, region, strict=True)], torch.Size(sizes).numel())
    padded[tuple(slice(n) for n in sizes)] = torch.arange(torch.Size(sizes).numel()).view(*sizes)
    for axis, (count, size) in enumerate(zip(counts, region, strict=True)):
        padded = padded.unflatten(2 * axis, (count, size))  # type: ignore[no-untyped-call]
    order = [*range(0, padded.dim(), 2), *range(1, padded.dim(), 2)]
    return padded.permute(order).reshape(torch.Size(counts).numel(), torch.Size(region).numel())


def _with_zeros(t: Tensor) -> Tensor:
    """``(B, N + 1, heads, d)``: the tokens, and behind them one of zeros."""
    flat = t.flatten(1, -3)
    return torch.cat([flat, flat.new_zeros(flat.size(0), 1, *flat.shape[2:])], 1)


def _gathered(t: Tensor, tokens: Tensor) -> Tensor:
    """``(B, heads, regions, keys, d)``."""
    b = torch.arange(t.size(0), device=t.device)[:, None, None, None]
    h = torch.arange(t.size(2), device=t.device)[None, :, None, None]
    return t[b, tokens, h]


def _on_map(t: Tensor, tokens: Tensor, sizes: Sequence[int]) -> Tensor:
    """``(B, *map, ...)`` from ``(B, regions, tokens, ...)``."""
    place = torch.empty(torch.Size(sizes).numel() + 1, dtype=torch.long, device=t.device)
    place[tokens.flatten()] = torch.arange(tokens.numel(), device=t.device)
    return t.flatten(1, 2)[:, place[:-1]].reshape(t.size(0), *sizes, *t.shape[3:])
