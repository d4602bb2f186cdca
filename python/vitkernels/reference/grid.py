"""Terms by the offset between two tokens of a grid, as dense matrices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["by_offset", "relative_logits"]


def _offsets(sizes: Sequence[int], device: torch.device) -> Tensor:
    """``(N, N, axes)``: index of the offset of token ``i`` from token ``j`` on every axis."""
    axes = torch.meshgrid(*(torch.arange(n, device=device) for n in sizes), indexing="ij")
    place = torch.stack([a.flatten() for a in axes], -1)  # [N, axes]
    return place[:, None] - place + torch.tensor(sizes, device=device) - 1


def _with_prefix(dense: Tensor, num_prefix_tokens: int, value: float) -> Tensor:
    return torch.nn.functional.pad(dense, (num_prefix_tokens, 0) * 2, value=value)


def by_offset(table: Tensor, num_prefix_tokens: int, absent: float) -> Tensor:
    """``(heads or 1, N, N)`` from ``(heads or 1, 2 n - 1 for each axis)``; ``absent`` for tokens without a place."""
    index = _offsets([(size + 1) // 2 for size in table.shape[1:]], table.device)
    by_head = table.movedim(0, -1)[index.unbind(-1)]  # [N, N, heads]
    return _with_prefix(by_head.movedim(-1, 0), num_prefix_tokens, absent)


def relative_logits(query: Tensor, rel_pos: Sequence[Tensor], num_prefix_tokens: int) -> Tensor:
    """``(B, heads, N, N)`` from a query ``(B, heads, N, d)``: its products with the embeddings of the offsets."""
    query = query[:, :, num_prefix_tokens:]
    index = _offsets([(table.size(-2) + 1) // 2 for table in rel_pos], query.device)
    total = query.new_zeros(())
    for table, offset in zip(rel_pos, index.unbind(-1), strict=True):
        embedding = table.to(query.dtype).expand(query.size(1), -1, -1)[:, offset]  # [H, N, N, d]
        total = total + torch.einsum("bhid,hijd->bhij", query, embedding)
    return _with_prefix(total, num_prefix_tokens, 0.0)
