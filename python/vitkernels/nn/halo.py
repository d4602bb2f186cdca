"""HaloNet's attention: a block of queries and the keys around it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.functional import halo_attention
from vitkernels.nn.maps import check_heads, check_map, integers

__all__ = ["HaloAttention"]


class _RelativeEmbeddings(nn.Module):
    def __init__(self, window: int, dim_head: int, std: float, **factory: Any) -> None:
        super().__init__()
        self.height_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, **factory))
        self.width_rel = nn.Parameter(torch.empty(2 * window - 1, dim_head, **factory))
        nn.init.trunc_normal_(self.height_rel, std=std)
        nn.init.trunc_normal_(self.width_rel, std=std)


class HaloAttention(nn.Module):
    """Attention of a block of queries to the block and a halo around it; timm's ``HaloAttn``, fused.

    Arguments, parameter names and shapes are timm's, so its published weights load. Beyond the border of the map lie
    keys of zeros.

    Args:
        dim: channels of the map.
        dim_out: channels of the output, default ``dim``.
        feat_size: size of the map; not needed, as in timm.
        stride: 2 halves the map by an average pool; needs ``avg_down`` or an odd ``block_size``.
        num_heads: number of heads.
        dim_head: query and key channels of a head, default from ``dim_out * qk_ratio``.
        block_size: keys of a block on an axis, which divides the map.
        halo_size: keys on either side of it.
        qk_ratio: query and key channels as a share of ``dim_out``.
        qkv_bias: whether ``q`` and ``kv`` have a bias.
        avg_down: halve the map by an average pool.
        scale_pos_embed: scale the relative logits as well.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim_out`` is not a multiple of ``num_heads``, or with a ``stride`` that is neither 1 nor a
            pool by 2.

    Source: Vaswani et al., "Scaling Local Self-Attention for Parameter Efficient Visual Backbones" (2021), section 2.2.
    """

    def __init__(
        self,
        dim: int,
        dim_out: int | None = None,
        feat_size: tuple[int, int] | None = None,
        stride: int = 1,
        num_heads: int = 8,
        dim_head: int | None = None,
        block_size: int = 8,
        halo_size: int = 3,
        qk_ratio: float = 1.0,
        qkv_bias: bool = False,
        avg_down: bool = False,
        scale_pos_embed: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        dim_out = dim_out or dim
        integers("HaloAttention", "dim", dim, 1)
        check_heads("HaloAttention", "dim_out", dim_out, num_heads)
        integers("HaloAttention", "block_size", block_size, 1)
        integers("HaloAttention", "halo_size", halo_size, 1, at_least=0)
        if stride not in (1, 2):
            raise RuntimeError(f"vitkernels.nn.HaloAttention: stride is {stride}, takes 1 or 2")
        self.num_heads, self.block_size, self.halo_size = num_heads, block_size, halo_size
        self.dim_head = dim_head or _in_eights(dim_out * qk_ratio) // num_heads
        self.scale = self.dim_head**-0.5
        self.scale_pos_embed = scale_pos_embed
        pooled = stride == 2 and (avg_down or block_size % 2 != 0)
        dim_qk = num_heads * self.dim_head
        if stride == 2 and not pooled:
            raise RuntimeError(
                "vitkernels.nn.HaloAttention: stride is 2, takes 1, or avg_down=True: timm's relative positions then "
                "count strided queries as if they were next to each other, which is no offset on the map"
            )
        self.q = nn.Conv2d(dim, dim_qk, 1, bias=qkv_bias, **factory)
        self.kv = nn.Conv2d(dim, dim_qk + dim_out, 1, bias=qkv_bias, **factory)
        self.pos_embed = _RelativeEmbeddings(block_size + 2 * halo_size, self.dim_head, self.scale, **factory)
        self.pool = nn.AvgPool2d(2, 2) if pooled else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, dim, height, width)`` to ``(B, dim_out, height // stride, width // stride)``."""
        check_map(self, x, "(B, dim, height, width)", is_convolved=True)
        q, kv = self.q(x), self.kv(x)
        q = q.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)  # [B, H, W, heads, d]
        kv = kv.unflatten(1, (self.num_heads, -1)).permute(0, 3, 4, 1, 2)
        k, v = kv[..., : self.dim_head], kv[..., self.dim_head :]
        rel_pos = [self._by_offset(t) for t in (self.pos_embed.height_rel, self.pos_embed.width_rel)]
        out = halo_attention(
            q, k, v, self.block_size, self.halo_size, scale=self.scale, rel_pos=rel_pos, outside="zero"
        )
        output: Tensor = self.pool(out.permute(0, 3, 4, 1, 2).flatten(1, 2))
        return output

    def _by_offset(self, table: Tensor) -> Tensor:
        """The operator's table from one by the key's place in its window less the query's in its block."""
        most = self.block_size + self.halo_size - 1  # the largest offset
        middle = (table.size(0) - 1) // 2 + self.halo_size  # of the key where the query is
        own = table[middle - most : middle + most + 1].flip(0)
        return own * self.scale if self.scale_pos_embed else own

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, block_size={self.block_size}, halo_size={self.halo_size}"


def _in_eights(channels: float) -> int:
    """The multiple of 8 next to ``channels``, and not less than nine tenths of it."""
    rounded = max(8, int(channels + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * channels else rounded
