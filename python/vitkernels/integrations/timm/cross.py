"""Fewer queries than keys, or fewer keys than queries: class attention, reduced keys, pooling."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor, nn

from vitkernels.functional import attention
from vitkernels.integrations.masks import mask_fits
from vitkernels.integrations.shapes import split_last, tokens_of
from vitkernels.integrations.swap import Fused
from vitkernels.integrations.timm.forward import packed_projection, scale_of
from vitkernels.integrations.timm.rope import rotate
from vitkernels.nn.masks import mask_terms

__all__ = [
    "ClassAttention",
    "CrossAttention",
    "LatentPooling",
    "PackedClassAttention",
    "ParameterFreePooling",
    "PooledKeysAttention",
    "PositionalPooling",
    "ReducedKeysAttention",
    "RotaryPooling",
    "SimplePooling",
    "SubsampledKeysAttention",
]


class ClassAttention(Fused):
    """CaiT and XCiT: the class token attends to all tokens."""

    attributes = ("q", "k", "v", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        return _attend(self, self.q(x[:, :1]), self.k(x), self.v(x))


class CrossAttention(Fused):
    """CrossViT: the class token of one branch attends to the patches of the other."""

    attributes = ("wq", "wk", "wv", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        return _attend(self, self.wq(x[:, :1]), self.wk(x), self.wv(x))


class PackedClassAttention(Fused):
    """VOLO: class attention with one projection for the keys and values."""

    attributes = ("q", "kv", "num_heads", "scale", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        return _attend(self, self.q(x[:, :1]), *self.kv(x).chunk(2, dim=-1))


class ReducedKeysAttention(Fused):
    """Next-ViT: keys and values from averages of ``sr_ratio ** 2`` consecutive tokens."""

    attributes = ("q", "k", "v", "num_heads", "scale", "sr", "norm", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor) -> Tensor:
        source = x if self.sr is None else self.norm(self.sr(x.transpose(1, 2))).transpose(1, 2)
        return _attend(self, self.q(x), self.k(source), self.v(source))


class SubsampledKeysAttention(Fused):
    """Twins: keys and values from a strided convolution of the map."""

    attributes = ("q", "kv", "num_heads", "scale", "sr", "norm", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        source = x if self.sr is None else self.norm(_strided(self.sr, x, size))
        return _attend(self, self.q(x), *self.kv(source).chunk(2, dim=-1))


class PooledKeysAttention(Fused):
    """PVTv2: keys and values from a strided convolution of the map, or from one of its 7 x 7 average."""

    attributes = ("q", "kv", "num_heads", "scale", "sr", "norm", "pool", "act", "attn_drop", "proj", "proj_drop")

    def attend(self, x: Tensor, feat_size: list[int]) -> Tensor:
        source = x
        if self.sr is not None:
            source = self.norm(_strided(self.sr, x, feat_size, self.pool))
        if self.act is not None:
            source = self.act(source)
        return _attend(self, self.q(x), *self.kv(source).chunk(2, dim=-1))


def _strided(reduction: nn.Module, x: Tensor, size: Sequence[int], pool: nn.Module | None = None) -> Tensor:
    """The tokens ``x`` of a map of ``size``, pooled and reduced."""
    feature_map = torch.unflatten(x.transpose(1, 2), 2, tuple(size))
    reduced: Tensor = reduction(feature_map if pool is None else pool(feature_map))
    return reduced.flatten(2).transpose(1, 2)


def _attend(module: Fused, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention and projection, from ``(B, N, heads * d)`` each."""
    q, k, v = (split_last(t, module.num_heads, -1) for t in (q, k, v))
    out = attention(q, k, v, scale=scale_of(module)).flatten(2)
    return module.proj_drop(module.proj(out))  # type: ignore[no-any-return]


class LatentPooling(Fused):
    """``AttentionPoolLatent``: learned queries, the same for all images."""

    attributes = (
        "pos_embed", "latent", "q", "kv", "q_norm", "k_norm", "num_heads", "scale", "proj", "proj_drop", "mlp",
        "norm", "pool",
    )  # fmt: skip

    def attend(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        if not mask_fits(attn_mask, x):
            return self.stock(x, attn_mask)  # type: ignore[no-any-return]
        if self.pos_embed is not None:
            x = x + self.pos_embed.unsqueeze(0).to(x.dtype)
        q = self.q_norm(split_last(self.q(self.latent), self.num_heads, -1))  # [1, latents, H, D]
        k, v = split_last(self.kv(x), 2, self.num_heads, -1).unbind(2)
        bias, key_bias = mask_terms(attn_mask)
        out = attention(q, self.k_norm(k), v, scale=scale_of(self), bias=bias, key_bias=key_bias)
        out = self.proj_drop(self.proj(out.flatten(2)))
        if self.mlp is not None:
            out = out + self.mlp(self.norm(out))
        if self.pool == "token":
            return out[:, 0]  # type: ignore[no-any-return]
        return out.mean(1) if self.pool == "avg" else out  # type: ignore[no-any-return]


class ParameterFreePooling(Fused):
    """``AttentionPoolPrr``: the tokens are queries, keys and values as they are."""

    attributes = ("num_heads", "scale", "pre_norm", "post_norm", "pool")

    def attend(self, x: Tensor) -> Tensor:
        tokens = split_last(self.pre_norm(x), self.num_heads, -1)
        queries = tokens[:, :1] if self.pool == "token" else tokens
        out = self.post_norm(attention(queries, tokens, tokens, scale=scale_of(self)).flatten(2))
        return out.mean(1) if self.pool == "avg" else out[:, 0]  # type: ignore[no-any-return]


class PositionalPooling(Fused):
    """``AttentionPool2d`` of CLIP's ResNets."""

    attributes = (
        "cls_token", "pos_embed", "feat_size", "qkv", "q", "k", "v", "num_heads", "head_dim", "scale", "drop", "proj",
        "pool_type", "_pool",
    )  # fmt: skip

    def attend(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        size = x.shape[2:]
        tokens = _with_summary(self, x)
        position = self.pos_embed.unsqueeze(0)
        tokens = tokens + resample_abs_pos_embed(position, size, old_size=self.feat_size, num_prefix_tokens=1)
        return _pooled(self, *_projections(self, tokens), size, pre_logits)


class RotaryPooling(Fused):
    """``RotAttentionPool2d``: the patches are rotated, the summary token is not."""

    attributes = (
        "cls_token", "pos_embed", "rotate_half", "qkv", "num_heads", "head_dim", "scale", "drop", "proj", "pool_type",
        "_pool",
    )  # fmt: skip

    def attend(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        q, k, v = _projections(self, _with_summary(self, x))
        rope = self.pos_embed.get_embed(tuple(x.shape[2:]))
        if isinstance(rope, tuple):
            rope = torch.cat(rope, dim=-1)
        q, k = (rotate(t, rope, 1, self.rotate_half).type_as(v) for t in (q, k))
        return _pooled(self, q, k, v, x.shape[2:], pre_logits)


def _with_summary(module: Fused, x: Tensor) -> Tensor:
    """The pixels of ``x (B, C, H, W)`` as tokens, after the class token or their mean."""
    tokens = x.flatten(2).transpose(1, 2)
    cls = module.cls_token
    first = tokens.mean(1, keepdim=True) if cls is None else cls.expand(x.size(0), -1, -1)
    return torch.cat((first, tokens), dim=1)


def _projections(module: Fused, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if module.qkv is not None:
        q, k, v = packed_projection(module, x).chunk(3, dim=-1)
    else:
        q, k, v = module.q(x), module.k(x), module.v(x)
    q, k, v = (split_last(t, module.num_heads, module.head_dim) for t in (q, k, v))
    return q, k, v


def _pooled(module: Fused, q: Tensor, k: Tensor, v: Tensor, size: Sequence[int], pre_logits: bool) -> Tensor:
    # Dropout draws for every token, so the other queries count as well in training.
    if module.pool_type == "token" and not (module.training and module.drop.p > 0.0):
        q = q[:, :1]
    out = module.drop(attention(q, k, v, scale=scale_of(module)).flatten(2))
    if not pre_logits:
        out = module.proj(out)
    return module._pool(out, *size)  # type: ignore[no-any-return]


class SimplePooling(Fused):
    """SimPool: the mean of the tokens is the query, the normalised tokens are the values."""

    attributes = ("norm", "q", "k", "q_norm", "k_norm", "num_heads", "scale", "gamma")

    def attend(self, x: Tensor) -> Tensor:
        tokens = tokens_of(x) if x.dim() == 4 else x
        value = self.norm(tokens)
        q, k, v = (
            split_last(t, self.num_heads, -1) for t in (self.q(tokens.mean(1, keepdim=True)), self.k(value), value)
        )
        if self.gamma is not None:
            v = (v - v.amin(dim=1, keepdim=True) + 1e-6).pow(self.gamma)
        out = attention(self.q_norm(q), self.k_norm(k), v, scale=scale_of(self))
        if self.gamma is not None:
            out = out.pow(1.0 / self.gamma)
        return out.flatten(1)
