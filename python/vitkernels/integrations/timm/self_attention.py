"""Queries, keys and values from the same tokens, without positions in the attention."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vitkernels.functional import attention
from vitkernels.integrations.masks import mask_fits
from vitkernels.integrations.shapes import split_last
from vitkernels.integrations.swap import Fused
from vitkernels.integrations.timm.forward import scale_of
from vitkernels.nn.masks import mask_terms

__all__ = [
    "DifferentialAttention",
    "DifferentialBlock",
    "MaskUnitAttention",
    "PackedAttention",
    "ParallelBlock",
    "PoolingStageAttention",
    "SelfAttention",
    "UnequalDimsAttention",
    "gated_output",
]


class SelfAttention(Fused):
    """``timm.layers.attention.Attention`` of ViT, DeiT, DINOv2 and most others."""

    attributes = (
        "qkv", "num_heads", "head_dim", "scale", "q_norm", "k_norm", "attn_drop", "norm", "gate", "proj", "proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not mask_fits(attn_mask, x, is_causal):
            return self.stock(x, attn_mask, is_causal)  # type: ignore[no-any-return]
        q, k, v = split_last(self.qkv(x), 3, self.num_heads, self.head_dim).unbind(2)  # [B, N, H, D]
        bias, key_bias = mask_terms(attn_mask)
        out = attention(
            self.q_norm(q), self.k_norm(k), v,
            scale=scale_of(self), bias=bias, key_bias=key_bias, is_causal=is_causal,
        )  # fmt: skip
        return gated_output(self, out, x)


def gated_output(module: Fused, out: Tensor, x: Tensor) -> Tensor:
    """What follows the attention: norm of the joined heads ``out``, gate of the input ``x``, projection."""
    out = module.norm(out.flatten(2))
    if module.gate is not None:
        out = out * module.gate(x).sigmoid()
    return module.proj_drop(module.proj(out))  # type: ignore[no-any-return]


class PackedAttention(Fused):
    """Attention over the tokens of ``x (B, *spatial, dim)`` with one packed projection."""

    attributes = ("qkv", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(self.qkv(x.flatten(1, -2)), 3, self.num_heads, -1).unbind(2)
        out = attention(q, k, v, scale=scale_of(self))
        return self.proj_drop(self.proj(torch.unflatten(out.flatten(2), 1, x.shape[1:-1])))  # type: ignore[no-any-return]


class UnequalDimsAttention(Fused):
    """TNT: the values have more channels than the queries and keys."""

    attributes = ("qk", "v", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        q, k = split_last(self.qk(x), 2, self.num_heads, -1).unbind(2)
        out = attention(q, k, split_last(self.v(x), self.num_heads, -1), scale=scale_of(self))
        return self.proj_drop(self.proj(out.flatten(2)))  # type: ignore[no-any-return]


class MaskUnitAttention(Fused):
    """Hiera's global attention, whose queries are pooled where a stage begins."""

    attributes = ("qkv", "heads", "scale", "q_stride", "use_mask_unit_attn", "proj")

    @staticmethod
    def obstacle(module: nn.Module) -> str:
        return "windows are not fused yet" if module.use_mask_unit_attn else ""

    def attend(self, x: Tensor) -> Tensor:
        q, k, v = split_last(self.qkv(x), 3, self.heads, -1).unbind(2)
        if self.q_stride > 1:
            q = torch.unflatten(q, 1, (self.q_stride, -1)).amax(1)
        return self.proj(attention(q, k, v, scale=scale_of(self)).flatten(2))  # type: ignore[no-any-return]


class PoolingStageAttention(Fused):
    """SAM 2's Hiera: ``x (B, H, W, dim)``, be it the map or one window of it."""

    attributes = ("qkv", "num_heads", "scale", "q_pool", "proj")

    def attend(self, x: Tensor) -> Tensor:
        height, width = x.shape[1:3]
        q, k, v = split_last(self.qkv(x).flatten(1, 2), 3, self.num_heads, -1).unbind(2)
        if self.q_pool is not None:
            q = torch.unflatten(q.flatten(2), 1, (height, width))  # [B, height, width, C]
            q = self.q_pool(q.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
            height, width = q.shape[1:3]
            q = split_last(q.flatten(1, 2), self.num_heads, -1).contiguous()
        out = attention(q, k, v, scale=scale_of(self))
        return self.proj(torch.unflatten(out.flatten(2), 1, (height, width)))  # type: ignore[no-any-return]


class ParallelBlock(Fused):
    """The block of ViT-22B: attention and MLP side by side, with joint projections."""

    attributes = (
        "in_norm", "in_proj", "in_split", "mlp_bias", "q_norm", "k_norm", "num_heads", "scale", "attn_drop",
        "mlp_act", "mlp_drop", "out_proj", "attn_out_proj", "mlp_out_proj", "ls", "drop_path",
    )  # fmt: skip

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not mask_fits(attn_mask, x, is_causal):
            return self.stock(x, attn_mask, is_causal)  # type: ignore[no-any-return]
        hidden, *qkv = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        q, k, v = (split_last(t, self.num_heads, -1) for t in qkv)
        bias, key_bias = mask_terms(attn_mask)
        attended = attention(
            self.q_norm(q), self.k_norm(k), v,
            scale=scale_of(self), bias=bias, key_bias=key_bias, is_causal=is_causal,
        ).flatten(2)  # fmt: skip
        hidden = self.mlp_drop(self.mlp_act(hidden))
        if self.out_proj is not None:
            out = self.out_proj(torch.cat((attended, hidden), dim=-1))
        else:
            out = self.attn_out_proj(attended) + self.mlp_out_proj(hidden)
        return x + self.drop_path(self.ls(out))  # type: ignore[no-any-return]


class DifferentialAttention(Fused):
    """The difference of two attentions over the same values."""

    attributes = (
        "qkv", "num_heads", "scale", "q_norm", "k_norm", "attn_drop", "_compute_lambda", "sub_norm", "lambda_init",
        "norm", "proj", "proj_drop",
    )  # fmt: skip

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not (mask_fits(attn_mask, x, is_causal) and _has_both_heads(self, attn_mask)):
            return self.stock(x, attn_mask, is_causal)  # type: ignore[no-any-return]
        out = _difference(self, self.qkv(x).chunk(3, dim=2), attn_mask, is_causal)
        return self.proj_drop(self.proj(self.norm(out)))  # type: ignore[no-any-return]


class DifferentialBlock(Fused):
    """Differential attention and MLP side by side, with joint projections."""

    attributes = (
        "in_norm", "in_proj", "in_split", "mlp_bias", "q_norm", "k_norm", "num_heads", "scale", "attn_drop",
        "_compute_lambda", "sub_norm", "lambda_init", "mlp_act", "mlp_drop", "out_proj", "ls", "drop_path",
    )  # fmt: skip

    def attend(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if not (mask_fits(attn_mask, x, is_causal) and _has_both_heads(self, attn_mask)):
            return self.stock(x, attn_mask, is_causal)  # type: ignore[no-any-return]
        hidden, *qkv = torch.split(self.in_proj(self.in_norm(x)), self.in_split, dim=-1)
        if self.mlp_bias is not None:
            hidden = hidden + self.mlp_bias
        out = _difference(self, qkv, attn_mask, is_causal)
        hidden = self.mlp_drop(self.mlp_act(hidden))
        out = self.out_proj(torch.cat((out, hidden), dim=-1))
        return x + self.drop_path(self.ls(out))  # type: ignore[no-any-return]


def _has_both_heads(module: Fused, attn_mask: Tensor | None) -> bool:
    """Without SDPA, timm counts the two attentions of a head as two heads of a mask."""
    return attn_mask is None or attn_mask.dim() == 2 or attn_mask.size(-3) == 1 or module.fused_attn


def _difference(module: Fused, qkv: Sequence[Tensor], attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Source: Ye et al., "Differential Transformer" (2024), equations 1 and 3."""
    heads = module.num_heads
    q, k = (split_last(t, 2 * heads, -1) for t in qkv[:2])
    # The two attentions of a head lie beside each other.
    q, k = (torch.unflatten(t, 2, (heads, 2)) for t in (module.q_norm(q), module.k_norm(k)))  # [B, N, H, 2, D]
    v = split_last(qkv[2], heads, -1)  # [B, N, H, 2 D]
    bias, key_bias = mask_terms(attn_mask)
    first, second = (
        attention(q[:, :, :, i], k[:, :, :, i], v, scale=scale_of(module), bias=bias, key_bias=key_bias,
                  is_causal=is_causal)
        for i in range(2)
    )  # fmt: skip
    out = first - module._compute_lambda().type_as(q) * second
    return (module.sub_norm(out) * (1 - module.lambda_init)).flatten(2)  # type: ignore[no-any-return]
