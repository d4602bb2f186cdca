"""The definition of dense attention, in plain PyTorch. Every dtype, any device, O(N^2) memory."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["attention"]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | Tensor | None = None,
    qk_norm: str | None = None,
    bias: Tensor | None = None,
    key_bias: Tensor | None = None,
    multiplier: Tensor | None = None,
    head_map: Tensor | None = None,
    additional_keys: Tensor | None = None,
    additional_values: Tensor | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.attention`."""
    num_own = key.size(1)
    if additional_keys is not None and additional_values is not None:
        key, value = torch.cat([key, additional_keys], 1), torch.cat([value, additional_values], 1)
    logits = attention_logits(query, key, scale, qk_norm, bias, key_bias, multiplier, head_map, is_causal, num_own)
    v = value[:, :, head_map_of(query, key, head_map)].transpose(1, 2)  # [B, H, Nk, Dv]

    # The statistics have the kernels' precision. A row without a key has lse = -inf, and P = 0 instead of NaN.
    empty = (logits == -torch.inf).all(-1)  # [B, H, Nq]
    logits = logits.masked_fill(empty.unsqueeze(-1), 0.0)  # no -inf - -inf, here or in the gradient
    lse = (
        torch.logsumexp(logits, -1).masked_fill(empty, -torch.inf)
        if logits.size(-1)
        else logits.new_full(empty.shape, -torch.inf)
    )
    p = torch.softmax(logits, -1).masked_fill(empty.unsqueeze(-1), 0.0)  # [B, H, Nq, Nk]
    out = (p.to(v.dtype) @ v).transpose(1, 2)  # [B, Nq, H, Dv]
    return (out, lse.transpose(1, 2)) if return_lse else out


def head_map_of(query: Tensor, key: Tensor, head_map: Tensor | None) -> Tensor:
    """The kv head of each query head."""
    if head_map is not None:
        return head_map
    heads = query.size(2)
    return torch.arange(heads, device=query.device) // max(heads // max(key.size(2), 1), 1)


def attention_logits(
    query: Tensor,
    key: Tensor,
    scale: float | Tensor | None,
    qk_norm: str | None,
    bias: Tensor | None,
    key_bias: Tensor | None,
    multiplier: Tensor | None,
    head_map: Tensor | None,
    is_causal: bool,
    num_own: int,
) -> Tensor:
    """The logits ``(B, heads, Nq, Nk)`` in the precision of the statistics. Keys from ``num_own`` on have no terms."""
    heads = query.size(2)
    if qk_norm == "l2":
        wide = torch.promote_types(query.dtype, torch.float32)
        query, key = (torch.nn.functional.normalize(t.to(wide), dim=-1).to(t.dtype) for t in (query, key))
    if scale is None:
        scale = query.size(-1) ** -0.5
    if isinstance(scale, Tensor):
        scale = scale.to(query.dtype)[:, None, None]

    q = query.transpose(1, 2)  # [B, H, Nq, D]
    k = key[:, :, head_map_of(query, key, head_map)].transpose(1, 2)  # [B, H, Nk, D]
    logits = q @ k.transpose(-1, -2) * scale  # [B, H, Nq, Nk]
    own = logits[..., :num_own]
    if multiplier is not None:
        own = own * multiplier.to(q.dtype)
    if bias is not None:
        own = own + bias.to(q.dtype)
    if key_bias is not None:
        own = own + key_bias.to(q.dtype).expand(q.size(0), heads, num_own).unsqueeze(-2)
    if is_causal:
        visible = torch.ones(own.shape[-2:], dtype=torch.bool, device=q.device).tril()
        own = own.masked_fill(~visible, -torch.inf)
    logits = torch.cat([own, logits[..., num_own:]], -1) if num_own < key.size(1) else own
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
