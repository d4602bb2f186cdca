"""Multi-head self-attention as the vision transformers use it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vitkernels.functional import attention
from vitkernels.nn.maps import check_input, integers
from vitkernels.nn.masks import mask_terms

__all__ = ["Attention"]


class Attention(nn.Module):
    """Multi-head self-attention with one packed projection; ``timm.layers.attention.Attention``, fused.

    Arguments, parameter names and parameter shapes are timm's, so its published weights load. The packed
    projection is read in place, as three strided views.

    The kernel has no dropout: with ``attn_drop > 0`` in training, PyTorch's SDPA computes the attention.

    Args:
        dim: channels of the input.
        num_heads: number of heads.
        attn_head_dim: channels of a head, default ``dim // num_heads``.
        dim_out: channels of the output, default ``dim``.
        qkv_bias: whether ``qkv`` (and ``gate``) have a bias.
        qk_norm: normalise the queries and keys of each head with ``norm_layer``.
        scale_norm: normalise the heads' joined output with ``norm_layer`` before ``proj``.
        proj_bias: whether ``proj`` has a bias.
        gated: multiply the heads' output with the sigmoid of a projection of the input.
        attn_drop: dropout of the attention weights, in training.
        proj_drop: dropout of the output, in training.
        norm_layer: called as ``norm_layer(channels, device=..., dtype=...)``; needed by ``qk_norm`` and
            ``scale_norm``.
        device: of the parameters.
        dtype: of the parameters.

    Raises:
        RuntimeError: if ``dim`` is not a multiple of ``num_heads`` and ``attn_head_dim`` is not given, or if a
            norm is asked for without ``norm_layer``.

    Source: Dosovitskiy et al., "An Image is Worth 16x16 Words" (2021), appendix A; ``qk_norm``: Dehghani et
    al., "Scaling Vision Transformers to 22 Billion Parameters" (2023), section 2.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int = 8,
        attn_head_dim: int | None = None,
        dim_out: int | None = None,
        qkv_bias: bool = False,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        gated: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        norm_layer: Callable[..., nn.Module] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        integers("Attention", "dim", dim, 1)
        integers("Attention", "num_heads", num_heads, 1)
        if not attn_head_dim and dim % num_heads != 0:
            raise RuntimeError(
                f"vitkernels.nn.Attention: dim is {dim}, takes a multiple of num_heads ({num_heads}) "
                "where attn_head_dim is not given"
            )
        if norm_layer is None and (qk_norm or scale_norm):
            raise RuntimeError(
                "vitkernels.nn.Attention: norm_layer is None, takes the constructor of a norm "
                "where qk_norm or scale_norm is True"
            )

        def norm(channels: int, wanted: bool) -> nn.Module:
            if not wanted or norm_layer is None:
                return nn.Identity()
            return norm_layer(channels, **factory)

        self.num_heads = num_heads
        self.head_dim = attn_head_dim or dim // num_heads
        self.attn_dim = num_heads * self.head_dim
        self.scale = self.head_dim**-0.5

        self.qkv = nn.Linear(dim, self.attn_dim * 3, bias=qkv_bias, **factory)
        self.q_norm = norm(self.head_dim, qk_norm)
        self.k_norm = norm(self.head_dim, qk_norm)
        self.attn_drop = nn.Dropout(attn_drop)
        self.norm = norm(self.attn_dim, scale_norm)
        self.gate = nn.Linear(dim, self.attn_dim, bias=qkv_bias, **factory) if gated else None
        self.proj = nn.Linear(self.attn_dim, dim_out or dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """Attend within each sequence.

        Args:
            x: ``(B, N, dim)``.
            attn_mask: broadcastable to ``(B, heads, N, N)``: boolean, ``True`` where a key takes part, or
                floating and added to the logits. A token that sees no key gets the output of zero attention.
            is_causal: token ``i`` sees the tokens ``j <= i``.

        Returns:
            ``(B, N, dim_out)``.

        Raises:
            RuntimeError: if ``x`` is not three-dimensional, or ``attn_mask`` comes together with ``is_causal``.
        """
        check_input(self, x, "(B, N, dim)")
        if is_causal and attn_mask is not None:
            raise RuntimeError("vitkernels.nn.Attention: is_causal is True, takes False where attn_mask is given")
        B, N, _ = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, self.head_dim).unbind(2)  # [B, N, H, D]
        q, k = self.q_norm(q), self.k_norm(k)
        if self.training and self.attn_drop.p > 0.0:
            out = self._dropout_attention(q, k, v, attn_mask, is_causal)
        else:
            bias, key_bias = mask_terms(attn_mask)
            out = attention(q, k, v, scale=self.scale, bias=bias, key_bias=key_bias, is_causal=is_causal)
        out = self.norm(out.reshape(B, N, self.attn_dim))
        if self.gate is not None:
            out = out * self.gate(x).sigmoid()
        output: Tensor = self.proj_drop(self.proj(out))
        return output

    def _dropout_attention(self, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))  # [B, H, N, D]
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask, self.attn_drop.p, is_causal, scale=self.scale
        )
        return out.transpose(1, 2)

    def extra_repr(self) -> str:
        return f"num_heads={self.num_heads}, head_dim={self.head_dim}"
