"""T2T-ViT's transformers between the steps that join neighbouring tokens."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.feature_map import FeatureMap
from vitkernels.functional import attention, linear_attention
from vitkernels.nn.layers import Mlp
from vitkernels.nn.maps import check_heads, check_input, integers, ratio

__all__ = ["TokenPerformer", "TokenTransformer"]


class TokenPerformer(nn.Module):
    """Linear attention with random features and an MLP, which change the number of channels; T2T-ViT's, fused.

    Parameter names and shapes are T2T-ViT's (``kqv``, ``proj``, ``norm1``, ``norm2``, ``mlp``, ``w``), so its published
    weights load. ``w`` is drawn once, with orthogonal rows, and does not learn. Features and sums are float32 in every
    dtype (float64 for float64).

    Args:
        dim: channels of the input.
        in_dim: channels of the output, and of the one head.
        kernel_ratio: number of random features, as a multiple of ``in_dim``.
        drop: dropout of the output of the attention and of the MLP, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: on a number of channels or a ratio out of range.

    Source: Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (2021), section
    3.1; Choromanski et al., "Rethinking Attention with Performers" (2021), eq. 5.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        kernel_ratio: float = 0.5,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        integers("TokenPerformer", "dim", dim, 1)
        integers("TokenPerformer", "in_dim", in_dim, 1)
        ratio("TokenPerformer", "kernel_ratio", kernel_ratio, in_dim)
        self.kqv = nn.Linear(dim, 3 * in_dim, **factory)
        self.proj = nn.Linear(in_dim, in_dim, **factory)
        self.proj_drop = nn.Dropout(drop)
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.norm2 = nn.LayerNorm(in_dim, **factory)
        self.mlp = nn.Sequential(
            nn.Linear(in_dim, in_dim, **factory), nn.GELU(), nn.Linear(in_dim, in_dim, **factory), nn.Dropout(drop)
        )
        num_features = int(in_dim * kernel_ratio)
        # 16-bit dtypes have no QR decomposition.
        rows = nn.init.orthogonal_(torch.empty(num_features, in_dim, device=device, dtype=torch.float32))
        self.w = nn.Parameter((rows * math.sqrt(num_features)).to(self.proj.weight.dtype), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, dim)`` to ``(B, N, in_dim)``."""
        check_input(self, x, "(B, N, dim)")
        k, q, v = torch.unflatten(self.kqv(self.norm1(x)), -1, (3, 1, -1)).unbind(-3)  # [B, N, 1, in_dim]
        features = FeatureMap("performer", projection=self.w)
        out = linear_attention(q, k, v, feature_map=features, eps=1e-8)
        tokens = v.squeeze(2) + self.proj_drop(self.proj(out.squeeze(2)))  # [B, N, in_dim]
        output: Tensor = tokens + self.mlp(self.norm2(tokens))
        return output


class TokenTransformer(nn.Module):
    """Softmax attention and an MLP, which change the number of channels; T2T-ViT's, fused.

    Parameter names and shapes are T2T-ViT's (``norm1``, ``attn.qkv``, ``attn.proj``, ``norm2``, ``mlp.fc1``,
    ``mlp.fc2``), so its published weights load.

    Args:
        dim: channels of the input.
        in_dim: channels of the output, and of all heads together.
        num_heads: number of heads.
        mlp_ratio: width of the MLP, as a multiple of ``in_dim``.
        qkv_bias: whether ``attn.qkv`` has a bias.
        qk_scale: factor on the logits, default ``(dim // num_heads) ** -0.5``, of the input's channels as published.
        drop: dropout of the output of the attention and of the MLP, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``in_dim`` is not a multiple of ``num_heads``, or on a ratio out of range.

    Source: Yuan et al., "Tokens-to-Token ViT: Training Vision Transformers from Scratch on ImageNet" (2021), section
    3.1.
    """

    def __init__(
        self,
        dim: int,
        in_dim: int,
        num_heads: int = 1,
        mlp_ratio: float = 1.0,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        integers("TokenTransformer", "dim", dim, 1)
        check_heads("TokenTransformer", "in_dim", in_dim, num_heads)
        ratio("TokenTransformer", "mlp_ratio", mlp_ratio, in_dim)
        self.num_heads = num_heads
        self.scale = max(1, dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.norm1 = nn.LayerNorm(dim, **factory)
        self.attn = _Projections(dim, in_dim, qkv_bias, **factory)
        self.norm2 = nn.LayerNorm(in_dim, **factory)
        self.mlp = Mlp(in_dim, int(in_dim * mlp_ratio), **factory)
        self.drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, N, dim)`` to ``(B, N, in_dim)``."""
        check_input(self, x, "(B, N, dim)")
        qkv = torch.unflatten(self.attn.qkv(self.norm1(x)), -1, (3, self.num_heads, -1))  # [B, N, 3, H, d]
        q, k, v = qkv.unbind(-3)  # [B, N, H, d]
        out = attention(q, k, v, scale=self.scale).flatten(2)  # [B, N, in_dim]
        # The values take the place of the input, which has other channels.
        tokens = v.flatten(2) + self.drop(self.attn.proj(out))  # [B, N, in_dim]
        output: Tensor = tokens + self.drop(self.mlp(self.norm2(tokens)))
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}"


class _Projections(nn.Module):
    """What holds the projections under the names that they have in T2T-ViT."""

    def __init__(self, dim: int, in_dim: int, qkv_bias: bool, **factory: Any) -> None:
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * in_dim, bias=qkv_bias, **factory)
        self.proj = nn.Linear(in_dim, in_dim, **factory)
