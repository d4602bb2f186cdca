"""Rotary positions: EVA, EVA-02, DINOv3, Perception Encoder, Gemma, rotary attention pooling."""

from __future__ import annotations

import torch
from timm.layers.pos_embed_sincos import apply_rot_embed_cat
from torch import Tensor

from vitkernels.functional import attention
from vitkernels.integrations.masks import mask_fits
from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import Fused
from vitkernels.integrations.timm.forward import packed_projection, scale_of
from vitkernels.integrations.timm.self_attention import gated_output
from vitkernels.nn.masks import mask_terms

__all__ = ["GemmaAttention", "RotaryAttention", "rotate"]


def rotate(x: Tensor, rope: Tensor, prefix: int, half: bool) -> Tensor:
    """Rotate ``x (B, N, heads, d)`` by timm's ``rope (..., N - prefix, 2 d)``; the first ``prefix`` tokens stay."""
    x = x.transpose(1, 2)  # timm's embeddings may differ by batch and by head
    rotated = apply_rot_embed_cat(x[:, :, prefix:], rope, half=half)
    if prefix:
        rotated = torch.cat((x[:, :, :prefix], rotated), dim=2)
    return rotated.transpose(1, 2)  # type: ignore[no-any-return]


class RotaryAttention(Fused):
    """``EvaAttention`` and ``AttentionRope``: packed or separate projections, grouped keys and values."""

    attributes = (
        "qkv", "q_proj", "k_proj", "v_proj", "num_heads", "head_dim", "scale", "q_norm", "k_norm",
        "num_prefix_tokens", "rotate_half", "attn_drop", "norm", "gate", "proj", "proj_drop",
    )  # fmt: skip

    def attend(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if not mask_fits(attn_mask, x, is_causal):
            return self.stock(x, rope, attn_mask, is_causal)  # type: ignore[no-any-return]
        if self.qkv is not None:
            q, k, v = split_last(packed_projection(self, x), 3, self.num_heads, self.head_dim).unbind(2)
        else:
            projections = (self.q_proj(x), self.k_proj(x), self.v_proj(x))
            q, k, v = (split_last(t, -1, self.head_dim) for t in projections)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (rotate(t, rope, self.num_prefix_tokens, self.rotate_half).type_as(v) for t in (q, k))
        bias, key_bias = mask_terms(attn_mask)
        out = attention(q, k, v, scale=scale_of(self), bias=bias, key_bias=key_bias, is_causal=is_causal)
        return gated_output(self, out, x)


class GemmaAttention(Fused):
    """Gemma 4's vision encoder: normalised queries, keys and values, two-dimensional rotation, scale 1."""

    attributes = (
        "q_proj", "k_proj", "v_proj", "num_heads", "num_kv_heads", "q_norm", "k_norm", "v_norm", "attn_drop",
        "o_proj", "proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor, rope_cos: Tensor, rope_sin: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        from timm.models.gemma4_vit import apply_multidimensional_rope

        if not mask_fits(attn_mask, x):
            return self.stock(x, rope_cos, rope_sin, attn_mask)  # type: ignore[no-any-return]
        q = self.q_norm(split_last(self.q_proj(x), self.num_heads, -1))
        k = self.k_norm(split_last(self.k_proj(x), self.num_kv_heads, -1))
        v = self.v_norm(split_last(self.v_proj(x), self.num_kv_heads, -1))
        q, k = (apply_multidimensional_rope(t, rope_cos, rope_sin, ndim=2, unsqueeze_dim=2) for t in (q, k))
        bias, key_bias = mask_terms(attn_mask)
        out = attention(q, k, v, scale=1.0, bias=bias, key_bias=key_bias)
        return self.proj_drop(self.o_proj(out.flatten(2)))  # type: ignore[no-any-return]
