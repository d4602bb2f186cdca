"""The definition of decayed linear attention, in plain PyTorch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["decayed_linear_attention"]


def decayed_linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: float | Tensor,
    *,
    axes: Sequence[int] | None = None,
    is_causal: bool = True,
    initial_state: Tensor | None = None,
    return_state: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.decayed_linear_attention`."""
    wide = torch.promote_types(query.dtype, torch.float32)
    heads = query.shape[-2]
    of_heads = torch.as_tensor(decay, dtype=wide, device=query.device).expand(heads)
    for axis in axes or (0,):
        q, k, v = (t.movedim(1 + axis, -3).transpose(-3, -2) for t in (query, key, value))  # [B, *, H, n, d]
        n = q.size(-2)
        at = torch.arange(n, device=q.device)
        distance = at[:, None] - at
        weights = of_heads[:, None, None] ** distance.abs()  # [H, n, n]
        if is_causal:
            weights = weights.masked_fill(distance < 0, 0.0)
        out = ((q @ k.transpose(-1, -2)) * weights.to(q.dtype)) @ v  # [B, *, H, n, dv]
        state = k.transpose(-1, -2) @ (v * (of_heads[:, None] ** (n - 1 - at)).unsqueeze(-1).to(v.dtype))
        if initial_state is not None:
            passed = of_heads[:, None, None] ** (at + 1).unsqueeze(-1)  # [H, n, 1]
            out = out + (q.to(wide) @ initial_state * passed).to(out.dtype)
            state = state + (of_heads**n)[:, None, None] * initial_state
        value = out.transpose(-3, -2).movedim(-3, 1 + axis)
    return (value, state.to(wide)) if return_state else value
