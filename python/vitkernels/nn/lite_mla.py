"""EfficientViT's multi-scale linear attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.feature_map import FeatureMap, encode
from vitkernels.functional import linear_attention
from vitkernels.nn.maps import check_map, integers, odd_padding

__all__ = ["LiteMLA"]

_Norm = Callable[..., nn.Module] | None


class _ConvNorm(nn.Module):
    """A projection of every pixel, under the names that it has in EfficientViT."""

    def __init__(self, in_channels: int, out_channels: int, bias: bool, norm: _Norm, **factory: Any) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 1, bias=bias, **factory)
        self.norm = nn.Identity() if norm is None else norm(out_channels, **factory)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(self.conv(x))
        return out


class LiteMLA(nn.Module):
    """Linear attention of heads at several scales; EfficientViT's module, fused.

    Queries, keys and values of the map, and of depthwise and grouped convolutions of them (``aggreg``), attend head by
    head. Parameter names and shapes are those of EfficientViT and of timm's ``efficientvit_mit.LiteMLA``, so their
    published weights load. The sums over the tokens are float32 in every dtype (float64 for float64). The convolutions
    compute in ``torch.channels_last``: inputs in this layout are not copied.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        heads: number of heads of each scale, default ``in_channels // dim * heads_ratio``.
        heads_ratio: see ``heads``.
        dim: channels of a head.
        use_bias: whether ``qkv`` with ``aggreg``, and ``proj``, have a bias; one value stands for both.
        norm_layer: norm of ``qkv`` and of ``proj``, called as ``norm_layer(channels, device=..., dtype=...)``, or
            ``None``; one value stands for both.
        feature_map: as in :func:`vitkernels.linear_attention`, but no random features.
        scales: kernel sizes of ``aggreg``, odd numbers.
        eps: added to the denominator; the default is timm's, EfficientViT's own code has 1e-15.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: on a number of channels, heads or scales out of range, or random features.

    Source: Cai et al., "EfficientViT: Multi-Scale Linear Attention for High-Resolution Dense Prediction" (2023),
    section 3.1.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        heads: int | None = None,
        heads_ratio: float = 1.0,
        dim: int = 8,
        use_bias: bool | tuple[bool, bool] = False,
        norm_layer: _Norm | tuple[_Norm, _Norm] = (None, nn.BatchNorm2d),
        *,
        feature_map: str | FeatureMap = "relu",
        scales: Sequence[int] = (5,),
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        for name, n in (("in_channels", in_channels), ("out_channels", out_channels), ("dim", dim)):
            integers("LiteMLA", name, n, 1)
        heads = int(in_channels // dim * heads_ratio) if heads is None else heads
        integers("LiteMLA", "heads", heads, 1)
        for scale in scales:
            odd_padding("LiteMLA", "scales", scale)
        self.feature_map, _ = encode("linear_attention", feature_map)
        if self.feature_map.projection is not None:
            raise RuntimeError("vitkernels.nn.LiteMLA: feature_map is 'performer', takes one without a projection")
        biases = use_bias if isinstance(use_bias, tuple) else (use_bias, use_bias)
        norms = norm_layer if isinstance(norm_layer, tuple) else (norm_layer, norm_layer)
        channels = heads * dim
        self.dim, self.heads, self.eps = dim, heads * (1 + len(scales)), eps
        self.qkv = _ConvNorm(in_channels, 3 * channels, biases[0], norms[0], **factory)
        self.aggreg = nn.ModuleList(self._scale(heads, dim, scale, biases[0], **factory) for scale in scales)
        self.proj = _ConvNorm(channels * (1 + len(scales)), out_channels, biases[1], norms[1], **factory)

    @staticmethod
    def _scale(heads: int, dim: int, kernel_size: int, bias: bool, **factory: Any) -> nn.Sequential:
        """Tokens of a neighbourhood of every pixel: each channel by itself, then those of a query, key or value."""
        channels = 3 * heads * dim
        near = nn.Conv2d(
            channels, channels, kernel_size, padding=kernel_size // 2, groups=channels, bias=bias, **factory
        )
        return nn.Sequential(near, nn.Conv2d(channels, channels, 1, groups=3 * heads, bias=bias, **factory))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, in_channels, height, width)`` to ``(B, out_channels, height, width)``."""
        check_map(self, x, "(B, in_channels, height, width)", is_convolved=True)
        # In channels last, a pixel is a row: the attention reads it in place, and depthwise convolutions are faster.
        qkv = self.qkv(x.contiguous(memory_format=torch.channels_last))  # [B, 3 C, height, width]
        scales = torch.cat([qkv, *(convolved(qkv) for convolved in self.aggreg)], 1)  # [B, scales 3 C, height, width]
        # The channels of a head are its query's, its key's and its value's.
        tokens = scales.permute(0, 2, 3, 1).flatten(1, 2)  # [B, N, scales 3 C]
        q, k, v = torch.unflatten(tokens, -1, (self.heads, 3, self.dim)).unbind(-2)  # [B, N, H, d]
        out = linear_attention(q, k, v, feature_map=self.feature_map, eps=self.eps)
        on_map = torch.unflatten(out.flatten(2), 1, tuple(x.shape[2:])).permute(0, 3, 1, 2)  # [B, C, height, width]
        projected: Tensor = self.proj(on_map)
        return projected.contiguous() if x.is_contiguous() else projected

    def extra_repr(self) -> str:
        return f"heads={self.heads}, dim={self.dim}, feature_map={self.feature_map.name!r}"
