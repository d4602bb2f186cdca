"""Bi-level routing attention of a map: each region sees the few regions that are most alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from vitkernels.functional import bilevel_route, regional_routing_attention
from vitkernels.nn.maps import check_heads, check_map, integers, odd_padding

__all__ = ["BiLevelRoutingAttention"]


class BiLevelRoutingAttention(nn.Module):
    """BiFormer's ``BiLevelRoutingAttention``, fused: no key is gathered, and no attention map is kept.

    Arguments, parameter names and shapes are BiFormer's, so its published weights load. Of its options, the routing
    that its models use is here: hard, without parameters and without a gradient, to keys of full resolution.

    Args:
        dim: channels of the map.
        num_heads: number of heads.
        n_win: regions along each axis, of ``ceil(size / n_win)`` tokens: fewer where that many take all tokens. A map
            of 5 has 3 regions of 2, 2 and 1 for ``n_win`` of 4.
        qk_dim: channels of queries and keys, default ``dim``.
        qk_scale: factor on the logits, default ``qk_dim ** -0.5``: of all channels, not of a head's.
        topk: regions that a region sees; all of a map that has fewer.
        param_attention: ``"qkvo"``, or ``"qkv"`` without the last linear layer.
        side_dwconv: kernel size of the depthwise convolution of the values (LePE) that is added, an odd number, or 0
            for none.
        auto_pad: pads the input with zeros to a multiple of ``n_win``, as BiFormer does for dense prediction: then
            there are keys in the padding. Else the last regions of an axis are shorter.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` or ``qk_dim`` is not a multiple of ``num_heads``, or an option is another one.

    Source: Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention" (2023), section 3.2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        n_win: int = 7,
        qk_dim: int | None = None,
        qk_scale: float | None = None,
        topk: int = 4,
        param_attention: str = "qkvo",
        side_dwconv: int = 3,
        auto_pad: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        name = "BiLevelRoutingAttention"
        self.qk_dim = dim if qk_dim is None else qk_dim
        check_heads(name, "dim", dim, num_heads)
        check_heads(name, "qk_dim", self.qk_dim, num_heads)
        padding = odd_padding(name, "side_dwconv", side_dwconv, at_least=0)
        self.num_heads = num_heads
        (self.n_win,), (self.topk,) = integers(name, "n_win", n_win, 1), integers(name, "topk", topk, 1)
        if param_attention not in ("qkvo", "qkv"):
            raise RuntimeError(f"vitkernels.nn.{name}: param_attention is {param_attention!r}, takes 'qkvo' or 'qkv'")
        self.scale = self.qk_dim**-0.5 if qk_scale is None else qk_scale
        self.auto_pad = auto_pad
        self.lepe = nn.Conv2d(dim, dim, side_dwconv, padding=padding, groups=dim, **factory) if side_dwconv else None
        self.qkv = _QKVLinear(dim, self.qk_dim, **factory)
        self.wo: nn.Module = nn.Linear(dim, dim, **factory) if param_attention == "qkvo" else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """``(B, height, width, dim)`` to the same."""
        check_map(self, x, is_convolved=self.lepe is not None)
        sizes = x.shape[1:3]
        if self.auto_pad:
            bottom, right = (-n % self.n_win for n in sizes)
            x = pad(x, (0, 0, 0, right, 0, bottom))
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)) for t in self.qkv(x))  # [B, H, W, heads, d]
        region = [max(-(-n // self.n_win), 1) for n in x.shape[1:3]]
        num_regions = -(-x.size(1) // region[0]) * -(-x.size(2) // region[1])
        graph = bilevel_route(q, k, region, min(self.topk, num_regions))  # [B, 1, regions, topk]
        out = regional_routing_attention(q, k, v, self.scale, graph, region).flatten(-2)  # [B, H, W, dim]
        if self.lepe is not None:
            out = out + self.lepe(v.flatten(-2).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        output: Tensor = self.wo(out)
        return output[:, : sizes[0], : sizes[1]].contiguous() if self.auto_pad else output

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, n_win={self.n_win}, topk={self.topk}"


class _QKVLinear(nn.Module):
    """A linear layer for query, key and value, under the name that BiFormer's files have for it."""

    def __init__(self, dim: int, qk_dim: int, **factory: Any) -> None:
        super().__init__()
        self.sizes = [qk_dim, qk_dim, dim]
        self.qkv = nn.Linear(dim, sum(self.sizes), **factory)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        parts: tuple[Tensor, ...] = self.qkv(x).split(self.sizes, -1)
        return parts
