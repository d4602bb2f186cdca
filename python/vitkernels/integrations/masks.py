"""Masks as torch's ``scaled_dot_product_attention`` takes them."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["mask_fits"]


def mask_fits(mask: Tensor | None, query: Tensor, is_causal: bool = False) -> bool:
    """Whether ``mask`` is one for the kernel. The library says what is wrong with others, or finds a meaning for them.

    Args:
        query: the queries, or what they are made of.
        is_causal: which SDPA takes without a mask only.
    """
    if mask is None:
        return True
    return not is_causal and 2 <= mask.dim() <= 4 and mask.dtype in (torch.bool, torch.float32, query.dtype)
