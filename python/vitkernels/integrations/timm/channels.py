"""Attention between the channels of a head."""

from __future__ import annotations

from torch import Tensor

from vitkernels.functional import channel_attention
from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import Fused

__all__ = ["ChannelGroups", "CrossCovariance", "ScaledChannelGroups"]


class CrossCovariance(Fused):
    """XCiT and EdgeNeXt: channels of unit length, and a temperature for each head."""

    operator = "channel_attention"
    attributes = ("qkv", "num_heads", "temperature", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(self.qkv(x), 3, self.num_heads, -1).unbind(2)
        out = channel_attention(q, k, v, scale=self.temperature.flatten(), qk_norm="l2")
        return self.proj_drop(self.proj(out.flatten(2)))  # type: ignore[no-any-return]


class ChannelGroups(Fused):
    """DaViT: keys and values make the weights, queries are what they weigh."""

    operator = "channel_attention"
    attributes = ("qkv", "num_heads", "scale", "proj")

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(self.qkv(x), 3, self.num_heads, -1).unbind(2)
        return self.proj(channel_attention(k, v, q, scale=self.scale).flatten(2))  # type: ignore[no-any-return]


class ScaledChannelGroups(Fused):
    """DaViT of Florence-2: queries and keys make the weights, which may be scaled by the number of tokens."""

    operator = "channel_attention"
    attributes = ("qkv", "groups", "head_dim", "dynamic_scale", "proj")

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(self.qkv(x), 3, self.groups, -1).unbind(2)
        scale = (x.shape[1] if self.dynamic_scale else self.head_dim) ** -0.5
        return self.proj(channel_attention(q, k, v, scale=scale).flatten(2))  # type: ignore[no-any-return]
