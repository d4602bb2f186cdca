"""BiFormer with fused attention: the state_dict keys are its authors', so their files load.

Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (2023), section 4 and table 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import vitkernels as vk
from torch import Tensor, nn

__all__ = ["BiFormer", "biformer_base", "biformer_small", "biformer_tiny"]

ALL_REGIONS = -2  # in place of topk: every token sees every token


class LePEAttention(nn.Module):
    """Dense attention of a map, and a depthwise convolution of the input."""

    def __init__(self, dim: int, side_dwconv: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.proj = nn.Linear(dim, dim)
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=side_dwconv // 2, groups=dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).flatten(1, 2).unbind(2)  # [B, N, heads, d]
        out = vk.attention(q, k, v).reshape(x.shape)  # [B, H, W, dim]
        result: Tensor = self.proj(out + self.lepe(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
        return result


class Block(nn.Module):
    """A convolution, attention and an MLP, each added to what it reads."""

    def __init__(self, dim: int, num_heads: int, n_win: int, topk: int, mlp_ratio: int, side_dwconv: int) -> None:
        super().__init__()
        self.pos_embed = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn: nn.Module = (
            LePEAttention(dim, side_dwconv)
            if topk == ALL_REGIONS
            else vk.nn.BiLevelRoutingAttention(dim, num_heads, n_win, topk=topk, side_dwconv=side_dwconv)
        )
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        hidden = mlp_ratio * dim
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.Identity(), nn.GELU(), nn.Linear(hidden, dim))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, dim, height, width)`` to the same."""
        x = (x + self.pos_embed(x)).permute(0, 2, 3, 1)  # [B, H, W, dim]
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x.permute(0, 3, 1, 2)


def _halved(in_channels: int, out_channels: int) -> list[nn.Module]:
    """A convolution that halves the map."""
    return [nn.Conv2d(in_channels, out_channels, 3, stride=2, padding=1), nn.BatchNorm2d(out_channels)]


class BiFormer(nn.Module):
    """Four stages of blocks; ``topks`` are regions that a region sees in each, ``ALL_REGIONS`` for dense attention.

    Args:
        depth: blocks of each stage.
        embed_dim: channels of each stage.
        topks: of each stage.
        n_win: regions along each axis.
        head_dim: channels of a head.
        mlp_ratio: hidden channels of an MLP, by its channels.
        side_dwconv: kernel size of the convolution beside the attention.
        in_chans: channels of the image.
        num_classes: outputs.
    """

    def __init__(
        self,
        depth: Sequence[int],
        embed_dim: Sequence[int],
        topks: Sequence[int] = (1, 4, 16, ALL_REGIONS),
        *,
        n_win: int = 7,
        head_dim: int = 32,
        mlp_ratio: int = 3,
        side_dwconv: int = 5,
        in_chans: int = 3,
        num_classes: int = 1000,
    ) -> None:
        super().__init__()
        stem = [*_halved(in_chans, embed_dim[0] // 2), nn.GELU(), *_halved(embed_dim[0] // 2, embed_dim[0])]
        self.downsample_layers = nn.ModuleList(
            [nn.Sequential(*stem), *(nn.Sequential(*_halved(before, after)) for before, after in pairwise(embed_dim))]
        )
        self.stages = nn.ModuleList(
            nn.Sequential(*(Block(dim, dim // head_dim, n_win, topk, mlp_ratio, side_dwconv) for _ in range(count)))
            for count, dim, topk in zip(depth, embed_dim, topks, strict=True)
        )
        self.norm = nn.BatchNorm2d(embed_dim[-1])
        self.head = nn.Linear(embed_dim[-1], num_classes)
        self.apply(_initialize)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_chans, height, width)`` to ``(B, num_classes)``."""
        for halve, stage in zip(self.downsample_layers, self.stages, strict=True):
            x = stage(halve(x))
        logits: Tensor = self.head(self.norm(x).flatten(2).mean(-1))
        return logits


@torch.no_grad()
def _initialize(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def biformer_tiny(num_classes: int = 1000) -> BiFormer:
    return BiFormer((2, 2, 8, 2), (64, 128, 256, 512), num_classes=num_classes)


def biformer_small(num_classes: int = 1000) -> BiFormer:
    return BiFormer((4, 4, 18, 4), (64, 128, 256, 512), num_classes=num_classes)


def biformer_base(num_classes: int = 1000) -> BiFormer:
    return BiFormer((4, 4, 18, 4), (96, 192, 384, 768), num_classes=num_classes)
