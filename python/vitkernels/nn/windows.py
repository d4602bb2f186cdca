"""Attention within windows and grids of a map, with a bias by offset."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vitkernels.functional import grid_attention, window_attention
from vitkernels.nn.maps import Restorable, check_heads, check_map, integers, no_dropout, pair

__all__ = ["GridAttention", "WindowAttention", "WindowAttentionV2"]


class WindowAttention(Restorable):
    """Attention within windows, shifted if wanted, of a map; Swin's ``WindowAttention``, fused.

    Arguments, parameter names and shapes are those of Swin and of timm's module of the same name, so their published
    weights load (the index that some files hold is not needed, and ignored). What differs is the input: the map, not
    its windows. ``shift_size`` takes the place of the cyclic shift and of the mask. The order of arguments is timm's;
    the one of Swin's authors, ``(dim, (height, width), num_heads)``, is taken as well, with the others by keyword.

    Args:
        dim: channels of the map.
        num_heads: number of heads.
        head_dim: channels of a head, default ``dim // num_heads``.
        window_size: height and width of a window, or one number for both.
        qkv_bias: whether ``qkv`` has a bias.
        attn_drop: must be 0: the kernel has no dropout of attention weights.
        proj_drop: dropout of the output, in training.
        shift_size: rows and columns before the first whole window, or one number for both.
        qk_scale: factor on the logits, default ``head_dim ** -0.5``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``, also where ``head_dim`` is given.

    Source: Liu et al., "Swin Transformer: Hierarchical Vision Transformer using Shifted Windows" (2021), section 3.2.
    """

    ignored: ClassVar = ("relative_position_index",)

    def __init__(
        self,
        dim: int,
        num_heads: int | tuple[int, int],
        head_dim: int | None = None,
        window_size: int | tuple[int, int] = 7,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        shift_size: int | tuple[int, int] = 0,
        qk_scale: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = "WindowAttention"
        no_dropout(name, attn_drop)
        if isinstance(num_heads, (list, tuple)):
            num_heads, head_dim, window_size = _in_timms_order(num_heads, head_dim, window_size)
        self.window_size, self.shift_size = _shifted_windows(name, window_size, shift_size)
        check_heads(name, "dim", dim, num_heads)  # with head_dim, too: it may be Swin's num_heads
        self.num_heads, self.scale = num_heads, qk_scale
        self.head_dim = head_dim or dim // num_heads
        attn_dim = self.head_dim * num_heads
        offsets = math.prod(2 * n - 1 for n in self.window_size)
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads, **factory))
        self.qkv = nn.Linear(dim, attn_dim * 3, bias=qkv_bias, **factory)
        self.proj = nn.Linear(attn_dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, height, width, dim)`` to the same. The windows at the border are smaller where they do not fit."""
        check_map(self, x)
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)  # [B, H, W, heads, d]
        out = window_attention(
            q, k, v, self.window_size, self.shift_size, scale=self.scale, bias_table=self.relative_position_bias_table
        )
        output: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return output

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, num_heads={self.num_heads}"


def _shifted_windows(
    module: str, window_size: int | tuple[int, int], shift_size: int | tuple[int, int]
) -> tuple[tuple[int, int], tuple[int, int]]:
    window, shift = pair(module, "window_size", window_size), pair(module, "shift_size", shift_size, at_least=0)
    if any(s >= n for s, n in zip(shift, window, strict=True)):
        raise RuntimeError(
            f"vitkernels.nn.{module}: shift_size is {shift_size}, takes less than window_size ({window_size})"
        )
    return window, shift


def _in_timms_order(
    window_size: tuple[int, int], num_heads: int | None, rest: object
) -> tuple[int, int | None, tuple[int, int]]:
    """``num_heads, head_dim, window_size`` from ``window_size, num_heads``, what Swin's authors have in their place."""
    if not isinstance(num_heads, int) or rest != 7:
        raise RuntimeError(
            f"vitkernels.nn.WindowAttention: num_heads is {window_size!r}, takes an integer, or in the order (dim, "
            "window_size, num_heads) all further arguments by keyword"
        )
    return num_heads, None, window_size


class WindowAttentionV2(Restorable):
    """Cosine attention within windows, with a bias that an MLP computes from the offset; Swin V2's, fused.

    Arguments, parameter names and shapes are those of timm's ``swin_transformer_v2.WindowAttention``. The input is the
    map, as in :class:`WindowAttention`.

    Args:
        dim: channels of the map.
        window_size: height and width of a window, or one number for both.
        num_heads: number of heads.
        qkv_bias: whether queries and values have a bias.
        attn_drop: must be 0: the kernel has no dropout of attention weights.
        proj_drop: dropout of the output, in training.
        pretrained_window_size: window that the MLP's coordinates are relative to; 0: this one.
        shift_size: rows and columns before the first whole window, or one number for both.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads``.

    Source: Liu et al., "Swin Transformer V2: Scaling Up Capacity and Resolution" (2022), sections 3.2 and 3.3.
    """

    ignored: ClassVar = ("relative_position_index", "relative_coords_table", "k_bias")
    relative_coords_table: Tensor

    def __init__(
        self,
        dim: int,
        window_size: int | tuple[int, int],
        num_heads: int,
        qkv_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        pretrained_window_size: int | tuple[int, int] = 0,
        shift_size: int | tuple[int, int] = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = "WindowAttentionV2"
        no_dropout(name, attn_drop)
        check_heads(name, "dim", dim, num_heads)
        self.window_size, self.shift_size = _shifted_windows(name, window_size, shift_size)
        self.pretrained_window_size = pair(name, "pretrained_window_size", pretrained_window_size, at_least=0)
        self.num_heads = num_heads
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10), **factory))
        self.cpb_mlp = nn.Sequential(
            nn.Linear(2, 512, **factory), nn.ReLU(), nn.Linear(512, num_heads, bias=False, **factory)
        )
        self.qkv = nn.Linear(dim, dim * 3, bias=False, **factory)
        self.q_bias = nn.Parameter(torch.zeros(dim, **factory)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim, **factory)) if qkv_bias else None
        self.proj = nn.Linear(dim, dim, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        self.register_buffer("relative_coords_table", None, persistent=False)
        self.init_non_persistent_buffers()

    def init_non_persistent_buffers(self) -> None:
        """Compute the coordinates of the offsets. timm calls this after ``to_empty``."""
        relative_to = [p or n for p, n in zip(self.pretrained_window_size, self.window_size, strict=True)]
        coordinates = [
            torch.arange(1 - n, n, dtype=torch.float32, device="cpu") / max(p - 1, 1)
            for n, p in zip(self.window_size, relative_to, strict=True)
        ]
        by_offset = torch.cartesian_prod(*coordinates) * 8
        table = by_offset.sign() * (by_offset.abs() + 1).log2() / math.log2(8)  # [offsets, 2]
        self.relative_coords_table = table.to(device=self.logit_scale.device, dtype=self.logit_scale.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, height, width, dim)`` to the same. The windows at the border are smaller where they do not fit."""
        check_map(self, x)
        qkv = self.qkv(x)
        if self.q_bias is not None and self.v_bias is not None:
            qkv = qkv + torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3)  # [B, H, W, heads, d]
        scale = self.logit_scale.clamp(max=math.log(100.0)).exp().flatten()
        table = 16 * self.cpb_mlp(self.relative_coords_table).sigmoid()  # [offsets, heads]
        out = window_attention(q, k, v, self.window_size, self.shift_size, scale=scale, qk_norm="l2", bias_table=table)
        output: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return output

    def extra_repr(self) -> str:
        return f"window_size={self.window_size}, shift_size={self.shift_size}, num_heads={self.num_heads}"


class _RelPosBias(Restorable):
    """What holds a table, under the name that it has in timm."""

    ignored: ClassVar = ("relative_position_index",)

    def __init__(self, offsets: int, num_heads: int, **factory: Any) -> None:
        super().__init__()
        self.relative_position_bias_table = nn.Parameter(torch.empty(offsets, num_heads, **factory))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)


class GridAttention(nn.Module):
    """Attention among tokens that are spread evenly over a map; timm's ``maxxvit.AttentionCl`` on a grid, fused.

    Parameter names and shapes are those of timm's ``AttentionCl`` with ``RelPosBias``, so MaxViT's published weights
    load.

    Args:
        dim: channels of the map.
        dim_head: channels of a head.
        grid_size: keys that a query sees on each axis, or one number for both; it divides the map.
        bias: whether ``qkv`` and ``proj`` have a bias.
        head_first: a head's query, key and value channels follow one another in ``qkv``'s output.
        attn_drop: must be 0: the kernel has no dropout of attention weights.
        proj_drop: dropout of the output, in training.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``dim_head``.

    Source: Tu et al., "MaxViT: Multi-Axis Vision Transformer" (2022), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int = 32,
        grid_size: int | tuple[int, int] = 7,
        bias: bool = True,
        head_first: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        no_dropout("GridAttention", attn_drop)
        integers("GridAttention", "dim", dim, 1)
        integers("GridAttention", "dim_head", dim_head, 1)
        if dim % dim_head != 0:
            raise RuntimeError(f"vitkernels.nn.GridAttention: dim is {dim}, takes a multiple of dim_head ({dim_head})")
        self.grid_size, self.head_first = pair("GridAttention", "grid_size", grid_size), head_first
        self.num_heads, self.dim_head = dim // dim_head, dim_head
        self.qkv = nn.Linear(dim, dim * 3, bias=bias, **factory)
        self.rel_pos = _RelPosBias(math.prod(2 * n - 1 for n in self.grid_size), self.num_heads, **factory)
        self.proj = nn.Linear(dim, dim, bias=bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, height, width, dim)`` to the same."""
        check_map(self, x)
        qkv = self.qkv(x)
        if self.head_first:
            q, k, v = qkv.unflatten(-1, (self.num_heads, 3, self.dim_head)).unbind(-2)  # [B, H, W, heads, d]
        else:
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, self.dim_head)).unbind(-3)
        out = grid_attention(q, k, v, self.grid_size, bias_table=self.rel_pos.relative_position_bias_table)
        output: Tensor = self.proj_drop(self.proj(out.flatten(-2)))
        return output

    def extra_repr(self) -> str:
        return f"grid_size={self.grid_size}, num_heads={self.num_heads}, dim_head={self.dim_head}"
