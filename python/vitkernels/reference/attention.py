"""The definition of dense attention, in plain PyTorch. Every dtype, any device, O(N^2) memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vitkernels.reference.grid import by_offset, relative_logits

__all__ = ["attention", "normalized"]


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
    bias_table: Tensor | None = None,
    multiplier_table: Tensor | None = None,
    rel_pos: Sequence[Tensor] | None = None,
    num_prefix_tokens: int = 0,
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
    logits = attention_logits(
        query, key, scale, qk_norm, bias, key_bias, multiplier, head_map, is_causal, num_own,
        bias_table, multiplier_table, rel_pos, num_prefix_tokens,
    )  # fmt: skip
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


def normalized(t: Tensor) -> Tensor:
    """``t`` divided by its norm over the last dimension, or by 1 where that is 0: its gradient is finite as well."""
    wide = t.to(torch.promote_types(t.dtype, torch.float32))
    norm = torch.linalg.vector_norm(wide, dim=-1, keepdim=True)
    return (wide / torch.where(norm == 0.0, 1.0, norm.clamp(min=1e-12))).to(t.dtype)


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
    bias_table: Tensor | None = None,
    multiplier_table: Tensor | None = None,
    rel_pos: Sequence[Tensor] | None = None,
    num_prefix_tokens: int = 0,
) -> Tensor:
    """The logits ``(B, heads, Nq, Nk)`` in the precision of the statistics. Keys from ``num_own`` on have no terms."""
    heads = query.size(2)
    if qk_norm == "l2":
        query, key = normalized(query), normalized(key)
    if scale is None:
        scale = query.size(-1) ** -0.5
    if isinstance(scale, Tensor):
        scale = scale.to(query.dtype).reshape(-1, 1, 1)

    q = query.transpose(1, 2)  # [B, H, Nq, D]
    k = key[:, :, head_map_of(query, key, head_map)].transpose(1, 2)  # [B, H, Nk, D]
    logits = q @ k.transpose(-1, -2) * scale  # [B, H, Nq, Nk]
    own = logits[..., :num_own]
    if multiplier_table is not None:
        own = own * by_offset(multiplier_table, num_prefix_tokens, 1.0).to(q.dtype)
    if multiplier is not None:
        own = own * multiplier.to(q.dtype)
    if bias_table is not None:
        own = own + by_offset(bias_table, num_prefix_tokens, 0.0).to(q.dtype)
    if rel_pos is not None:
        own = own + relative_logits(q, rel_pos, num_prefix_tokens)
    if bias is not None:
        own = own + bias.to(q.dtype)
    if key_bias is not None:
        own = own + key_bias.to(q.dtype).expand(k.size(0), heads, num_own).unsqueeze(-2)
    if is_causal:
        visible = torch.ones(own.shape[-2:], dtype=torch.bool, device=q.device).tril()
        own = own.masked_fill(~visible, -torch.inf)
    logits = torch.cat([own, logits[..., num_own:]], -1) if num_own < key.size(1) else own
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
