"""Attention along two directions at once: CSWin's stripes, CCNet's rows with columns."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.functional import attention, criss_cross_attention, cross_shaped_window_attention
from vitkernels.nn.maps import check_map, integers, no_dropout

__all__ = ["CrissCrossAttention", "CrossShapedWindowAttention"]


class _Stripes(nn.Module):
    """What holds the convolution of one direction, under the name that it has in CSWin."""

    def __init__(self, dim: int, **factory: Any) -> None:
        super().__init__()
        self.get_v = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, **factory)

    def forward(self, v: Tensor, height: int, width: int) -> Tensor:
        """``(B, H, W, dim)`` to the same: the convolution within each stripe of ``height`` times ``width``."""
        B, H, W, C = v.shape
        v = v.reshape(B, H // height, height, W // width, width, C).permute(0, 1, 3, 5, 2, 4)  # [B, y, x, C, h, w]
        out: Tensor = self.get_v(v.flatten(0, 2)).reshape(v.shape)
        return out.permute(0, 1, 4, 2, 5, 3).reshape(B, H, W, C)


class CrossShapedWindowAttention(nn.Module):
    """Attention in vertical stripes for half of the heads, in horizontal ones for the others; CSWin's, fused.

    Parameter names and shapes are those of the attention in CSWin's ``CSWinBlock`` (``qkv``, ``attns.0.get_v``,
    ``attns.1.get_v``, ``proj``), so its published weights load.

    Args:
        dim: channels of the map.
        num_heads: number of heads, even unless ``last_stage``.
        split_size: width of a stripe, which divides the map.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on the logits, default ``head_dim ** -0.5``.
        attn_drop: must be 0: the kernel has no dropout of attention weights.
        drop: dropout of the output; CSWin has none.
        last_stage: the stripe is the map: all heads attend to all of it.
        device: of the parameters.
        dtype: of the parameters.

    Source: Dong et al., "CSWin Transformer" (2022), sections 3.2 and 3.3 (locally-enhanced positional encoding).
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        split_size: int = 7,
        qkv_bias: bool = False,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        drop: float = 0.0,
        last_stage: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        no_dropout("CrossShapedWindowAttention", attn_drop)
        integers("CrossShapedWindowAttention", "num_heads", num_heads, 1)
        integers("CrossShapedWindowAttention", "split_size", split_size, 1)
        branches = 1 if last_stage else 2
        integers("CrossShapedWindowAttention", "dim", dim, 1)
        if num_heads % branches != 0 or dim % num_heads != 0:
            raise RuntimeError(
                f"vitkernels.nn.CrossShapedWindowAttention: num_heads is {num_heads}, takes an even divisor of dim "
                f"({dim})"
            )
        self.num_heads, self.split_size = num_heads, split_size
        self.scale = (dim // num_heads) ** -0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias, **factory)
        self.attns = nn.ModuleList(_Stripes(dim // branches, **factory) for _ in range(branches))
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, height, width, dim)`` to the same."""
        check_map(self, x, is_convolved=True)
        height, width = x.shape[1:3]
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # [B, H, W, heads, d]
        values = v.flatten(-2).chunk(len(self.attns), -1)
        if len(self.attns) == 1:
            q, k, v = (t.flatten(1, 2) for t in (q, k, v))
            out = attention(q, k, v, scale=self.scale).view(*x.shape[:3], self.num_heads, v.size(-1))
            encoding = self.attns[0](values[0], height, width)
        else:
            for name, n in (("height", height), ("width", width)):
                if n % self.split_size != 0:
                    raise RuntimeError(
                        f"vitkernels.nn.CrossShapedWindowAttention: {name} is {n}, takes a multiple of split_size "
                        f"({self.split_size})"
                    )
            out = cross_shaped_window_attention(q, k, v, self.split_size, scale=self.scale)
            vertical = self.attns[0](values[0], height, self.split_size)
            encoding = torch.cat([vertical, self.attns[1](values[1], self.split_size, width)], -1)
        output: Tensor = self.proj_drop(self.proj(out.flatten(-2) + encoding))
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, split_size={self.split_size}"


class CrissCrossAttention(nn.Module):
    """Attention of every pixel to its row and its column, added to the input; CCNet's module, fused.

    Arguments, parameter names and shapes are CCNet's, so its published weights load. (Applied twice, with the same
    weights, every pixel reaches every other.)

    Args:
        in_dim: channels of the map, 8 or more: queries and keys have an eighth of them.
        device: of the parameters.
        dtype: of the parameters.

    Source: Huang et al., "CCNet: Criss-Cross Attention for Semantic Segmentation" (2019), section 3.2.
    """

    def __init__(self, in_dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        integers("CrissCrossAttention", "in_dim", in_dim, 1, at_least=8)
        self.query_conv = nn.Conv2d(in_dim, in_dim // 8, 1, **factory)
        self.key_conv = nn.Conv2d(in_dim, in_dim // 8, 1, **factory)
        self.value_conv = nn.Conv2d(in_dim, in_dim, 1, **factory)
        self.gamma = nn.Parameter(torch.zeros(1, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_dim, height, width)`` to the same."""
        check_map(self, x, "(B, in_dim, height, width)", is_convolved=True)
        convolutions = self.query_conv, self.key_conv, self.value_conv
        q, k, v = (conv(x).permute(0, 2, 3, 1).unsqueeze(-2) for conv in convolutions)  # [B, H, W, 1, d]
        out = criss_cross_attention(q, k, v, scale=1.0)
        return self.gamma * out.squeeze(-2).permute(0, 3, 1, 2) + x
