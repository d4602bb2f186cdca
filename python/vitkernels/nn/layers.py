"""What transformer blocks are made of."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from vitkernels.functional import attention
from vitkernels.nn.attention import Attention

__all__ = ["CrossAttention", "CrossLayer", "Mlp", "SelfLayer"]


class Mlp(nn.Module):
    """Two linear layers with GELU between; timm's names."""

    def __init__(self, dim: int, hidden_dim: int, **factory: Any) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, **factory)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.fc2(self.act(self.fc1(x)))
        return out


class CrossAttention(nn.Module):
    """Multi-head attention of tokens to others, of ``context_dim`` channels."""

    def __init__(self, dim: int, context_dim: int, num_heads: int, qkv_bias: bool, **factory: Any) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = nn.Linear(dim, dim, bias=qkv_bias, **factory)
        self.kv = nn.Linear(context_dim, 2 * dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(dim, dim, **factory)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """``(B, N, dim)`` and ``(B, M, context_dim)`` to ``(B, N, dim)``."""
        q = self.q(x).unflatten(-1, (self.num_heads, -1))  # [B, N, H, d]
        k, v = self.kv(context).unflatten(-1, (2, self.num_heads, -1)).unbind(-3)  # [B, M, H, d]
        out: Tensor = self.proj(attention(q, k, v).flatten(2))
        return out


class SelfLayer(nn.Module):
    """A layer of a vision transformer; timm's names."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, **factory: Any) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = Attention(dim, num_heads, qkv_bias=qkv_bias, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class CrossLayer(nn.Module):
    """The same with attention to other tokens."""

    def __init__(
        self, dim: int, context_dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, **factory: Any
    ) -> None:
        super().__init__()
        self.norm_q = nn.LayerNorm(dim, **factory)
        self.norm_kv = nn.LayerNorm(context_dim, **factory)
        self.attn = CrossAttention(dim, context_dim, num_heads, qkv_bias, **factory)
        self.norm2 = nn.LayerNorm(dim, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn(self.norm_q(x), self.norm_kv(context))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out
