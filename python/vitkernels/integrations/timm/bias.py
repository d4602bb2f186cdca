"""Learned position terms added to the logits, or to the attention."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.functional import attention
from vitkernels.integrations.shapes import map_of, split_last, tokens_of
from vitkernels.integrations.swap import Fused
from vitkernels.integrations.timm.forward import REL_POS_AND_DROPOUT, packed_projection, scale_of

__all__ = [
    "BeitAttention",
    "DownsamplingAttention",
    "DownsamplingMapAttention",
    "GatedPositionalAttention",
    "RelativePositionAttention",
    "TableAttention",
]


class BeitAttention(Fused):
    """BEiT: a table of its own, one shared by all blocks, or none."""

    attributes = (
        "qkv", "q_bias", "qkv_bias_separate", "num_heads", "scale", "relative_position_bias_table",
        "_get_rel_pos_bias", "attn_drop", "proj", "proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        q, k, v = split_last(packed_projection(self, x), 3, self.num_heads, -1).unbind(2)
        bias = shared_rel_pos_bias
        if self.relative_position_bias_table is not None:
            bias = self._get_rel_pos_bias()
            if shared_rel_pos_bias is not None:
                bias = bias + shared_rel_pos_bias
        out = attention(q, k, v, scale=scale_of(self), bias=bias)
        return self.proj_drop(self.proj(out.flatten(2)))  # type: ignore[no-any-return]


class RelativePositionAttention(Fused):
    """The ViTs with relative positions, from a table or a small MLP."""

    absorbed = REL_POS_AND_DROPOUT
    attributes = ("qkv", "num_heads", "scale", "q_norm", "k_norm", "rel_pos", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor, shared_rel_pos: Tensor | None = None) -> Tensor:
        if self.rel_pos is not None and shared_rel_pos is not None:  # their sum or the first, as timm is set up
            return self.stock(x, shared_rel_pos)  # type: ignore[no-any-return]
        q, k, v = split_last(self.qkv(x), 3, self.num_heads, -1).unbind(2)
        bias = shared_rel_pos if self.rel_pos is None else self.rel_pos.get_bias()
        out = attention(self.q_norm(q), self.k_norm(k), v, scale=scale_of(self), bias=bias)
        return self.proj_drop(self.proj(out.flatten(2)))  # type: ignore[no-any-return]


class TableAttention(Fused):
    """LeViT and EfficientFormer: a table by absolute offset, values with more channels than keys."""

    attributes = ("qkv", "num_heads", "key_dim", "val_dim", "scale", "get_attention_biases", "proj")
    use_conv = False  # a map instead of tokens; EfficientFormer does not have the choice

    def attend(self, x: Tensor) -> Tensor:
        packed = tokens_of(self.qkv(x)) if self.use_conv else self.qkv(x)
        heads = split_last(packed, self.num_heads, -1)
        q, k, v = torch.split(heads, [self.key_dim, self.key_dim, self.val_dim], dim=-1)
        out = attention(q, k, v, scale=scale_of(self), bias=self.get_attention_biases(x.device))
        return self.proj(map_of(out, *x.shape[2:]) if self.use_conv else out.flatten(2))  # type: ignore[no-any-return]


class DownsamplingAttention(Fused):
    """LeViT between two stages: the queries lie on a coarser grid."""

    attributes = (
        "q", "kv", "num_heads", "key_dim", "val_dim", "scale", "use_conv", "get_attention_biases", "proj",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        query, kv = self.q(x), self.kv(x)
        size = query.shape[2:]
        if self.use_conv:
            query, kv = tokens_of(query), tokens_of(kv)
        q, kv = (split_last(t, self.num_heads, -1) for t in (query, kv))
        k, v = torch.split(kv, [self.key_dim, self.val_dim], dim=-1)
        out = attention(q, k, v, scale=scale_of(self), bias=self.get_attention_biases(x.device))
        return self.proj(map_of(out, *size) if self.use_conv else out.flatten(2))  # type: ignore[no-any-return]


class DownsamplingMapAttention(Fused):
    """EfficientFormerV2 between two stages, with a convolution of the values beside the attention."""

    attributes = ("q", "k", "v", "v_local", "num_heads", "scale", "resolution2", "get_attention_biases", "act", "proj")

    def attend(self, x: Tensor) -> Tensor:
        value = self.v(x)
        q, k, v = (split_last(tokens_of(t), self.num_heads, -1) for t in (self.q(x), self.k(x), value))
        out = attention(q, k, v, scale=scale_of(self), bias=self.get_attention_biases(x.device))
        out = map_of(out, *self.resolution2) + self.v_local(value)
        return self.proj(self.act(out))  # type: ignore[no-any-return]


class GatedPositionalAttention(Fused):
    """ConViT: a gate of each head mixes attention by content with attention by position.

    Both kinds of weights sum to 1 for each query, and so does their mixture: timm's renormalisation of it
    only removes rounding. The positional weights are those of all images.

    Source: d'Ascoli et al., "ConViT" (2021), equation 7.
    """

    attributes = (
        "qk", "v", "num_heads", "scale", "rel_indices", "get_rel_indices", "pos_proj", "gating_param", "attn_drop",
        "proj", "proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor) -> Tensor:
        if self.rel_indices is None or self.rel_indices.shape[1] != x.shape[1]:  # type: ignore[has-type]
            self.rel_indices = self.get_rel_indices(x.shape[1])
        q, k = split_last(self.qk(x), 2, self.num_heads, -1).unbind(2)
        v = split_last(self.v(x), self.num_heads, -1)
        by_content = attention(q, k, v, scale=scale_of(self))
        position = self.pos_proj(self.rel_indices).squeeze(0).permute(2, 0, 1).softmax(dim=-1)  # [H, N, N]
        by_position = torch.einsum("hnm,bmhd->bnhd", position.type_as(v), v)
        gate = torch.sigmoid(self.gating_param).unsqueeze(-1)  # [H, 1]
        out = (1.0 - gate) * by_content + gate * by_position
        return self.proj_drop(self.proj(out.flatten(2)))  # type: ignore[no-any-return]
