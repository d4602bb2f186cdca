"""Neighborhood attention: NATTEN's modules."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.axes import Neighborhood
from vitkernels.functional import na1d, na2d, na3d
from vitkernels.nn.maps import check_heads, check_map, integers, no_dropout

__all__ = ["NeighborhoodAttention1D", "NeighborhoodAttention2D", "NeighborhoodAttention3D"]

_CALLS: dict[int, Callable[..., Tensor]] = {1: na1d, 2: na2d, 3: na3d}


class _NeighborhoodAttention(nn.Module):
    num_axes: int

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        dilation: int | tuple[int, ...] = 1,
        is_causal: bool | tuple[bool, ...] = False,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        proj_drop: float = 0.0,
        *,
        rel_pos_bias: bool = False,
        attn_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name, n = type(self).__name__, self.num_axes
        no_dropout(name, attn_drop)
        check_heads(name, "embed_dim", embed_dim, num_heads)
        options = {"kernel_size": kernel_size, "stride": stride, "dilation": dilation}
        counts = [integers(name, option, given, n) for option, given in options.items()]
        flags = tuple(is_causal) if isinstance(is_causal, (list, tuple)) else (is_causal,) * n
        if len(flags) != n or not all(isinstance(flag, bool) for flag in flags):
            raise RuntimeError(f"vitkernels.nn.{name}: is_causal is {is_causal!r}, takes True or False, or {n} of them")
        self.axes = tuple(Neighborhood(*of_axis) for of_axis in zip(*counts, flags, strict=True))
        self.num_heads, self.head_dim = num_heads, embed_dim // num_heads
        self.scale = self.head_dim**-0.5 if qk_scale is None else qk_scale
        self.qkv = nn.Linear(embed_dim, embed_dim * 3, bias=qkv_bias, **factory)
        self.rpb = None
        if rel_pos_bias:
            offsets = [2 * axis.kernel_size - 1 for axis in self.axes]
            self.rpb = nn.Parameter(torch.empty(num_heads, *offsets, **factory))
            nn.init.trunc_normal_(self.rpb, std=0.02)
        self.proj = nn.Linear(embed_dim, embed_dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, *map, embed_dim)`` to the same."""
        check_map(self, x, "(B, " + "map, " * self.num_axes + "embed_dim)")
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)  # [B, *map, heads, d]
        of_axes = [(a.kernel_size, a.stride, a.dilation, a.is_causal) for a in self.axes]
        kernel_size, stride, dilation, is_causal = zip(*of_axes, strict=True)
        out = _CALLS[self.num_axes](q, k, v, kernel_size, stride, dilation, is_causal, self.scale, rpb=self.rpb)
        output: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}, axes={list(self.axes)}"


class NeighborhoodAttention1D(_NeighborhoodAttention):
    """As :class:`NeighborhoodAttention2D`, on sequences ``(B, length, embed_dim)``."""

    num_axes = 1


class NeighborhoodAttention2D(_NeighborhoodAttention):
    """Every token of a map ``(B, height, width, embed_dim)`` attends to those nearest to it; NATTEN's module, fused.

    Arguments, parameter names and shapes are NATTEN's, so its published weights load, those with ``rpb`` included.

    Args:
        embed_dim: channels of the map.
        num_heads: number of heads.
        kernel_size: keys of a neighborhood, one number or one for each axis.
        stride: so many successive queries share a neighborhood.
        dilation: tokens from one key of a neighborhood to the next.
        is_causal: only keys at or before the query on an axis.
        qkv_bias: whether ``qkv`` has a bias.
        qk_scale: factor on the logits, default ``head_dim ** -0.5``.
        proj_drop: dropout of the output, in training.
        rel_pos_bias: whether there is a bias ``rpb (heads, 2 kernel_size - 1, ...)`` by the offset of key from query.
        attn_drop: must be 0: the kernel has no dropout of attention weights.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``embed_dim`` is not a multiple of ``num_heads``.

    Source: Hassani et al., "Neighborhood Attention Transformer" (2023), section 3.
    """

    num_axes = 2


class NeighborhoodAttention3D(_NeighborhoodAttention):
    """As :class:`NeighborhoodAttention2D`, on volumes or videos ``(B, depth, height, width, embed_dim)``."""

    num_axes = 3
