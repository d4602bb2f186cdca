"""The definition of joining attention results, in plain PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merge_attentions"]


def merge_attentions(outs: list[Tensor], lses: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Same arguments, shapes and results as :func:`vitkernels.merge_attentions`."""
    stacked = torch.stack(list(lses))  # [P, B, *, H]
    empty = (stacked == -torch.inf).all(0)  # [B, *, H]
    shown = stacked.masked_fill(empty, 0.0)  # [P, B, *, H]
    # Not exp(stacked - lse): a large lse cannot hold the logarithm of a sum, and the weights would not add up to one.
    weight = torch.softmax(shown, 0).masked_fill(empty, 0.0)  # [P, B, *, H]
    out = (weight.unsqueeze(-1) * torch.stack(list(outs))).sum(0)  # [B, *, H, Dv]
    return out.to(outs[0].dtype), torch.logsumexp(shown, 0).masked_fill(empty, -torch.inf)
