"""Attention inside convolutional networks: the input and the output are ``(B, C, H, W)``."""

from __future__ import annotations

from torch import Tensor, nn

from vitkernels.functional import attention
from vitkernels.integrations.masks import mask_fits
from vitkernels.integrations.shapes import map_of, split_last, tokens_of
from vitkernels.integrations.swap import Fused
from vitkernels.integrations.timm.forward import REL_POS_AND_DROPOUT, scale_of
from vitkernels.nn.masks import mask_terms

__all__ = [
    "BiasedMapAttention",
    "LinearMapAttention",
    "MapAttention",
    "ModulatedAttention",
    "MultiQueryAttention",
    "PackedMapAttention",
    "StridedMapAttention",
]


class LinearMapAttention(Fused):
    """FastViT: linear projections of the pixels."""

    attributes = ("qkv", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(self.qkv(x.flatten(2).transpose(1, 2)), 3, self.num_heads, -1).unbind(2)
        out = self.proj_drop(self.proj(attention(q, k, v, scale=scale_of(self)).flatten(2)))
        return map_of(out, *x.shape[2:])


class PackedMapAttention(Fused):
    """Visformer: one convolution for queries, keys and values."""

    attributes = ("qkv", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(tokens_of(self.qkv(x)), 3, self.num_heads, -1).unbind(2)
        out = map_of(attention(q, k, v, scale=scale_of(self)), *x.shape[2:])
        return self.proj_drop(self.proj(out))  # type: ignore[no-any-return]


class MapAttention(Fused):
    """``timm.layers.attention2d.Attention2d``: the packed channels have the heads or the three kinds first."""

    attributes = ("qkv", "num_heads", "head_first", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if not mask_fits(attn_mask, x):
            return self.stock(x, attn_mask)  # type: ignore[no-any-return]
        bias, key_bias = mask_terms(attn_mask)
        out = attention(*_by_head(self, x), bias=bias, key_bias=key_bias)
        return self.proj_drop(self.proj(map_of(out, *x.shape[2:])))  # type: ignore[no-any-return]


class BiasedMapAttention(Fused):
    """CoAtNet: relative positions of its own, or shared by all blocks of a stage."""

    absorbed = REL_POS_AND_DROPOUT
    attributes = ("qkv", "num_heads", "scale", "head_first", "rel_pos", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attention(*_by_head(self, x), scale=scale_of(self), bias=bias)
        return self.proj_drop(self.proj(map_of(out, *x.shape[2:])))  # type: ignore[no-any-return]


def _by_head(module: Fused, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    packed = tokens_of(module.qkv(x))
    if module.head_first:
        q, k, v = split_last(packed, module.num_heads, -1).chunk(3, dim=-1)
    else:
        q, k, v = split_last(packed, 3, module.num_heads, -1).unbind(2)
    return q, k, v


class MultiQueryAttention(Fused):
    """MobileNetV4: all heads share one key and one value, which may lie on a coarser grid."""

    attributes = (
        "query", "key", "value", "num_heads", "scale", "query_strides", "einsum", "attn_drop", "output",
    )  # fmt: skip

    def attend(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        # With einsum a mask has its axes in another order.
        if (self.einsum and attn_mask is not None) or not mask_fits(attn_mask, x):
            return self.stock(x, attn_mask)  # type: ignore[no-any-return]
        height, width = (n // stride for n, stride in zip(x.shape[2:], self.query_strides, strict=True))
        q = split_last(tokens_of(self.query(x)), self.num_heads, -1)
        k, v = (tokens_of(t).unsqueeze(2) for t in (self.key(x), self.value(x)))
        bias, key_bias = mask_terms(attn_mask)
        out = attention(q, k, v, scale=scale_of(self), bias=bias, key_bias=key_bias)
        return self.output(map_of(out, height, width))  # type: ignore[no-any-return]


class ModulatedAttention(Fused):
    """iFormer: one head, multiplied with a gate before the projection."""

    attributes = ("window_size", "v_gate", "gate_act", "q", "k", "scale", "attn_drop", "proj")

    @staticmethod
    def obstacle(module: nn.Module) -> str:
        return "windows are not fused yet" if module.window_size else ""

    def attend(self, x: Tensor) -> Tensor:
        value, gate = self.gate_act(self.v_gate(x)).chunk(2, dim=1)
        q, k, v = (tokens_of(t).unsqueeze(2) for t in (self.q(x), self.k(x), value))
        out = map_of(attention(q, k, v, scale=scale_of(self)), *x.shape[2:])
        return self.proj(out * gate)  # type: ignore[no-any-return]


class StridedMapAttention(Fused):
    """LowFormer and CPUBone: attention on a coarser grid between a strided and a transposed convolution."""

    attributes = ("conv_proj", "pwise", "num_heads", "scale", "o_proj", "upsampling")
    small_kernels = False  # CPUBone has the choice, and then pads odd sizes
    att_stride = 1

    def attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        if self.small_kernels:
            x = nn.functional.pad(x, (0, -width % self.att_stride, 0, -height % self.att_stride))
        packed = self.pwise(self.conv_proj(x))
        q, k, v = split_last(tokens_of(packed), self.num_heads, -1).chunk(3, dim=-1)
        out = self.o_proj(map_of(attention(q, k, v, scale=scale_of(self)), *packed.shape[2:]))
        return self.upsampling(out)[..., :height, :width]  # type: ignore[no-any-return]
