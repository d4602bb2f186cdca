"""Relative positions that depend on the query, one table for each axis: MViTv2 and SAM.

The logit of a query at row ``y`` and a key at row ``y'`` has a term ``q . R[y, y']``, and one for the columns. Both are
scalar products of more channels: the query's are its products with the embeddings of each row and each column of keys,
the key's say in which row and column it lies. So nothing of size queries x keys is made.

Source: Li et al., "MViTv2" (2022), equation 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vitkernels.functional import attention
from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import Fused
from vitkernels.integrations.timm.rope import rotate

__all__ = ["PooledAttention", "WindowOrGlobalAttention", "with_positions"]


def with_positions(
    q: Tensor, k: Tensor, embeddings: Sequence[Tensor], q_size: Sequence[int], k_size: Sequence[int], scale: float
) -> tuple[Tensor, Tensor]:
    """Queries and keys whose scalar products, unscaled, are the logits.

    Args:
        q: ``(B, prefix + Nq, heads, d)``; the prefix has no positions.
        k: ``(B, prefix + Nk, heads, d)``.
        embeddings: for each of the two axes ``(nq, nk, d)``.
        q_size: rows and columns of queries.
        k_size: rows and columns of keys.
        scale: of the product of content.
    """
    prefix = q.size(1) - q_size[0] * q_size[1]
    by_pixel = torch.unflatten(q[:, prefix:], 1, tuple(q_size))  # [B, y, x, H, d]
    rows, columns = (e.type_as(q) for e in embeddings)
    products = torch.cat(
        (torch.einsum("byxhd,ykd->byxhk", by_pixel, rows), torch.einsum("byxhd,xkd->byxhk", by_pixel, columns)), dim=-1
    ).flatten(1, 2)  # [B, Nq, H, nk]
    y, x = (torch.eye(n, dtype=k.dtype, device=k.device) for n in k_size)
    places = torch.cat((y.repeat_interleave(k_size[1], 0), x.repeat(k_size[0], 1)), dim=-1)  # [Nk, nk]
    if prefix:
        products, places = F.pad(products, (0, 0, 0, 0, prefix, 0)), F.pad(places, (0, 0, prefix, 0))
    places = places[:, None].expand(k.size(0), -1, k.size(2), -1)  # [B, prefix + Nk, H, nk]
    return torch.cat((q * scale, products), dim=-1), torch.cat((k, places), dim=-1)


def _by_offset(table: Tensor, num_queries: int, num_keys: int) -> Tensor:
    """``(num_queries, num_keys, d)`` of a table ``(offsets, d)``; the coarser axis counts in steps of the finer."""
    q_step, k_step = max(num_keys / num_queries, 1.0), max(num_queries / num_keys, 1.0)
    queries, keys = (torch.arange(n, device=table.device) for n in (num_queries, num_keys))
    offset = queries[:, None] * q_step - keys * k_step + (num_keys - 1) * k_step
    return table[offset.long()]


def _tables(module: Fused) -> tuple[Tensor, Tensor]:
    return module.rel_pos_h, module.rel_pos_w


class PooledAttention(Fused):
    """MViTv2: queries, keys and values pooled by strided convolutions; the queries are added to the result."""

    attributes = (
        "qkv", "num_heads", "scale", "has_cls_token", "pool_q", "norm_q", "pool_k", "norm_k", "pool_v", "norm_v",
        "rel_pos_type", "residual_pooling", "proj",
    )  # fmt: skip

    def attend(self, x: Tensor, feat_size: list[int]) -> tuple[Tensor, list[int]]:
        packed = split_last(self.qkv(x), 3, self.num_heads, -1).unbind(2)
        q, q_size = self._pooled(packed[0], feat_size, self.pool_q, self.norm_q)
        k, k_size = self._pooled(packed[1], feat_size, self.pool_k, self.norm_k)
        v, _ = self._pooled(packed[2], feat_size, self.pool_v, self.norm_v)
        if self.rel_pos_type == "spatial":
            embeddings = [_by_offset(*of_axis) for of_axis in zip(_tables(self), q_size, k_size, strict=True)]
            out = attention(*with_positions(q, k, embeddings, q_size, k_size, self.scale), v, scale=1.0)
        else:
            out = attention(q, k, v, scale=self.scale)
        if self.residual_pooling:
            out = out + q
        return self.proj(out.flatten(2)), q_size

    def _pooled(self, t: Tensor, size: list[int], pool: Any, norm: Any) -> tuple[Tensor, list[int]]:
        """``t (B, N, heads, d)`` on a coarser grid, and the size of that."""
        if pool is not None:
            first, pixels = t.tensor_split([int(self.has_cls_token)], dim=1)
            pixels = torch.unflatten(pixels.permute(0, 2, 3, 1).flatten(0, 1), 2, tuple(size))
            pooled = pool(pixels)  # [BH, d, y, x]
            size = list(pooled.shape[2:])
            heads = (t.size(0), t.size(2))
            pixels = torch.unflatten(pooled.flatten(2), 0, heads).permute(0, 3, 1, 2)  # [B, N, H, d]
            t = torch.cat((first, pixels), dim=1)
        if norm is not None:
            t = norm(t)
        return t, size


class WindowOrGlobalAttention(Fused):
    """SAM: ``x (B, H, W, dim)``, be it the map or one window of it."""

    attributes = (
        "qkv", "num_heads", "head_dim", "fused_attn", "scale", "q_norm", "k_norm", "use_rel_pos", "rope", "attn_drop",
        "proj", "proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        from timm.models.vision_transformer_sam import get_rel_pos

        size = x.shape[1:3]
        q, k, v = split_last(self.qkv(x.flatten(1, 2)), 3, self.num_heads, -1).unbind(2)
        q, k = self.q_norm(q), self.k_norm(k)
        scale = self.head_dim**-0.5 if self.fused_attn else self.scale
        if self.use_rel_pos:
            embeddings = [get_rel_pos(n, n, table) for n, table in zip(size, _tables(self), strict=True)]
            q, k = with_positions(q, k, embeddings, size, size, scale)
            scale = 1.0
        elif self.rope is not None:
            q, k = (rotate(t, self.rope.get_embed(), 0, False).type_as(v) for t in (q, k))
        out = attention(q, k, v, scale=scale).flatten(2)
        return self.proj_drop(self.proj(torch.unflatten(out, 1, size)))  # type: ignore[no-any-return]
