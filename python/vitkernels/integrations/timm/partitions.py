"""Windows and grids that are not shifted: Twins, DaViT, TinyViT, MaxViT."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from vitkernels.functional import grid_attention
from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import DROPOUT, SOFTMAX, Fused
from vitkernels.integrations.timm.forward import REL_POS, scale_of
from vitkernels.integrations.windows import Projections, attend_in_windows

__all__ = ["LocallyGroupedAttention", "NormedWindowBlock", "PartitionBlock", "SpatialBlock"]

_NO_SHIFT = (0, 0)


class LocallyGroupedAttention(Fused):
    """Twins: the tokens of a map, without positions."""

    operator = "spatial_attention"
    attributes = ("ws", "qkv", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        x = torch.unflatten(x, 1, tuple(size))  # [B, height, width, C]
        out = attend_in_windows(x, (self.ws, self.ws), _NO_SHIFT, lambda x: _packed(self, x), scale=scale_of(self))
        return self.proj_drop(self.proj(out.flatten(1, 2)))  # type: ignore[no-any-return]


class SpatialBlock(Fused):
    """DaViT: without positions, between convolutions."""

    operator = "spatial_attention"
    absorbed: ClassVar = {"attn": ("timm.models.davit.WindowAttention",), "attn.softmax": SOFTMAX}
    attributes = (
        "cpe1", "cpe2", "norm1", "norm2", "mlp", "drop_path1", "drop_path2", "window_size", "attn", "attn.qkv",
        "attn.num_heads", "attn.scale", "attn.proj",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        attn, size = self.attn, x.shape[2:]
        tokens = self.cpe1(x).flatten(2).transpose(1, 2)
        pixels = torch.unflatten(self.norm1(tokens), 1, size)  # [B, height, width, C]
        out = attend_in_windows(pixels, self.window_size, _NO_SHIFT, lambda x: _packed(attn, x), scale=scale_of(attn))
        tokens = tokens + self.drop_path1(attn.proj(out).flatten(1, 2))
        x = self.cpe2(_pixels(tokens, size))
        if self.mlp is None:
            return x
        tokens = x.flatten(2).transpose(1, 2)
        return _pixels(tokens + self.drop_path2(self.mlp(self.norm2(tokens))), size)


class NormedWindowBlock(Fused):
    """TinyViT: a bias by distance; the attention has the norm inside, so that the padding has its bias."""

    operator = "spatial_attention"
    absorbed: ClassVar = {"attn": ("timm.models.tiny_vit.Attention",)}
    attributes = (
        "window_size", "local_conv", "mlp", "drop_path1", "drop_path2", "attn", "attn.norm", "attn.qkv",
        "attn.num_heads", "attn.key_dim", "attn.val_dim", "attn.scale", "attn.attention_biases",
        "attn.attention_bias_idxs", "attn.proj",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        attn, window = self.attn, (self.window_size, self.window_size)

        def project(x: Tensor) -> Projections:
            heads = split_last(attn.qkv(attn.norm(x)), attn.num_heads, -1)
            q, k, v = torch.split(heads, [attn.key_dim, attn.key_dim, attn.val_dim], dim=-1)
            return q, k, v

        distances = _by_offset(attn.attention_bias_idxs, window)  # [2 height - 1, 2 width - 1]
        table = attn.attention_biases[:, distances]  # [H, 2 height - 1, 2 width - 1]
        out = attend_in_windows(x, window, _NO_SHIFT, project, scale=scale_of(attn), bias_table=table)
        x = x + self.drop_path1(attn.proj(out))
        x = self.local_conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        tokens = x.flatten(1, 2)
        return (tokens + self.drop_path2(self.mlp(tokens))).view(x.shape)  # type: ignore[no-any-return]


class PartitionBlock(Fused):
    """MaxViT: windows or a grid, with relative positions of any kind."""

    operator = "spatial_attention"
    dropout_attribute = "attn.attn_drop"
    absorbed: ClassVar = {
        "attn": ("timm.models.maxxvit.AttentionCl",), "attn.rel_pos": REL_POS, "attn.attn_drop": DROPOUT,
    }  # fmt: skip
    attributes = (
        "norm1", "norm2", "mlp", "ls1", "ls2", "drop_path1", "drop_path2", "partition_block", "partition_size", "attn",
        "attn.qkv", "attn.num_heads", "attn.dim_head", "attn.head_first", "attn.scale", "attn.rel_pos", "attn.proj",
        "attn.proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        attn, size = self.attn, self.partition_size
        if any(n % part for n, part in zip(x.shape[1:3], size, strict=True)):
            return self.stock(x)  # type: ignore[no-any-return]  # which says so

        def project(x: Tensor) -> Projections:
            if not attn.head_first:
                return _packed(attn, x)
            q, k, v = split_last(attn.qkv(x), attn.num_heads, 3, attn.dim_head).unbind(4)
            return q, k, v

        table, scale = _table(attn.rel_pos), scale_of(attn)
        if self.partition_block:
            out = attend_in_windows(self.norm1(x), size, _NO_SHIFT, project, scale=scale, bias_table=table)
        else:
            out = grid_attention(*project(self.norm1(x)), size, scale=scale, bias_table=table).flatten(3)
        x = x + self.drop_path1(self.ls1(attn.proj_drop(attn.proj(out))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))  # type: ignore[no-any-return]


def _pixels(tokens: Tensor, size: Sequence[int]) -> Tensor:
    """``(B, height * width, C)`` as ``(B, C, height, width)``, without a copy."""
    return torch.unflatten(tokens.transpose(1, 2), 2, tuple(size))


def _packed(attention: Fused, x: Tensor) -> Projections:
    q, k, v = split_last(attention.qkv(x), 3, attention.num_heads, -1).unbind(3)
    return q, k, v


def _table(rel_pos: Any) -> Tensor | None:
    """The bias by offset ``(offsets, H)`` or ``(H, 2 height - 1, 2 width - 1)`` of timm's relative positions."""
    if rel_pos is None:
        return None
    table: Tensor
    if hasattr(rel_pos, "rel_coords_log"):
        table = rel_pos.bias_act(rel_pos.mlp(rel_pos.rel_coords_log).flatten(0, 1))
        return table if rel_pos.bias_gain is None else table * rel_pos.bias_gain
    table = rel_pos.relative_position_bias_table
    return table.flip(1, 2) if table.dim() == 3 else table  # TensorFlow's goes from the query to the key


def _by_offset(matrix: Tensor, window_size: Sequence[int]) -> Tensor:
    """``(..., N, N)`` of the tokens of a window, for one pair of each offset ``(..., 2 height - 1, 2 width - 1)``."""
    height, width = window_size
    pairs = matrix.unflatten(-1, (height, width)).unflatten(-3, (height, width))  # type: ignore[no-untyped-call]
    rows, columns = (torch.arange(1 - n, n, device=matrix.device) for n in (height, width))
    row, column = rows[:, None], columns[None, :]
    return pairs[..., row.clamp(min=0), column.clamp(min=0), (-row).clamp(min=0), (-column).clamp(min=0)]  # type: ignore[no-any-return]
