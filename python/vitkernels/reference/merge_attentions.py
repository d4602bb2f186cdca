"""The definition of joining attention results, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_attentions"]


def merge_attentions(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.merge_attentions`."""
    stacked = torch.stack(list(lses))  # [P, B, *, H]
    empty = (stacked == -torch.inf).all(0)  # [B, *, H]
    lse = torch.logsumexp(stacked.masked_fill(empty, 0.0), 0)  # [B, *, H]
    weight = torch.exp(stacked - lse).unsqueeze(-1)  # [P, B, *, H, 1]
    out = (weight * torch.stack(list(outs))).sum(0)  # [B, *, H, Dv]
    return out.to(outs[0].dtype), lse.masked_fill(empty, -torch.inf)
