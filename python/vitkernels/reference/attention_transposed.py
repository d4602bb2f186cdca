"""The definition of transposed attention, in plain PyTorch. Every dtype, any device, O(N^2) memory."""

from __future__ import annotations

import torch
from torch import Tensor

from vitkernels.reference.attention import attention_logits

__all__ = ["attention_transposed"]


def attention_transposed(
    query: Tensor,
    key: Tensor,
    value_q: Tensor,
    lse: Tensor,
    *,
    query_weight: Tensor | None = None,
    scale: float | Tensor | None = None,
    qk_norm: str | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    head_map: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """Same arguments, shapes and results as :func:`vitkernels.attention_transposed`."""
    logits = attention_logits(
        query, key, scale, qk_norm, bias, key_bias, multiplier, head_map, is_causal, key.size(1)
    )  # [B, H, Nq, Nk]
    lse = lse.transpose(1, 2).unsqueeze(-1)  # [B, H, Nq, 1]
    # A row without a key has P = 0; no inf - inf, here or in the gradient.
    empty = lse == -torch.inf
    p = torch.exp(logits.masked_fill(empty, -torch.inf) - lse.masked_fill(empty, 0.0))  # [B, H, Nq, Nk]
    if query_weight is not None:
        value_q = (value_q * query_weight.unsqueeze(-1)).to(value_q.dtype)
    return (p.to(value_q.dtype).transpose(-1, -2) @ value_q.transpose(1, 2)).transpose(1, 2)  # [B, Nk, H, Dv]
