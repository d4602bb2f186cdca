"""SDPA's masks in the terms of the operator."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mask_terms"]


def mask_terms(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The ``(bias, key_bias)`` of :func:`vitkernels.attention` that a mask of SDPA stands for.

    Args:
        mask: broadcastable to ``(B, heads, Nq, Nk)``, at least two-dimensional; boolean (``True`` takes part)
            or floating (added to the logits). Where all queries share one row, written once or expanded, it
            is read as a bias of the keys and nothing of size ``Nq x Nk`` is made.
    """
    if mask is None:
        return None, None
    by_key = mask.size(-2) == 1 or mask.stride(-2) == 0
    if by_key:
        mask = mask.select(-2, 0)
    if mask.dtype == torch.bool:
        mask = torch.where(mask, 0.0, -torch.inf)
    return (None, mask) if by_key else (mask, None)
