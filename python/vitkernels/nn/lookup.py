"""LookupViT: a block that computes on few tokens and keeps many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.functional import attention, attention_transposed
from vitkernels.nn.layers import Mlp, SelfLayer
from vitkernels.nn.maps import check_heads, check_input, ratio

__all__ = ["LookupViTBlock"]


class LookupViTBlock(nn.Module):
    """A block on a few compressed tokens, which read from all tokens and write back through the same attention map.

    The compressed tokens attend to all tokens (``q``, ``kv``, ``proj``), then go through a layer of a vision
    transformer (``layer``). Values made of them (``write_v``) return to all tokens through the transposed map of the
    first step (``write_proj``), and these go through a narrow MLP (``mlp``). Every step normalises its input and adds
    to it. The map is never stored.

    Args:
        dim: channels of all tokens.
        num_heads: number of heads.
        mlp_ratio: width of the MLP of the compressed tokens, as a multiple of ``dim``.
        lookup_mlp_ratio: width of the MLP of all tokens.
        qkv_bias: whether projections to queries, keys and values have a bias.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``, or on a ratio without a channel.

    Source: Koner et al., "LookupViT: Compressing visual information to a limited number of tokens" (2024), section 3.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        lookup_mlp_ratio: float = 0.5,
        qkv_bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        check_heads("LookupViTBlock", "dim", dim, num_heads)
        ratio("LookupViTBlock", "mlp_ratio", mlp_ratio, dim)
        ratio("LookupViTBlock", "lookup_mlp_ratio", lookup_mlp_ratio, dim)
        self.dim, self.num_heads = dim, num_heads
        self.norm_q = nn.LayerNorm(dim, **factory)
        self.norm_kv = nn.LayerNorm(dim, **factory)
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)
        self.layer = SelfLayer(dim, num_heads, mlp_ratio, qkv_bias, **factory)
        self.norm_write = nn.LayerNorm(dim, **factory)
        self.write_v = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.write_proj = nn.Linear(dim, dim, **factory)
        self.norm_mlp = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * lookup_mlp_ratio), **factory)

    def forward(self, x: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
        """Read, compute and write back.

        Args:
            x: all tokens, ``(B, N, dim)``.
            compressed: ``(B, M, dim)``, M much smaller than N. The paper's first block is given the map of patches,
                resized to a smaller one.

        Returns:
            ``x`` and ``compressed`` after the block, in their shapes.

        Raises:
            RuntimeError: if one of them has another shape than that.
        """
        check_input(self, x, "(B, N, dim)")
        check_input(self, compressed, "(B, M, dim)", "compressed")
        q = torch.unflatten(self.q(self.norm_q(compressed)), -1, (self.num_heads, -1))  # [B, M, H, d]
        kv = torch.unflatten(self.kv(self.norm_kv(x)), -1, (2, self.num_heads, -1))  # [B, N, 2, H, d]
        k, v = kv.unbind(-3)  # [B, N, H, d]
        read, lse = attention(q, k, v, return_lse=True)  # [B, M, H, d], [B, M, H]
        compressed = self.layer(compressed + self.proj(read.flatten(2)))
        values = torch.unflatten(self.write_v(self.norm_write(compressed)), -1, (self.num_heads, -1))  # [B, M, H, d]
        written = attention_transposed(q, k, values, lse)  # [B, N, H, d]
        x = x + self.write_proj(written.flatten(2))
        return x + self.mlp(self.norm_mlp(x)), compressed

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"
